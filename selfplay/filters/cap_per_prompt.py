"""At most so many pairs of one prompt."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from selfplay.filters.exact_duplicates import newest_first
from selfplay.protocols import FilterContext
from selfplay.types import PreferencePair


@dataclass(frozen=True, slots=True)
class CapPerPrompt:
    """Keeps `max_pairs` pairs of each prompt: the newest round's first, and within a round those that the selector named
    first. After mix_previous the cap holds over all rounds together.
    """

    max_pairs: int

    def __call__(self, pairs: Sequence[PreferencePair], context: FilterContext, /) -> list[PreferencePair]:
        """At most max_pairs pairs of each prompt, in the order given."""
        count: Counter[str] = Counter()
        kept = []
        for index in newest_first(pairs):
            count[pairs[index].prompt_id] += 1
            if count[pairs[index].prompt_id] <= self.max_pairs:
                kept.append(index)
        return [pairs[index] for index in sorted(kept)]
