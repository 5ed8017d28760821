"""What the judge of a round is asked for its audit, after all real completions and in folders of its own: canaries, and the
labelled pairs that `audit.calibration` names. Nothing of it is in a group, a pair or a file that training reads.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.audit import Evidence
from selfplay.canaries import CanaryVerdict, as_sampled, make_canaries, verdicts_on
from selfplay.judges.combine import Combine
from selfplay.labelled import calibration, labelled_group, labelled_rows
from selfplay.parts import Source
from selfplay.protocols import JudgeContext
from selfplay.run import Round
from selfplay.stages import Judging, judge_beside, member_folder, read_shards, timed
from selfplay.types import Group, Judgement, derive_seed

CANARIES = "verdicts.jsonl"
LABELLED = "figures.json"


def audit_judge(
    round: Round, source: Source, groups: Sequence[Group], context: JudgeContext, judgements: Sequence[Judgement]
) -> None:
    """Asks the judge of a source, while it has the room for the real completions. Where an answer lies already, nothing."""
    show_canaries(round, source, groups, context, judgements)
    if groups:  # a round that deals a source no prompt asks its judge nothing
        judge_labelled(round, source, context)


def show_canaries(
    round: Round, source: Source, groups: Sequence[Group], context: JudgeContext, judgements: Sequence[Judgement]
) -> None:
    """The judge's verdicts on completions that must lose, in verdicts.jsonl; see canaries.py."""
    folder = round.folder / "canaries" / source.name
    if not source.num_canaries or source.judge is None or (folder / CANARIES).exists():
        return
    seed = round.seed("canaries")
    canaries = make_canaries(groups, judgements, round.run.chat, num_prompts=source.num_canaries, seed=seed)
    if not canaries:
        return
    own = replace(context, seed=derive_seed(seed, "judge"))
    with timed(round.folder, "canaries"):
        name = f"{round.label(source.name)}, judging canaries"
        asked = Judging(source.judge, [one.group for one in canaries], folder / "judgements", name)
        judged = judge_beside(asked, own, round.run.report)
        store.write_json_lines(folder / CANARIES, [asdict(verdict) for verdict in verdicts_on(canaries, judged)])


def judge_labelled(round: Round, source: Source, context: JudgeContext) -> None:
    """The figures of the judge on labelled pairs, in figures.json; see labelled.py."""
    pairs, folder = source.recipe.audit.calibration, round.folder / "calibration" / source.name
    if pairs is None or source.judge is None or (folder / LABELLED).exists():
        return
    rows, drops = labelled_rows(pairs, source.recipe.prompts)
    # a folder for these rows: a file that was changed meanwhile is judged anew
    asked = [[row.prompt.id, row.prompt.gold, row.prompt.checks, row.chosen, row.rejected] for row in rows]
    kept = folder / hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    groups = [labelled_group(row) for row in rows]
    shown = [replace(g, completions=tuple(as_sampled(c.text, round.run.chat) for c in g.completions)) for g in groups]
    own = replace(context, seed=derive_seed(round.seed("calibration"), "judge"))
    with timed(round.folder, "calibration"):
        name = f"{round.label(source.name)}, judging labelled pairs"
        judged = judge_beside(Judging(source.judge, shown, kept, name), own, round.run.report)
        store.write_json(folder / LABELLED, {"pairs": pairs, "num_dropped": len(drops), **calibration(rows, judged)})


def read_canaries(folder: Path) -> list[CanaryVerdict]:
    """What `show_canaries` left in a folder; rounds without canaries have none."""
    path = folder / CANARIES
    return [CanaryVerdict(**row) for row in store.read_json_lines(path)] if path.exists() else []


def read_evidence(round: Round, source: Source) -> Evidence:
    """What the audit of a source's judge is made of, beside its judgements."""
    path = round.folder / "calibration" / source.name / LABELLED
    labelled: dict[str, Any] | None = store.read_json(path) if path.exists() else None
    return Evidence(read_canaries(round.folder / "canaries" / source.name), labelled, read_members(round, source))


def read_members(round: Round, source: Source) -> dict[str, Sequence[Judgement]]:
    """The judgements of each of several judges, by name; nothing where a source has one judge or none."""
    if not isinstance(source.judge, Combine):
        return {}
    judged, members = round.folder / "judgements" / source.name, source.judge.members
    return {one.name: read_shards(member_folder(judged, n), Judgement) for n, one in enumerate(members)}


def asked_folders(round: Round, source: str = "") -> list[Path]:
    """Where judgements lie that a source's judge, or all of them, gave in a round."""
    return [round.folder / stage / source for stage in ("judgements", "canaries", "calibration")]
