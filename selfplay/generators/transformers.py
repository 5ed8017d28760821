"""The transformers engine: our own sampling loop over a Hugging Face model, in this process.

A prompt is prefilled once for all its completions, a finished completion leaves the batch, and each has its own noise,
drawn on the CPU from its seed whatever the device. On a CPU the same requests in the same order give the same bytes.

Shapes: U distinct prompts of a batch, S sequences, P prompt tokens, T tokens so far, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from selfplay.adapters import load_adapter
from selfplay.errors import DataError, RecipeError
from selfplay.generators import attention
from selfplay.generators.choices import Choices
from selfplay.generators.engine import DEFAULT_BATCH_SIZE, EngineSettings, Request, Result
from selfplay.generators.environment import cpu_computes_bf16
from selfplay.generators.sampling import Sampler

UNBOUNDED_LENGTH = 2**31


@dataclass(slots=True)
class _Row:
    """A completion being drawn."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)

    def end(self, stop_token_ids: frozenset[int], stops: "_StopStrings | None") -> Result | None:
        """The result, where the last token was its last. A stop token comes before a stop string before max_tokens."""
        last = self.token_ids[-1]
        if last in stop_token_ids:
            return self._result(last)
        if stops is not None and (found := stops.find(self.token_ids, self.request.sampling.stop)) is not None:
            return self._result(found)
        return self._result(None) if len(self.token_ids) == self.request.sampling.max_tokens else None

    def _result(self, reason: int | str | None) -> Result:
        ids, logps = tuple(self.token_ids), tuple(self.logps)
        return Result(self.request.id, ids, logps, "length" if reason is None else "stop", reason)


class TransformersEngine:
    def __init__(self, settings: EngineSettings) -> None:
        if settings.tensor_parallel_size > 1:
            raise RecipeError("generator.tensor_parallel_size: the transformers generator runs on one device; use vllm")
        self._settings = settings
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        logging.disable_progress_bar()  # of loading: it would break into the bar of the stage
        try:
            config = AutoConfig.from_pretrained(settings.model)
            arguments = {
                "dtype": _dtype(settings.dtype, config.dtype, self._device),
                "attn_implementation": _attention(config),
            }
            self._model = AutoModelForCausalLM.from_pretrained(settings.model, **{**arguments, **settings.engine_args})
            if settings.adapter is not None:
                self._model = load_adapter(self._model, Path(settings.adapter), trainable=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{settings.model}: the model could not be loaded ({error})") from error
        self._model.to(self._device).eval()
        declared = config.get_text_config().to_dict()
        limit = int(declared.get("max_position_embeddings", declared.get("n_positions", UNBOUNDED_LENGTH)))
        self._max_model_len = settings.max_model_len or limit
        self._stop_token_ids = frozenset(settings.stop_token_ids)
        self._stops: _StopStrings | None = None
        self._tokenizer: Any = None  # loaded by the first request with stop strings or choices
        self._choices: dict[tuple[str, ...], Choices] = {}

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    def run(self, requests: Sequence[Request]) -> Iterator[Result]:
        """Batches from the shortest prompt to the longest, so that little is padding; results as they finish."""
        if self._tokenizer is None and any(request.sampling.stop or request.choices for request in requests):
            self._tokenizer = AutoTokenizer.from_pretrained(self._settings.model)
            self._stops = _StopStrings(self._tokenizer)
        for texts in {request.choices for request in requests} - {(), *self._choices}:
            self._choices[texts] = Choices(texts, self._spelled, self._stop_token_ids)
        for batch in _batches(requests, self._settings.max_batch_size or DEFAULT_BATCH_SIZE):
            yield from self._run_batch(batch)

    def score_labels(
        self, prompts: Sequence[tuple[int, ...]], label_token_ids: Sequence[int]
    ) -> Iterator[tuple[int, list[float]]]:
        size = self._settings.max_batch_size or DEFAULT_BATCH_SIZE
        labels = torch.tensor(list(label_token_ids), device=self._device)
        order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
        for start in range(0, len(order), size):
            places = order[start : start + size]
            logits_SV, _, _ = self._prefill([prompts[n] for n in places])
            logps_SL = logits_SV.log_softmax(-1)[:, labels]
            yield from zip(places, logps_SL.tolist(), strict=True)

    def close(self) -> None:
        """Lets go of the weights; the engine can't be used any more."""
        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _run_batch(self, batch: Sequence[Request]) -> Iterator[Result]:
        prompts = list(dict.fromkeys(request.prompt_token_ids for request in batch))
        place = {prompt: n for n, prompt in enumerate(prompts)}
        rows = [_Row(request) for request in batch]
        noise_ST = _noise(batch)
        sampler = Sampler.of([request.sampling for request in batch], self._device)
        logits_UV, cache, mask_UT = self._prefill(prompts)
        kept = torch.tensor([place[row.request.prompt_token_ids] for row in rows], device=self._device)
        mask_ST, logits_SV = mask_UT[kept], logits_UV[kept]
        cache.reorder_cache(kept)
        step = 0
        while True:
            ids_S, logps_S = sampler.draw(
                logits_SV, noise_ST[:, step].to(self._device), self._allowed(rows, logits_SV.shape[-1])
            )
            step += 1
            going = []
            for n, (row, token, logp) in enumerate(zip(rows, ids_S.tolist(), logps_S.tolist(), strict=True)):
                row.token_ids.append(token)
                row.logps.append(logp)
                if (result := row.end(self._stop_token_ids, self._stops)) is None:
                    going.append(n)
                else:
                    yield result
            if not going:
                return
            if len(going) < len(rows):
                kept = torch.tensor(going, device=self._device)
                cache.reorder_cache(kept)
                sampler, mask_ST, ids_S = sampler.select(kept), mask_ST[kept], ids_S[kept]
                rows, noise_ST = [rows[n] for n in going], noise_ST[going]
            mask_ST = torch.nn.functional.pad(mask_ST, (0, 1), value=1)
            logits_SV = self._forward(ids_S[:, None], mask_ST, cache)

    def _spelled(self, text: str) -> list[int]:
        """The ids of a text, in which nothing is a special token."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids

    def _allowed(self, rows: Sequence[_Row], vocabulary: int) -> Tensor | None:
        """What each row may draw next (SV); None where no row is bound to choices."""
        if not any(row.request.choices for row in rows):
            return None
        allowed_SV = torch.ones(len(rows), vocabulary, dtype=torch.bool)
        for row, allowed_V in zip(rows, allowed_SV, strict=True):
            if row.request.choices:
                allowed_V[:] = False
                allowed_V[self._choices[row.request.choices].after(row.token_ids)] = True
        return allowed_SV.to(self._device)

    def _prefill(self, prompts: Sequence[tuple[int, ...]]) -> tuple[Tensor, DynamicCache, Tensor]:
        """Logits after each prompt (float32, UV), the cache, and the mask (UP) of the left-padded prompts."""
        longest = max(map(len, prompts))
        ids_UP = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask_UP = torch.zeros_like(ids_UP)
        for n, prompt in enumerate(prompts):
            ids_UP[n, longest - len(prompt) :] = torch.tensor(prompt)
            mask_UP[n, longest - len(prompt) :] = 1
        cache = attention.new_cache(self._model.config)
        mask_UP = mask_UP.to(self._device)
        return self._forward(ids_UP.to(self._device), mask_UP, cache), cache, mask_UP

    # inference_mode covers the forward alone: around a yield it would leak into the caller.
    @torch.inference_mode()
    def _forward(self, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Float32 logits after the last token, one row per sequence. `mask` covers the cache and `ids`."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output: Any = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits


class _StopStrings:
    """Finds a stop string where it ends in the newest token."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def find(self, token_ids: Sequence[int], stop: tuple[str, ...]) -> str | None:
        """The stop string that ends first in the text; the first named among equals. Only the last tokens are decoded: a
        character is at most 4 of them, and an earlier stop string would have been found earlier.
        """
        if not stop:
            return None
        window = 4 * max(map(len, stop)) + 8
        text = self._tokenizer.decode(
            list(token_ids[-window:]), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        ends = [(text.index(s) + len(s), n) for n, s in enumerate(stop) if s in text]
        return stop[min(ends)[1]] if ends else None


def _attention(config: Any) -> str:
    """sdpa ignores a soft-cap on attention scores, and not every family has it."""
    softcap = config.get_text_config().to_dict().get("attn_logit_softcapping")
    return attention.register() if MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa and not softcap else "eager"


def _batches(requests: Sequence[Request], size: int) -> Iterator[list[Request]]:
    """Batches of at most `size` requests by prompt length, equal prompts side by side."""
    first: dict[tuple[int, ...], int] = {}
    for n, request in enumerate(requests):
        first.setdefault(request.prompt_token_ids, n)
    ordered = sorted(requests, key=lambda r: (len(r.prompt_token_ids), first[r.prompt_token_ids]))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _noise(batch: Sequence[Request]) -> Tensor:
    """Uniform noise on the CPU, a row per request from its own seed, a column per token it may draw."""
    longest = max(request.sampling.max_tokens for request in batch)
    noise_ST = torch.zeros(len(batch), longest, dtype=torch.float64)
    for row, request in zip(noise_ST, batch, strict=True):
        generator = torch.Generator().manual_seed(request.seed)
        count = request.sampling.max_tokens
        row[:count] = torch.rand(count, dtype=torch.float64, generator=generator)
    return noise_ST


def _dtype(asked: str, stored: torch.dtype | None, device: torch.device) -> torch.dtype:
    if asked != "auto":
        dtype = torch.__dict__.get(asked)
        if not isinstance(dtype, torch.dtype):
            raise RecipeError(f"generator.dtype: {asked!r} is no dtype; use auto, bfloat16, float16 or float32")
        return dtype
    if device.type == "cpu" and not cpu_computes_bf16():
        return torch.float32
    return torch.bfloat16 if stored in (None, torch.float32) else stored
