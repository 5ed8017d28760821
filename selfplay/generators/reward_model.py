"""A reward model: a sequence classifier of Hugging Face's with one label, from token ids to its raw logit.

Three traps of transformers' classifiers (GenericForSequenceClassification) are handled here. A row's score is that of the
last token whose id is not the pad's, so padding must use the very id that the model's config names. A config that names
none takes no batch at all. And weights without a head get a random one, with no more than a warning.

Shapes: S sequences, T tokens of the longest.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.utils import logging

from selfplay.errors import DataError, RecipeError
from selfplay.generators.engine import EngineSettings
from selfplay.generators.environment import cpu_computes_bf16

Rows = Sequence[Sequence[int]]


class RewardModelScorer:
    """Rewards in batches from the shortest sequence to the longest, so that little is padding. Where the device's memory
    runs out a batch is halved.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._device = _device(settings.device)
        model = load_reward_model(settings.model, dtype=settings.dtype, device=self._device)
        self._rewards: Rewards | None = Rewards(model.to(self._device).eval())

    def rewards(self, sequences: Sequence[tuple[int, ...]], max_batch_tokens: int) -> Iterator[tuple[int, float]]:
        waiting = batches(sequences, max_batch_tokens)
        while waiting:
            places = waiting.pop()
            try:
                found = self._forward([sequences[n] for n in places])
            except torch.OutOfMemoryError:
                if len(places) == 1:
                    raise
                found = None
            if found is None:  # outside the except block, whose traceback holds what the failed batch took
                torch.cuda.empty_cache()
                half = len(places) // 2
                waiting += [places[half:], places[:half]]
            else:
                yield from zip(places, found, strict=True)

    def close(self) -> None:
        """Lets go of the weights; the scorer can't be used any more."""
        self._rewards = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    # inference_mode covers the forward alone: around a yield it would leak into the caller.
    @torch.inference_mode()
    def _forward(self, rows: Rows) -> list[float]:
        assert self._rewards is not None, "closed"
        found: list[float] = self._rewards(rows).tolist()
        return found


class Rewards:
    """The rewards of rows of token ids, float32 (S). A row's reward depends on its neighbours by no more than rounding."""

    def __init__(self, model: Any) -> None:
        self.model = model
        model.config.use_cache = False  # a forward argument of that name is not known to every family
        self._config = model.config.get_text_config()
        self._pad_token_id: int | None = self._config.pad_token_id
        exact_head(model)

    def __call__(self, rows: Rows) -> Tensor:
        # what the model would take as the last token of a single row must be its last token in a batch, too
        pad = self._pad_token_id if self._pad_token_id is not None else _ends_no_row(rows)
        self._config.pad_token_id = pad
        longest = max(map(len, rows))
        ids_ST = torch.full((len(rows), longest), pad, dtype=torch.long)
        mask_ST = torch.zeros_like(ids_ST)
        for n, row in enumerate(rows):  # on the right: with positions from 0, whatever side the tokenizer pads
            ids_ST[n, : len(row)] = torch.tensor(row)
            mask_ST[n, : len(row)] = 1
        device = self.model.device
        logits: Tensor = self.model(input_ids=ids_ST.to(device), attention_mask=mask_ST.to(device)).logits
        return logits[:, 0].float()


def _ends_no_row(rows: Rows) -> int:
    """The smallest token id that no row ends with."""
    last = {row[-1] for row in rows}
    return next(token for token in range(len(last) + 1) if token not in last)


def exact_head(model: Any) -> None:
    """Computes the head in float32: a bfloat16 logit has 8 bits, and completions of one prompt would tie."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features == 1:
            module.float()
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def batches(sequences: Rows, max_batch_tokens: int) -> list[list[int]]:
    """Places of sequences of like length, the shortest batch last, each of at most `max_batch_tokens` with its padding, or
    of a single sequence. The order of `sequences` makes no difference to which are together.
    """
    found: list[list[int]] = []
    for place in sorted(range(len(sequences)), key=lambda n: (len(sequences[n]), tuple(sequences[n]))):
        if found and (len(found[-1]) + 1) * len(sequences[place]) <= max_batch_tokens:
            found[-1].append(place)
        else:
            found.append([place])
    return found[::-1]


def load_reward_model(folder: str, *, dtype: str, device: torch.device) -> Any:
    """The classifier at `folder`. DataError where it has more than one label, where any weight would be random, or where it
    can't be loaded without running code of its own.
    """
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if config.num_labels != 1:
            raise DataError(
                f"{folder}: its config.json says num_labels {config.num_labels}; a reward model has one label"
            )
        softcap = config.get_text_config().to_dict().get("attn_logit_softcapping")  # sdpa would ignore it
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            dtype=_dtype(dtype, config.dtype, device),
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
            **({"attn_implementation": "eager"} if softcap else {}),
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"{folder}: no reward model could be loaded from here ({error})") from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise DataError(
            f"{folder}: these weights lack {missing}, which would be random numbers, and so would every score. Name a model "
            "that was trained as a reward model (selfplay train-reward makes one)"
        )
    return model


def _device(asked: str) -> torch.device:
    if asked == "cuda" and not torch.cuda.is_available():
        raise RecipeError("judge.device is cuda, but torch sees no CUDA device here: say auto or cpu")
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")


def _dtype(asked: str, stored: torch.dtype | None, device: torch.device) -> torch.dtype:
    if asked != "auto":
        dtype: torch.dtype = torch.__dict__[asked]
        return dtype
    if device.type == "cpu" and (stored == torch.float16 or not cpu_computes_bf16()):
        return torch.float32  # emulated, both are slower than float32
    return stored or torch.float32
