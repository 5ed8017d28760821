"""Weights under which chosen completions are as long as rejected ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from selfplay.protocols import FilterContext
from selfplay.types import PreferencePair


@dataclass(frozen=True, slots=True)
class BalanceLength:
    """Takes the mean difference in length out of a round: pairs whose chosen completion is the longer one, or those whose is
    the shorter one, whichever outweigh, get a smaller weight, one factor for all, so that the weighted sum of
    len(chosen) - len(rejected), in tokens, is 0. No pair is dropped, and which lengths suit which prompt is still learned.

    Length is the easiest thing that DPO finds in pairs, and it finds it in noise: among 100 pairs drawn by a coin the chosen
    completions are easily 4 tokens shorter on average, and the policy follows. Where all differences point to one side
    nothing can balance them, and the weights stay.
    """

    def __call__(self, pairs: Sequence[PreferencePair], context: FilterContext, /) -> list[PreferencePair]:
        """All pairs in the order given, some with a smaller weight."""
        # fsum: the order of the pairs changes nothing
        longer = math.fsum(pair.weight * _difference(pair) for pair in pairs if _difference(pair) > 0)
        shorter = -math.fsum(pair.weight * _difference(pair) for pair in pairs if _difference(pair) < 0)
        if not longer or not shorter:
            return list(pairs)
        factor = min(longer, shorter) / max(longer, shorter)
        side = 1 if longer > shorter else -1
        return [replace(p, weight=p.weight * factor) if side * _difference(p) > 0 else p for p in pairs]


def _difference(pair: PreferencePair) -> int:
    return len(pair.chosen_token_ids) - len(pair.rejected_token_ids)
