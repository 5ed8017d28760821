"""A over B in one pair and B over A in another."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from selfplay.filters.exact_duplicates import texts_of
from selfplay.protocols import FilterContext
from selfplay.types import PreferencePair


@dataclass(frozen=True, slots=True)
class Contradictions:
    """Drops pairs of one prompt that contradict another one: the same two texts the other way round, in this round or in one
    that was mixed in. `keep="newest"` keeps those of the newest round that holds the two texts, unless that round contradicts
    itself. Only direct contradictions count: A over B, B over C, C over A stays.
    """

    keep: Literal["none", "newest"] = "none"

    def __call__(self, pairs: Sequence[PreferencePair], context: FilterContext, /) -> list[PreferencePair]:
        """The pairs that nothing contradicts, in the order given."""
        rounds: defaultdict[object, set[int]] = defaultdict(set)
        for pair in pairs:
            rounds[texts_of(pair)].add(pair.origin_round)
        kept = []
        for pair in pairs:
            id, chosen, rejected = texts_of(pair)
            against = rounds.get((id, rejected, chosen))
            if against is None or (self.keep == "newest" and pair.origin_round > max(against)):
                kept.append(pair)
        return kept
