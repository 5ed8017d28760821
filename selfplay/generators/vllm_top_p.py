"""top_p for vLLM's CPU build, which sorts the whole vocabulary for it at every token. Imported only where vLLM is installed.

vLLM applies it where it applies min_p: after the temperature and after the raw logps were taken. Shapes: S sequences of the
batch, R of them with a top_p, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from selfplay.generators.sampling import nucleus_floor

TOP_P = "selfplay_top_p"  # the key of a request's extra_args


class TopP(LogitsProcessor):  # type: ignore[misc]  # vLLM is not there for mypy
    """Cuts the requests that carry TOP_P. Ids as probable as the last one kept are kept too, where vLLM's own order of equal
    logits, of which bf16 has many, says which of them go.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._top_p: dict[int, float] = {}  # by place in the batch

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Nothing to refuse: the number was checked where the recipe was read."""

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows requests that come, go and change places; vLLM's order is removed, added, moved."""
        if batch_update is None:
            return
        for place in batch_update.removed:
            self._top_p.pop(place, None)
        for place, params, _, _ in batch_update.added:
            self._put(place, (params.extra_args or {}).get(TOP_P))
        for one, other, direction in batch_update.moved:
            moved, replaced = self._top_p.pop(one, None), self._top_p.pop(other, None)
            self._put(other, moved)
            if direction == MoveDirectionality.SWAP:
                self._put(one, replaced)

    def _put(self, place: int, top_p: float | None) -> None:
        self._top_p.pop(place, None)
        if top_p is not None:
            self._top_p[place] = top_p

    def apply(self, logits: Tensor) -> Tensor:
        """`logits` (S, V), float32; changed in place."""
        if not self._top_p:
            return logits
        everywhere = len(self._top_p) == len(logits)
        places_R = torch.tensor(sorted(self._top_p))
        rows_RV = logits if everywhere else logits[places_R]
        probs_RV = rows_RV.softmax(-1)
        floor_R = nucleus_floor(probs_RV, torch.tensor([self._top_p[n] for n in places_R.tolist()]))
        rows_RV.masked_fill_(probs_RV < floor_R[:, None], -torch.inf)
        if not everywhere:
            logits[places_R] = rows_RV
        return logits
