"""The stage that makes the pairs of a round: judged groups of each source through its selector and filters."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.errors import NoPairsError
from selfplay.filters import FilterCounts, NamedFilter, apply_filters
from selfplay.judges.contract import check_unparsed
from selfplay.pairs import Selection, select_pairs
from selfplay.protocols import FilterContext, PairSelector
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


def make_pairs(pairings: Mapping[str, Pairing], folder: Path) -> dict[str, Selection]:
    """The pairs that a round trains on, by source, in pairs.jsonl; drops.jsonl says why prompts gave none, unusable.json counts
    completions, filters.json what each filter took in and let go.

    UnparsedGateError and NoPairsError stop the round before training; one source without a pair does not.
    """
    if (folder / "pairs.jsonl").exists():
        return read_selections(folder, {name: pairing.groups for name, pairing in pairings.items()})
    selected = {name: _select(name, pairing) for name, pairing in pairings.items()}
    (round,) = {pairing.context.round for pairing in pairings.values()}
    _require_pairs(selected, pairings, round)
    selections = {name: _filter(pairings[name], selection) for name, selection in selected.items()}
    _require_pairs(selections, pairings, round)
    made = selections.values()
    store.write_records(folder / "drops.jsonl", [drop for one in made for drop in one.drops], Drop)
    store.write_json(folder / "unusable.json", plain({name: one.unusable for name, one in selections.items()}))
    filters = {name: [asdict(count) for count in one.filters] for name, one in selections.items()}
    store.write_json(folder / "filters.json", plain(filters))
    store.write_records(folder / "pairs.jsonl", [pair for one in made for pair in one.pairs], PreferencePair)
    return selections


def _select(name: str, pairing: Pairing) -> Selection:
    judgements, round = pairing.judgements, pairing.context.round
    if judgements is not None:
        who = f"{pairing.judge} of source {name}" if name else pairing.judge
        check_unparsed(judgements, pairing.max_unparsed, judge_identity=who)
    return select_pairs(pairing.selector, pairing.groups, judgements, round=round, judge=pairing.judge, source=name)


def _filter(pairing: Pairing, selected: Selection) -> Selection:
    pairs, lost, counts = apply_filters(pairing.filters, selected.pairs, pairing.context)
    found = Selection(tuple(pairs), (*selected.drops, *lost), selected.unusable, tuple(counts))
    own = found.own_prompts(pairing.context.round)
    assert len(own) + len(found.drops) == len(pairing.groups), "every group gives pairs or a reason"
    return found


def read_selections(folder: Path, groups: Mapping[str, Sequence[Group]]) -> dict[str, Selection]:
    """What `make_pairs` left in the folder of a round, by source; `groups` are the round's own."""
    pairs = store.read_records(folder / "pairs.jsonl", PreferencePair)
    drops = store.read_records(folder / "drops.jsonl", Drop)
    unusable, path = store.read_json(folder / "unusable.json"), folder / "filters.json"
    filters: Any = store.read_json(path) if path.exists() else []  # rounds from before there were filters have none
    if list(groups) == [""]:
        unusable, filters = {"": unusable}, {"": filters}
    found = {}
    for name, own in groups.items():
        ids = {group.prompt.id for group in own}
        found[name] = Selection(
            tuple(pair for pair in pairs if pair.source == name),
            tuple(drop for drop in drops if drop.id in ids),
            unusable[name],
            tuple(FilterCounts(**count) for count in filters[name]),
        )
    return found


def _require_pairs(selections: Mapping[str, Selection], pairings: Mapping[str, Pairing], round: int) -> None:
    """NoPairsError where no pair of the round itself is left: training on earlier rounds' alone is not what was asked."""
    if any(selection.own_prompts(round) for selection in selections.values()):
        return
    reasons = sorted({drop.reason for selection in selections.values() for drop in selection.drops})
    num_prompts = sum(len(pairing.groups) for pairing in pairings.values())
    raise NoPairsError(
        f"round {round}: none of {num_prompts} prompts gave a pair ({'; '.join(reasons)}). The policy is unchanged. "
        "Sample more completions, raise temperature or max_tokens, or look at the judge's scores and at pairs.filters"
    )
