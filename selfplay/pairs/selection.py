"""All groups of a round through a selector, with every row accounted for."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, repeat
from typing import Protocol, runtime_checkable

import numpy as np

from selfplay.errors import SelfplayError
from selfplay.filters import FilterCounts
from selfplay.pairs.eligible import unusable_reason
from selfplay.protocols import PairSelector
from selfplay.types import Drop, Group, Judgement, PreferencePair


@dataclass(frozen=True)
class Selection:
    """The pairs of a round after its filters, why prompts gave none, how many completions could not be used, by reason, and
    what each filter did. Pairs and drops may be read from disk at each pass.
    """

    pairs: Sequence[PreferencePair]
    drops: Sequence[Drop]
    unusable: dict[str, int] = field(default_factory=dict)
    filters: tuple[FilterCounts, ...] = ()

    @property
    def num_selected(self) -> int:
        """Pairs before filters."""
        return self.filters[0].num_in if self.filters else len(self.pairs)

    @cached_property
    def _numbers(self) -> tuple[int, dict[int, tuple[int, int]]]:
        """The prompts that have a pair, and by the round that pairs stem from: (pairs, prompts that have one)."""
        pairs: Counter[int] = Counter()
        ids: dict[int, array[int]] = {}
        for pair in self.pairs:
            pairs[pair.origin_round] += 1
            found, id = ids.setdefault(pair.origin_round, array("Q")), id_number(pair.prompt_id)
            if not found or found[-1] != id:  # the pairs of a prompt mostly stand together
                found.append(id)
        prompts = {round: _num_distinct(found) for round, found in ids.items()}
        num_prompts = sum(prompts.values())
        if len(ids) > 1:
            num_prompts = _num_distinct(array("Q", chain.from_iterable(ids.values())))
        return num_prompts, {round: (pairs[round], count) for round, count in prompts.items()}

    @property
    def num_prompts(self) -> int:
        """The prompts that have a pair."""
        return self._numbers[0]

    def num_own_prompts(self, round: int) -> int:
        """Those of them that have one made in `round`; earlier rounds' pairs may stand beside its own."""
        return self._numbers[1].get(round, (0, 0))[1]

    def num_before(self, round: int) -> int:
        """The pairs of earlier rounds."""
        return sum(pairs for origin, (pairs, _) in self._numbers[1].items() if origin < round)


def _num_distinct(numbers: "array[int]") -> int:
    """How many different ones there are. It sorts them where they are: a copy would be as large again."""
    found = np.frombuffer(numbers, "u8")
    found.sort()
    return len(found) and 1 + int(np.count_nonzero(found[1:] != found[:-1]))


def id_number(id: str) -> int:
    """8 bytes for an id, which are others for another one: a million ids as text take 100 MB."""
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "big")


@runtime_checkable
class _TreatsTruncated(Protocol):
    """A selector that says what becomes of completions that max_tokens cut; without a word they enter no pair."""

    @property
    def truncated(self) -> str: ...


@runtime_checkable
class _SaysWhy(Protocol):
    """A selector that can tell why a group with usable completions gave no pair."""

    def why_none(self, group: Group, judgement: Judgement | None) -> str: ...


def select_pairs(
    selector: PairSelector,
    groups: Sequence[Group],
    judgements: Sequence[Judgement] | None,
    *,
    round: int = 0,
    judge: str = "",
    source: str = "",
) -> Selection:
    """All pairs of a round, or of one source of it; every group gives pairs or a drop with its reason.

    SelfplayError where a selector pairs what does not belong together.
    """
    unusable: Counter[str] = Counter()
    found = list(each_selected(selector, groups, judgements, unusable, round=round, judge=judge, source=source))
    drops = tuple(row for row in found if isinstance(row, Drop))
    return Selection(tuple(row for row in found if not isinstance(row, Drop)), drops, dict(unusable))


def each_selected(
    selector: PairSelector,
    groups: Sequence[Group],
    judgements: Sequence[Judgement] | None,
    unusable: Counter[str],
    *,
    round: int,
    judge: str,
    source: str,
) -> Iterator[PreferencePair | Drop]:
    """The same row by row, a group at a time. `unusable` counts completions by the reason that keeps them out of pairs."""
    keep = isinstance(selector, _TreatsTruncated) and selector.truncated != "drop"
    judged: Iterable[Judgement | None] = repeat(None, len(groups)) if judgements is None else judgements
    for group, judgement in zip(groups, judged, strict=True):
        assert judgement is None or judgement.prompt_id == group.prompt.id
        reasons = [unusable_reason(group, i, judgement, keep_truncated=keep) for i in range(len(group.completions))]
        found = [_checked(pair, group, judgement) for pair in selector.select(group, judgement)]
        unusable.update(reason for reason in reasons if reason is not None)
        yield from (replace(pair, origin_round=round, judge=judge, source=source) for pair in found)
        if not found:
            yield Drop(group.prompt.id, _why_none(selector, group, judgement, reasons), group.prompt.source)


def _why_none(selector: PairSelector, group: Group, judgement: Judgement | None, reasons: list[str | None]) -> str:
    num_usable = reasons.count(None)
    if num_usable and isinstance(selector, _SaysWhy):
        return selector.why_none(group, judgement)
    few = num_usable < (1 if judgement is None else 2)
    return "too few usable completions" if few else "tie, or margin below min_margin"


def _checked(pair: PreferencePair, group: Group, judgement: Judgement | None) -> PreferencePair:
    where = f"the pair selector, prompt {group.prompt.id}"
    if pair.prompt_id != group.prompt.id or pair.prompt_token_ids != group.prompt_token_ids:
        raise SelfplayError(
            f"the pair selector returned a pair of prompt {pair.prompt_id} for prompt {group.prompt.id}"
        )
    if pair.chosen == pair.rejected or pair.chosen_token_ids == pair.rejected_token_ids:
        raise SelfplayError(f"{where}: returned equal chosen and rejected completions")
    if pair.margin is not None and pair.margin < 0:
        raise SelfplayError(f"{where}: chose the lower-scored completion")
    for index in (pair.chosen_index, pair.rejected_index):
        if judgement is not None and index is not None and judgement.scores[index] is None:
            raise SelfplayError(f"{where}: paired completion {index}, which has no verdict")
    return pair
