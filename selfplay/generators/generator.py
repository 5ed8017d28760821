"""Prompts to groups, on any engine.

    with EngineGenerator(settings, chat, isolate=True) as generator:
        groups = generator.generate(prompts, sampling)

The engine starts at the first use and everything it holds is free when the block ends.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from selfplay.chat import Chat
from selfplay.errors import GeneratorError
from selfplay.generators.engine import Engine, EngineSettings, Request, Result, check_lengths, start_engine
from selfplay.generators.isolated import EngineDiedError, IsolatedEngine
from selfplay.types import Completion, Group, Prompt, Sampling, derive_seed

Progress = Callable[[int, int], None]  # completions done, tokens done


class EngineGenerator:
    """A generator over one engine. `isolate` runs it in a process of its own: needed on a GPU, whose memory is given back
    only when a process ends. An engine killed from outside is started again, once per call.
    """

    def __init__(
        self,
        settings: EngineSettings,
        chat: Chat,
        *,
        isolate: bool = True,
        encode_gold: bool = True,
        log_path: Path | None = None,
    ) -> None:
        if settings.kind == "vllm" and not isolate:
            raise GeneratorError("the vLLM engine needs a process of its own: use isolate=True")
        self.settings = settings
        self.chat = chat
        self._isolate = isolate
        self._encode_gold = encode_gold
        self._log_path = log_path
        self._engine: Engine | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees the engine. The next use starts another."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    @property
    def engine(self) -> Engine:
        """The running engine, started where there is none."""
        if self._engine is None:
            isolated = self._isolate
            self._engine = (
                IsolatedEngine(self.settings, log_path=self._log_path) if isolated else start_engine(self.settings)
            )
        return self._engine

    @property
    def max_model_len(self) -> int:
        """The most tokens that a prompt and its completion have together. It starts the engine, which knows."""
        return self.engine.max_model_len

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, progress: Progress | None = None
    ) -> list[Group]:
        """One group per prompt, in the order of the prompts. GeneratorError where a completion is missing, unasked for or
        given twice, or where a prompt leaves no room for max_tokens.
        """
        ids = [self.chat.encode_prompt(prompt) for prompt in prompts]
        # before the engine: a template that can't do it must not cost what was sampled
        golds = [self.chat.encode_gold(prompt) if self._encode_gold else None for prompt in prompts]
        places = range(sampling.num_completions)
        results = self.complete(
            [
                Request(_request_id(prompt, k), tokens, derive_seed(sampling.seed, prompt.id, k), sampling)
                for prompt, tokens in zip(prompts, ids, strict=True)
                for k in places
            ],
            progress=progress,
        )
        groups = []
        for prompt, tokens, gold in zip(prompts, ids, golds, strict=True):
            completions = (self._completion(results[_request_id(prompt, k)], sampling) for k in places)
            groups.append(Group(prompt, tokens, tuple(completions), gold))
        return groups

    def complete(self, requests: Sequence[Request], *, progress: Progress | None = None) -> dict[str, Result]:
        """The result of each request, by its id."""
        if not requests:
            return {}
        try:
            return self._collect(requests, progress)
        except EngineDiedError:
            # All requests run again: a batch of another composition could end in other bytes.
            return self._collect(requests, progress)

    def score_labels(
        self,
        prompts: Sequence[Sequence[int]],
        label_token_ids: Sequence[int],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[float]]:
        """Logps (nats) of each label as the next token of each prompt, prompts in order. A prompt has at least one token
        and leaves room for one more. `progress` is called with the prompts that are done.
        """
        if not prompts or not label_token_ids:
            return [[] for _ in prompts]
        room = self.engine.max_model_len - 1
        for place, ids in enumerate(prompts):
            if not 0 < len(ids) <= room:
                raise GeneratorError(f"prompt {place} of {len(prompts)} has {len(ids)} tokens, not 1 to {room}")
        labels = list(dict.fromkeys(label_token_ids))
        scores: dict[int, dict[int, float]] = {}
        with self._closed_on_error():
            for place, logps in self.engine.score_labels([tuple(ids) for ids in prompts], labels):
                if place in scores or not 0 <= place < len(prompts) or len(logps) != len(labels):
                    raise GeneratorError(f"the {self.settings.kind} engine scored prompt {place} wrongly or twice")
                scores[place] = dict(zip(labels, logps, strict=True))
                if progress is not None:
                    progress(len(scores))
        if len(scores) != len(prompts):
            raise GeneratorError(f"the {self.settings.kind} engine scored {len(scores)} of {len(prompts)} prompts")
        return [[scores[place][label] for label in label_token_ids] for place in range(len(prompts))]

    def _collect(self, requests: Sequence[Request], progress: Progress | None) -> dict[str, Result]:
        wanted = {request.id: request for request in requests}
        if len(wanted) != len(requests):
            raise GeneratorError(
                f"{len(requests) - len(wanted)} requests share an id with another: prompts must differ"
            )
        results: dict[str, Result] = {}
        tokens = 0
        check_lengths(requests, self.engine.max_model_len)
        with self._closed_on_error():
            for result in self.engine.run(requests):
                self._check(result, wanted, results)
                results[result.id] = result
                tokens += len(result.token_ids)
                if progress is not None:
                    progress(len(results), tokens)
        if missing := wanted.keys() - results.keys():
            raise GeneratorError(
                f"the {self.settings.kind} engine gave no result for {len(missing)} of {len(wanted)} requests, "
                f"{min(missing)} among them"
            )
        return results

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        """Closes the engine when the block ends by an exception: its unfinished requests would surface in the next call."""
        with ExitStack() as stack:
            stack.callback(self.close)
            yield
            stack.pop_all()

    def _check(self, result: Result, wanted: dict[str, Request], results: dict[str, Result]) -> None:
        name = f"the {self.settings.kind} engine: request {result.id}"
        if result.id not in wanted:
            raise GeneratorError(f"{name} was never asked for")
        if result.id in results:
            raise GeneratorError(f"{name} has two results")
        if not 0 < len(result.token_ids) <= wanted[result.id].sampling.max_tokens:
            raise GeneratorError(f"{name} has {len(result.token_ids)} tokens")
        if len(result.logps) != len(result.token_ids) or not all(map(math.isfinite, result.logps)):
            raise GeneratorError(f"{name}: logps are missing or not finite; are the weights?")

    def _completion(self, result: Result, sampling: Sampling) -> Completion:
        return self.chat.completion(
            result.token_ids, result.logps, result.finish_reason, result.stop_reason, sampling.stop
        )


def _request_id(prompt: Prompt, k: int) -> str:
    return f"{prompt.id}/{k}"
