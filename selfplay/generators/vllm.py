"""The vLLM engine, in this process. Imported only where vLLM is installed; `isolated.py` runs it in a child.

Each request has n = 1 and its own seed. Logps come back raw (before temperature and truncation). Nothing of a model's
generation_config is used: its top_p or temperature would change the policy's distribution unseen, so stop tokens are
given explicitly and vLLM's own idea of eos is switched off.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from vllm import LLM, SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS, RequestOutputKind, StructuredOutputsParams

from selfplay.adapters import served_rank
from selfplay.errors import GeneratorError
from selfplay.generators.engine import EngineSettings, Request, Result
from selfplay.generators.environment import cpu_cache_bytes
from selfplay.generators.vllm_top_p import TOP_P, TopP


class VllmEngine:
    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        arguments = engine_arguments(settings, on_cpu=current_platform.is_cpu())
        self._own_top_p = arguments.get("logits_processors") == [TopP]  # a user's engine_args may name others
        self._llm = LLM(**arguments)
        self._engine = self._llm.llm_engine
        self._lora = LoRARequest("policy", 1, settings.adapter) if settings.adapter is not None else None

    @property
    def max_model_len(self) -> int:
        return int(self._llm.model_config.max_model_len)

    def run(self, requests: Sequence[Request]) -> Iterator[Result]:
        """Results as they finish. The prefix cache is emptied first: what ran before must not change the arithmetic."""
        work = [(r.id, r.prompt_token_ids, self._parameters(r)) for r in requests]
        for output in self._run(work):
            yield _result(output)

    def score_labels(
        self, prompts: Sequence[tuple[int, ...]], label_token_ids: Sequence[int]
    ) -> Iterator[tuple[int, list[float]]]:
        """Exact logps of the labels, whatever their rank. GeneratorError above vLLM's limit of labels."""
        labels = list(label_token_ids)
        if len(labels) > MAX_LOGPROB_TOKEN_IDS:
            raise GeneratorError(f"{len(labels)} labels: vLLM scores at most {MAX_LOGPROB_TOKEN_IDS} at once")
        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            logprob_token_ids=labels,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for output in self._run([(str(n), ids, parameters) for n, ids in enumerate(prompts)]):
            by_token = output.outputs[0].logprobs[0]
            yield int(output.request_id), [by_token[label].logprob for label in labels]

    def close(self) -> None:
        """Does nothing: vLLM gives its memory back when its process ends, which isolated.py sees to."""

    def _run(self, work: Sequence[tuple[str, tuple[int, ...], SamplingParams]]) -> Iterator[Any]:
        self._engine.reset_prefix_cache()
        for name, ids, parameters in work:
            self._engine.add_request(name, tokens_input(list(ids)), parameters, lora_request=self._lora)
        while self._engine.has_unfinished_requests():
            yield from (output for output in self._engine.step() if output.finished)

    def _parameters(self, request: Request) -> SamplingParams:
        sampling = request.sampling
        # vLLM cuts by top_k before top_p, which the processor, called before both, can't
        own_top_p = self._own_top_p and 0 < sampling.top_p < 1 and sampling.top_k == 0
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=1.0 if own_top_p else sampling.top_p,
            extra_args={TOP_P: sampling.top_p} if own_top_p else None,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=sampling.max_tokens,
            seed=request.seed,
            stop=list(sampling.stop),
            stop_token_ids=list(self._settings.stop_token_ids),
            ignore_eos=True,
            logprobs=0,
            detokenize=bool(sampling.stop),
            structured_outputs=StructuredOutputsParams(choice=list(request.choices)) if request.choices else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


def engine_arguments(settings: EngineSettings, *, on_cpu: bool) -> dict[str, Any]:
    """The keyword arguments of vllm.LLM. What the user wrote in `engine_args` comes last and wins."""
    arguments: dict[str, Any] = {
        "model": settings.model,
        "dtype": settings.dtype,
        "seed": settings.seed,
        # -1: the model's own length, or what the cache holds where that is less: 131,072 tokens of an 8B model take 16 GiB
        "max_model_len": settings.max_model_len or -1,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "generation_config": "vllm",
        "logprobs_mode": "raw_logprobs",
    }
    if settings.adapter is not None:
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": served_rank(settings.adapter_rank)}
    if on_cpu:
        # A seeded request whose prefill is chunked kills the CPU engine ("CPU Generator does not use offset"), so whole
        # prefills only; that needs room for the longest prompt in one step. The step is eager: compiling costs more
        # than a round of a small model gains. A block of 32 tokens (128 is the CPU's default) lets the completions of a
        # short prompt share its cache.
        longest = settings.max_model_len or _declared_length(settings.model)
        arguments |= {
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(16384, longest),
            "max_num_seqs": 256,
            "block_size": 32,
            "logits_processors": [TopP],
        }
        if not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            arguments["kv_cache_memory_bytes"] = cpu_cache_bytes()
    if settings.max_batch_size is not None:
        arguments["max_num_seqs"] = settings.max_batch_size
    return arguments | dict(settings.engine_args)


def _declared_length(model: str) -> int:
    from transformers import AutoConfig

    declared = AutoConfig.from_pretrained(model).get_text_config().to_dict()
    return int(declared.get("max_position_embeddings", 0))


def _result(output: Any) -> Result:
    """GeneratorError for what is no completion: an aborted or a failed request."""
    completion = output.outputs[0]
    ids = tuple(completion.token_ids)
    if completion.finish_reason not in ("stop", "length"):
        raise GeneratorError(f"request {output.request_id}: vLLM ended it with {completion.finish_reason!r}")
    logps = tuple(by_token[token].logprob for token, by_token in zip(ids, completion.logprobs, strict=True))
    return Result(output.request_id, ids, logps, completion.finish_reason, completion.stop_reason)
