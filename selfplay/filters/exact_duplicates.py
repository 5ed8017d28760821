"""The same pair twice."""

from collections.abc import Sequence

from selfplay.protocols import FilterContext
from selfplay.types import Message, PreferencePair

Texts = tuple[str, tuple[Message, ...], tuple[Message, ...]]


def texts_of(pair: PreferencePair) -> Texts:
    """What a reader sees of a pair: prompt, chosen, rejected. Other token ids may spell the same text."""
    return pair.prompt_id, pair.chosen, pair.rejected


def newest_first(pairs: Sequence[PreferencePair]) -> list[int]:
    """Indices of the pairs, the newest round's first, else in their order."""
    return sorted(range(len(pairs)), key=lambda i: (-pairs[i].origin_round, i))


class ExactDuplicates:
    """Of pairs with the same prompt and the same two texts the newest round's goes on, the first one within a round."""

    def __call__(self, pairs: Sequence[PreferencePair], context: FilterContext, /) -> list[PreferencePair]:
        """One pair of each kind, in the order given."""
        kept: dict[Texts, int] = {}
        for index in newest_first(pairs):
            kept.setdefault(texts_of(pairs[index]), index)
        return [pairs[index] for index in sorted(kept.values())]
