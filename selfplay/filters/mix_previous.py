"""Earlier rounds' pairs beside the new ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from selfplay.protocols import FilterContext
from selfplay.types import PreferencePair, derive_seed


@dataclass(frozen=True, slots=True)
class MixPrevious:
    """SPIN (arXiv:2401.01335, rounds 1 to 3): the newest pairs and those of the round before. Taken are the pairs that each of
    the last `window` rounds (None: of all) made itself and kept; they stand after the new ones, newest round first, and keep
    their origin_round. Their logps under the new reference are the trainer's to compute. In round 0 nothing is added.

    `weights[n]` multiplies the weight of pairs that are n + 1 rounds old; the last repeats. `share` is the largest share of
    earlier pairs in the mix: where there are more, they are drawn.
    """

    window: int | None = 1
    weights: tuple[float, ...] = (1.0,)
    share: float | None = None

    def __call__(self, pairs: Sequence[PreferencePair], context: FilterContext, /) -> list[PreferencePair]:
        """The pairs given, and earlier ones."""
        earlier: list[PreferencePair] = []
        for age, origin in enumerate(self._origins(context.round)):
            factor = self.weights[min(age, len(self.weights) - 1)]
            earlier += [replace(pair, weight=pair.weight * factor) for pair in context.previous(origin)]
        return [*pairs, *self._drawn(earlier, len(pairs), context.seed)]

    def _origins(self, round: int) -> range:
        """The rounds that `round` mixes in, the newest first."""
        return range(round - 1, (0 if self.window is None else max(0, round - self.window)) - 1, -1)

    def most_added(self, num_pairs: Sequence[int]) -> int:
        """How many pairs are added at most in the last of the rounds whose pairs are counted here."""
        num_earlier = sum(num_pairs[origin] for origin in self._origins(len(num_pairs) - 1))
        return min(num_earlier, self._room(num_pairs[-1]) if self.share is not None else num_earlier)

    def _room(self, num_new: int) -> int:
        """How many earlier pairs `share` allows beside so many new ones."""
        assert self.share is not None
        return math.floor(self.share / (1 - self.share) * num_new + 1e-9)  # 0.7 / (1 - 0.7) * 3 is a hair below 7

    def _drawn(self, earlier: list[PreferencePair], num_new: int, seed: int) -> list[PreferencePair]:
        if self.share is None:
            return earlier
        most = self._room(num_new)
        places = [
            derive_seed(seed, "mix", p.origin_round, p.prompt_id, *p.chosen_token_ids, -1, *p.rejected_token_ids)
            for p in earlier
        ]
        first = set(sorted(range(len(earlier)), key=lambda i: (places[i], i))[:most])
        return [pair for i, pair in enumerate(earlier) if i in first]
