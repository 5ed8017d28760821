"""What an engine is: token ids in, token ids and logps out. No text, no prompts, no torch.

An engine serves requests with n = 1. Which completion of which prompt a request stands for is known to its caller,
by the request's id.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

from selfplay.errors import GeneratorError
from selfplay.types import Sampling

DEFAULT_BATCH_SIZE = 64  # sequences at once of the transformers engine


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to draw. `seed` is this request's own; `sampling.seed` and `sampling.num_completions` are not read.

    Where there are `choices`, the completion is one of these texts and then a stop token; max_tokens may still cut it.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    seed: int
    sampling: Sampling
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a request: the sampled ids with the stop token among them, and one raw logp (nats, temperature 1,
    no truncation) per id. `stop_reason` is the id of the stop token or the stop string, None where max_tokens cut. vLLM
    gives the logps of a request with choices among what the choices allow, for it masks the logits before it looks at them.
    """

    id: str
    token_ids: tuple[int, ...]
    logps: tuple[float, ...]
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How an engine is started.

    `dtype` "auto" computes in bfloat16 where the weights are stored in float32 (a policy is), else as they are stored.
    `max_model_len` None is the model's own, or what vLLM's cache holds where that is less.
    `gpu_memory_utilization` and `engine_args` are vLLM's own (on a CPU the first is a share of the machine's memory,
    read only where VLLM_CPU_KVCACHE_SPACE is not used). `tensor_parallel_size` devices serve one replica, and there are
    `data_parallel_size` replicas. `max_batch_size` is the number of sequences at once; None is the engine's default.
    `adapter` is the folder of a LoRA adapter on `model`, `adapter_rank` its largest rank.
    `stop_token_ids` end a completion; nothing else that a model folder says about sampling is used.
    The kind "reward_model" samples nothing: it is a Scorer, which alone reads `device`.
    """

    kind: Literal["vllm", "transformers", "reward_model"]
    model: str
    adapter: str | None = None
    adapter_rank: int = 0
    dtype: str = "auto"
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    max_batch_size: int | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Engine(Protocol):
    @property
    def max_model_len(self) -> int:
        """The most tokens that a prompt and its completion have together."""
        ...

    def run(self, requests: Sequence[Request]) -> Iterator[Result]:
        """One result per request, in the order in which they finish."""
        ...

    def score_labels(
        self, prompts: Sequence[tuple[int, ...]], label_token_ids: Sequence[int]
    ) -> Iterator[tuple[int, list[float]]]:
        """The place of each prompt and the logps (nats) of each label as its next token, in any order."""
        ...

    def close(self) -> None:
        """Frees what the engine holds. Calling it twice is fine."""
        ...


class Scorer(Protocol):
    def rewards(self, sequences: Sequence[tuple[int, ...]], max_batch_tokens: int) -> Iterator[tuple[int, float]]:
        """The place of each sequence and its reward, in any order. A batch holds at most `max_batch_tokens`, padding
        counted, or a single sequence.
        """
        ...

    def close(self) -> None:
        """Frees what the scorer holds. Calling it twice is fine."""
        ...


def start_scorer(settings: EngineSettings) -> Scorer:
    """A reward model in this process, its weights loaded."""
    from selfplay.generators.reward_model import RewardModelScorer

    return RewardModelScorer(settings)


def start_engine(settings: EngineSettings) -> Engine:
    """An engine in this process, its weights loaded."""
    if settings.kind == "vllm":
        from selfplay.generators.vllm import VllmEngine

        return VllmEngine(settings)
    from selfplay.generators.transformers import TransformersEngine

    return TransformersEngine(settings)


def check_lengths(requests: Sequence[Request], max_model_len: int) -> None:
    """Raises GeneratorError for a request that can't finish within the model's length: an engine would cut it silently."""
    for request in requests:
        prompt, new = len(request.prompt_token_ids), request.sampling.max_tokens
        if prompt == 0:
            raise GeneratorError(f"request {request.id}: the prompt has no tokens")
        if prompt + new > max_model_len:
            raise GeneratorError(
                f"request {request.id}: {prompt} prompt tokens + max_tokens {new} = {prompt + new} is more than "
                f"max_model_len {max_model_len}; lower max_tokens or max_prompt_length, or raise max_model_len (or, "
                "where vLLM's cache holds no more, gpu_memory_utilization or tensor_parallel_size)"
            )


def request_to_json(request: Request) -> dict[str, Any]:
    return asdict(request)


def request_from_json(row: Mapping[str, Any]) -> Request:
    sampling = dict(row["sampling"])
    sampling["stop"] = tuple(sampling["stop"])
    return Request(row["id"], tuple(row["prompt_token_ids"]), row["seed"], Sampling(**sampling), tuple(row["choices"]))


def result_from_json(row: Mapping[str, Any]) -> Result:
    return Result(row["id"], tuple(row["token_ids"]), tuple(row["logps"]), row["finish_reason"], row["stop_reason"])


def settings_from_json(row: Mapping[str, Any]) -> EngineSettings:
    settings = EngineSettings(**row)
    return replace(settings, stop_token_ids=tuple(settings.stop_token_ids))
