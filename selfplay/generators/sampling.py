"""Drawing one token per sequence from logits.

Shapes: S sequences, V vocabulary. All rows are independent of each other, so what a request draws depends on its own
logits and its own noise alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfplay.types import Sampling

NUCLEUS = 256  # ids that are put in order first: at top_p 0.9 more than a trained model's nucleus nearly always


@dataclass(frozen=True, slots=True)
class Sampler:
    """The sampling of S sequences as tensors. `temperature_S` is 0 for greedy ones; top_k 0 and top_p 1 keep everything."""

    temperature_S: Tensor
    top_k_S: Tensor
    top_p_S: Tensor
    min_p_S: Tensor

    @classmethod
    def of(cls, samplings: Sequence[Sampling], device: torch.device) -> "Sampler":
        def floats(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        return cls(
            floats([s.temperature for s in samplings]),
            torch.tensor([s.top_k for s in samplings], dtype=torch.long, device=device),
            floats([s.top_p for s in samplings]),
            floats([s.min_p for s in samplings]),
        )

    def select(self, rows: Tensor) -> "Sampler":
        """The sampler of these rows (a tensor of places)."""
        return Sampler(self.temperature_S[rows], self.top_k_S[rows], self.top_p_S[rows], self.min_p_S[rows])

    def draw(self, logits_SV: Tensor, noise_S: Tensor, allowed_SV: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The drawn ids and their logps (nats) under the raw distribution at temperature 1.

        `logits_SV` is float32. `noise_S` is uniform on [0, 1): the id is where the cumulative probability passes it. Only
        ids that `allowed_SV` (bool) allows are drawn; None allows all.
        """
        greedy_S = self.temperature_S == 0
        open_SV = logits_SV if allowed_SV is None else logits_SV.masked_fill(~allowed_SV, -torch.inf)
        ids_S = open_SV.argmax(-1)
        if not bool(greedy_S.all()):
            scaled_SV = open_SV / torch.where(greedy_S, 1.0, self.temperature_S)[:, None]
            drawn_S = _invert(self._truncate(scaled_SV.softmax(-1)), noise_S)
            ids_S = torch.where(greedy_S, ids_S, drawn_S)
        logps_S = logits_SV.gather(1, ids_S[:, None])[:, 0] - logits_SV.logsumexp(-1)
        return ids_S, logps_S

    def _truncate(self, probs_SV: Tensor) -> Tensor:
        """Probabilities with the cut ones at 0, not normalised: min_p first, then top_k, then top_p of what is left. Ids as
        probable as the last one kept are kept too.
        """
        if bool((self.min_p_S > 0).any()):
            floor_S = self.min_p_S * probs_SV.amax(-1)
            probs_SV = torch.where(probs_SV < floor_S[:, None], 0.0, probs_SV)
        vocabulary = probs_SV.shape[-1]
        kept_S = torch.where(self.top_k_S <= 0, vocabulary, self.top_k_S).clamp(max=vocabulary)
        if bool((kept_S < vocabulary).any()):
            limited_S = kept_S < vocabulary
            most = int(kept_S[limited_S].max())
            largest_SK = probs_SV.topk(most, dim=-1).values
            floor_S = largest_SK.gather(1, (kept_S.clamp(max=most) - 1)[:, None])[:, 0]
            probs_SV = torch.where(limited_S[:, None] & (probs_SV < floor_S[:, None]), 0.0, probs_SV)
        if bool((self.top_p_S < 1).any()):
            cut_SV = probs_SV < nucleus_floor(probs_SV, self.top_p_S)[:, None]
            probs_SV = torch.where(cut_SV, 0.0, probs_SV)
        return probs_SV


def nucleus_floor(probs_SV: Tensor, top_p_S: Tensor) -> Tensor:
    """The least probability that top_p keeps in each row: that of the last id before which, in falling order, less than
    top_p of the row's mass lies. 0 where top_p is 1. Shape (S,); `probs_SV` need not be normalised.

    Only the largest ones are put in order, and more of them where a row is flat: sorting 49,152 of each row took 40 % of a
    decoding step on a CPU.
    """
    vocabulary = probs_SV.shape[-1]
    wanted_S = top_p_S * probs_SV.sum(-1)
    kept = min(NUCLEUS, vocabulary)
    while True:
        largest_SK = probs_SV.topk(kept, dim=-1).values
        mass_SK = largest_SK.cumsum(-1)
        if kept == vocabulary or bool(((mass_SK[:, -1] >= wanted_S) | (top_p_S >= 1)).all()):
            break
        kept = min(8 * kept, vocabulary)
    inside_SK = mass_SK - largest_SK < wanted_S[:, None]
    return torch.where(top_p_S < 1, torch.where(inside_SK, largest_SK, torch.inf).amin(-1), 0.0)


def _invert(probs_SV: Tensor, noise_S: Tensor) -> Tensor:
    """The first id whose cumulative share of the mass is above the noise; never one of probability 0."""
    cumulative_SV = probs_SV.cumsum(-1)
    total_S = cumulative_SV[:, -1]
    below_S = torch.nextafter(total_S, torch.zeros_like(total_S))  # rounding could reach the total itself
    target_S = torch.minimum((noise_S * total_S).to(total_S.dtype), below_S)
    return torch.searchsorted(cumulative_SV, target_S[:, None], right=True)[:, 0]
