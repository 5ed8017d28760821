"""A judge against labelled preference pairs: how often does it prefer what people preferred?"""

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from selfplay.agreement import wilson_interval
from selfplay.preferences import Labelled, read_labelled
from selfplay.progress import Reporter
from selfplay.recipe import Recipe
from selfplay.single import judge_here, text_digest
from selfplay.types import Completion, Group, Judgement, derive_seed


def calibrate(
    recipe: Recipe,
    pairs: str,
    out: Path | None,
    *,
    model: str | None,
    limit: int | None,
    name: str | None,
    split: str,
    allow_code: bool,
    report: Reporter,
) -> dict[str, Any]:
    """The figures of the recipe's judge on preference rows, the first `limit` of them; see `calibration`.

    `out` keeps the judgements, and a stopped calibration goes on from them; None keeps nothing. `model` is the policy, for a
    judge that is the policy itself.
    """
    columns = recipe.prompts
    found, drops = read_labelled(
        pairs,
        name=name,
        split=split,
        prompt_column=columns.prompt_column,
        gold_column=columns.gold_column,
        checks_column=columns.checks_column,
        system_prompt=columns.system_prompt,
        limit=limit,
    )
    groups = [labelled_group(row) for row in found]
    digest = text_digest([[row.prompt.id, row.prompt.gold, row.chosen, row.rejected] for row in found])
    kept = tempfile.TemporaryDirectory() if out is None else nullcontext(str(out))
    with kept as folder:
        judgements = judge_here(
            recipe,
            groups,
            Path(folder),
            {"stage": "calibrate", "pairs": digest},
            model=model,
            round=0,
            allow_code=allow_code,
            report=report,
        )
    return {"num_dropped": len(drops)} | calibration(found, judgements)


def chosen_place(row: Labelled) -> int:
    """Where the chosen completion stands in its group, 0 or 1: by a hash, so that the place tells the judge nothing."""
    return derive_seed("calibrate", row.prompt.id, row.chosen, row.rejected) % 2


def labelled_group(row: Labelled) -> Group:
    """The two completions of a row as a group."""
    texts = (row.chosen, row.rejected) if chosen_place(row) == 0 else (row.rejected, row.chosen)
    return Group(row.prompt, (), tuple(Completion(text) for text in texts))


def calibration(rows: Sequence[Labelled], judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Figures of the judgements of labelled groups.

    `accuracy` is over the pairs where both completions have a verdict, a tie counting half, so that a judge who knows
    nothing has 0.5; its interval is Wilson's, 95 %. `longer_accuracy` is that of preferring the longer text, in characters.
    `swap_consistency` is None for a judge that isn't pairwise.
    """
    right = [_right(row, judgement) for row, judgement in zip(rows, judgements, strict=True)]
    known = [value for value in right if value is not None]
    longer = [_share(len(row.chosen), len(row.rejected)) for row in rows]
    compared = sum(judgement.num_compared for judgement in judgements)
    accuracy, interval = _accuracy(known)
    longer_accuracy, longer_interval = _accuracy(longer)
    return {
        "num_pairs": len(rows),
        "num_judged": len(known),
        "accuracy": accuracy,
        "accuracy_interval": interval,
        "includes_chance": interval[0] <= 0.5 <= interval[1],
        "swap_consistency": 1 - sum(j.num_flipped for j in judgements) / compared if compared else None,
        "tie_rate": known.count(0.5) / len(known) if known else None,
        "unparsed_rate": 1 - len(known) / len(rows),
        "longer_accuracy": longer_accuracy,
        "longer_interval": longer_interval,
    }


def _right(row: Labelled, judgement: Judgement) -> float | None:
    place = chosen_place(row)
    chosen, rejected = judgement.scores[place], judgement.scores[1 - place]
    return None if chosen is None or rejected is None else _share(chosen, rejected)


def _share(chosen: float, rejected: float) -> float:
    """1 where chosen is higher, 0 where it is lower, 0.5 for a tie."""
    return (chosen > rejected) + 0.5 * (chosen == rejected)


def _accuracy(values: Sequence[float]) -> tuple[float | None, list[float]]:
    return (sum(values) / len(values) if values else None), list(wilson_interval(sum(values), len(values)))
