"""The stage that makes the pairs of a round: judged groups of each source through its selector and filters."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from selfplay import store
from selfplay.errors import NoPairsError
from selfplay.filters import FilterCounts, NamedFilter, apply_filters
from selfplay.judges.contract import check_unparsed
from selfplay.pairs import Selection
from selfplay.pairs.selection import each_selected, id_number
from selfplay.protocols import FilterContext, PairSelector
from selfplay.records import Part, Records
from selfplay.scratch import scratch, write_scratch
from selfplay.sources import plain
from selfplay.types import Drop, Group, Judgement, PreferencePair


@dataclass(frozen=True, slots=True)
class Pairing:
    """What the pairs of a round are made of, or those of one source of it. `judge` is the identity of who judged."""

    selector: PairSelector
    groups: Sequence[Group]
    judgements: Sequence[Judgement] | None
    filters: Sequence[NamedFilter]
    context: FilterContext
    judge: str
    max_unparsed: float
    members: Mapping[str, Sequence[Judgement]] = field(default_factory=dict)  # of several judges, those of each by name


def make_pairs(pairings: Mapping[str, Pairing], folder: Path) -> dict[str, Selection]:
    """The pairs that a round trains on, by source, in pairs.jsonl; drops.jsonl says why prompts gave none, unusable.json counts
    completions, filters.json what each filter took in and let go.

    UnparsedGateError and NoPairsError stop the round before training; one source without a pair does not.
    """
    if (folder / "pairs.jsonl").exists():
        return read_selections(folder, {name: pairing.groups for name, pairing in pairings.items()})
    (round,) = {pairing.context.round for pairing in pairings.values()}
    with scratch(folder / "selecting") as room:
        selected = {
            name: _select(name, one, room / f"{number}-selected") for number, (name, one) in enumerate(pairings.items())
        }
        _require_pairs(selected, pairings, round)
        made = {
            name: _filter(pairings[name], one, room / f"{number}-kept")
            for number, (name, one) in enumerate(selected.items())
        }
        _require_pairs(made, pairings, round)
        store.write_records(folder / "drops.jsonl", chain.from_iterable(one.drops for one in made.values()), Drop)
        store.write_json(folder / "unusable.json", plain({name: one.unusable for name, one in made.items()}))
        filters = {name: [asdict(count) for count in one.filters] for name, one in made.items()}
        store.write_json(folder / "filters.json", plain(filters))
        pairs = chain.from_iterable(one.pairs for one in made.values())
        store.write_records(folder / "pairs.jsonl", pairs, PreferencePair)
    return read_selections(folder, {name: pairing.groups for name, pairing in pairings.items()})


def _select(name: str, pairing: Pairing, place: Path) -> Selection:
    """The pairs before filters, and why other prompts gave none, in files of that place."""
    judgements, round = pairing.judgements, pairing.context.round
    if judgements is not None:
        who = f"{pairing.judge} of source {name}" if name else pairing.judge
        check_unparsed(judgements, pairing.max_unparsed, judge_identity=who)
        for member, own in pairing.members.items():  # others, that can always be read, would hide what one lacks
            check_unparsed(own, pairing.max_unparsed, judge_identity=f"{member}, one of {who}")
    unusable: Counter[str] = Counter()
    rows = each_selected(
        pairing.selector, pairing.groups, judgements, unusable, round=round, judge=pairing.judge, source=name
    )
    pairs, drops = place / "pairs.jsonl", place / "drops.jsonl"
    write_scratch(rows, {PreferencePair: pairs, Drop: drops})
    return Selection(Records(PreferencePair, [pairs]), Records(Drop, [drops]), dict(unusable))


def _filter(pairing: Pairing, selected: Selection, place: Path) -> Selection:
    """What the filters, which look at all pairs together, leave of them. Without filters nothing is held."""
    if pairing.filters:
        pairs, lost, counts = apply_filters(pairing.filters, selected.pairs, pairing.context)
        path = place / "pairs.jsonl"
        write_scratch(pairs, {PreferencePair: path})
        selected = Selection(
            Records(PreferencePair, [path]), (*selected.drops, *lost), selected.unusable, tuple(counts)
        )
    num_own = selected.num_own_prompts(pairing.context.round)
    assert num_own + len(selected.drops) == len(pairing.groups), "every group gives pairs or a reason"
    return selected


def read_selections(folder: Path, groups: Mapping[str, Sequence[Group]]) -> dict[str, Selection]:
    """What `make_pairs` left in the folder of a round, by source; `groups` are the round's own."""
    pairs = Records(PreferencePair, [folder / "pairs.jsonl"])
    drops = Records(Drop, [folder / "drops.jsonl"])
    unusable, path = store.read_json(folder / "unusable.json"), folder / "filters.json"
    filters: Any = store.read_json(path) if path.exists() else []  # rounds from before there were filters have none
    if list(groups) == [""]:
        return {"": Selection(pairs, drops, unusable, tuple(FilterCounts(**count) for count in filters))}
    dropped = np.fromiter((id_number(drop.id) for drop in drops), "u8", len(drops))
    num_drops = {}
    for name, own in groups.items():
        ids = np.fromiter((id_number(group.prompt.id) for group in own), "u8", len(own))
        num_drops[name] = int(np.isin(dropped, ids).sum())
    num_pairs = Counter(pair.source for pair in pairs)
    found: dict[str, Selection] = {}
    pair = drop = 0
    for name in groups:  # whose rows stand in the files one after the other
        found[name] = Selection(
            Part(pairs, pair, pair + num_pairs[name]),
            Part(drops, drop, drop + num_drops[name]),
            unusable[name],
            tuple(FilterCounts(**count) for count in filters[name]),
        )
        pair, drop = pair + num_pairs[name], drop + num_drops[name]
    return found


def _require_pairs(selections: Mapping[str, Selection], pairings: Mapping[str, Pairing], round: int) -> None:
    """NoPairsError where no pair of the round itself is left: training on earlier rounds' alone is not what was asked."""
    if any(pair.origin_round == round for selection in selections.values() for pair in selection.pairs):
        return
    reasons = sorted({drop.reason for selection in selections.values() for drop in selection.drops})
    num_prompts = sum(len(pairing.groups) for pairing in pairings.values())
    raise NoPairsError(
        f"round {round}: none of {num_prompts} prompts gave a pair ({'; '.join(reasons)}). The policy is unchanged. "
        "Sample more completions, raise temperature or max_tokens, lower pairs.min_margin where there is one, or look at the "
        "judge's scores and at pairs.filters"
    )
