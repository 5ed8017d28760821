"""Runs filters one after the other, with every row accounted for."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from selfplay.errors import SelfplayError
from selfplay.judges.contract import Blamed
from selfplay.protocols import FilterContext, PairFilter
from selfplay.types import Drop, PreferencePair

Key = tuple[int, str, tuple[int, ...], tuple[int, ...], int | None, int | None]


@dataclass(frozen=True, slots=True)
class NamedFilter:
    """A filter under the name that counts and drops are shown with."""

    name: str
    filter: PairFilter


@dataclass(frozen=True, slots=True)
class FilterCounts:
    """Pairs through one filter: num_in + num_added = num_out + num_dropped. Those added are of earlier rounds."""

    filter: str
    num_in: int
    num_added: int
    num_dropped: int
    num_out: int


def key_of(pair: PreferencePair) -> Key:
    """What makes a pair this pair, whatever its weight."""
    ids = pair.chosen_token_ids, pair.rejected_token_ids
    return (pair.origin_round, pair.prompt_id, *ids, pair.chosen_index, pair.rejected_index)


def apply_filters(
    filters: Sequence[NamedFilter], pairs: Sequence[PreferencePair], context: FilterContext
) -> tuple[list[PreferencePair], list[Drop], list[FilterCounts]]:
    """What goes on to training; a drop for every prompt of this round that lost its last pair, naming the filter; the counts.

    SelfplayError where a filter returns what it was neither given nor could find in an earlier round.
    """
    drops: list[Drop] = []
    counts: list[FilterCounts] = []
    kept = list(pairs)
    for one in filters:
        before = kept
        with Blamed(f"filter {one.name} raised", SelfplayError):
            found = list(one.filter(tuple(before), context))
        if not all(isinstance(pair, PreferencePair) for pair in found):
            raise SelfplayError(f"filter {one.name}: returned something that is no PreferencePair")
        added = Counter(map(key_of, found)) - Counter(map(key_of, before))
        dropped = Counter(map(key_of, before)) - Counter(map(key_of, found))
        _check_added(one.name, added, context)
        counts.append(FilterCounts(one.name, len(before), added.total(), dropped.total(), len(found)))
        lost = _own_prompts(before, context.round).keys() - _own_prompts(found, context.round).keys()
        drops += [Drop(id, f"filter {one.name}") for id in _own_prompts(before, context.round) if id in lost]
        kept = found
    return kept, drops, counts


def _own_prompts(pairs: Sequence[PreferencePair], round: int) -> dict[str, None]:
    return dict.fromkeys(pair.prompt_id for pair in pairs if pair.origin_round == round)


def _check_added(name: str, added: Counter[Key], context: FilterContext) -> None:
    known: dict[int, Counter[Key]] = {}
    for key, count in added.items():
        origin = key[0]
        if 0 <= origin < context.round and origin not in known:
            known[origin] = Counter(map(key_of, context.previous(origin)))
        if count > known.get(origin, Counter())[key]:
            raise SelfplayError(
                f"the filter {name} returned a pair of prompt {key[1]} (origin_round {origin}) that it was not given and "
                "that no earlier round holds, or holds once only. Return pairs that were passed in, or that "
                "context.previous(round) gave"
            )
