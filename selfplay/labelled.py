"""How often does a judge prefer what people preferred? Figures of its judgements of labelled pairs."""

from collections.abc import Mapping, Sequence
from typing import Any

from selfplay.agreement import wilson_interval
from selfplay.preferences import Labelled, read_labelled
from selfplay.recipe_prompts import PromptsRecipe
from selfplay.types import Completion, Drop, Group, Judgement, derive_seed


def labelled_rows(
    source: str, columns: PromptsRecipe, *, name: str | None = None, split: str = "train", limit: int | None = None
) -> tuple[tuple[Labelled, ...], tuple[Drop, ...]]:
    """The first `limit` rows of labelled pairs, in the columns that a recipe's prompts have. Errors as `read_labelled`."""
    return read_labelled(
        source,
        name=name,
        split=split,
        prompt_column=columns.prompt_column,
        gold_column=columns.gold_column,
        checks_column=columns.checks_column,
        system_prompt=columns.system_prompt,
        limit=limit,
    )


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
    nothing has 0.5; see `accuracy_by_prompt`. `longer_accuracy` is that of preferring the longer text, in characters.
    `swap_consistency` is None for a judge that isn't pairwise.
    """
    right = [_right(row, judgement) for row, judgement in zip(rows, judgements, strict=True)]
    known = [value for value in right if value is not None]
    ids = [row.prompt.id for row in rows]
    longer = [preference(len(row.chosen), len(row.rejected)) for row in rows]
    compared = sum(judgement.num_compared for judgement in judgements)
    accuracy, interval = accuracy_by_prompt(ids, right)
    longer_accuracy, longer_interval = accuracy_by_prompt(ids, longer)
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


def labelled_alarms(figures: Mapping[str, Any] | None) -> list[str]:
    """What is wrong with the figures of labelled pairs: a sentence where they don't show that the judge beats chance."""
    if figures is None:
        return []
    (low, high), count = (
        figures["accuracy_interval"],
        f"{figures['num_judged']} of {figures['num_pairs']} labelled pairs",
    )
    if figures["accuracy"] is None:
        return [f"the judge has a verdict on both completions of {count}: its accuracy is not known"]
    if low > 0.5:
        return []
    known = (
        "is below chance, 0.5: it prefers what was rejected"
        if high < 0.5
        else "is not shown to be better than chance, 0.5"
    )
    return [f"the judge's accuracy on {count}, {figures['accuracy']:.3f} [{low:.3f}, {high:.3f}], {known}"]


def _right(row: Labelled, judgement: Judgement) -> float | None:
    place = chosen_place(row)
    chosen, rejected = judgement.scores[place], judgement.scores[1 - place]
    return None if chosen is None or rejected is None else preference(chosen, rejected)


def preference(chosen: float, rejected: float) -> float:
    """1 where chosen is higher, 0 where it is lower, 0.5 for a tie."""
    return (chosen > rejected) + 0.5 * (chosen == rejected)


def accuracy_by_prompt(prompt_ids: Sequence[str], right: Sequence[float | None]) -> tuple[float | None, list[float]]:
    """The mean over prompts of the mean over each one's known pairs, None without any, and Wilson's 95 % interval with the
    number of prompts as the count: pairs of one prompt share completions, and are no independent trials.
    """
    shares: dict[str, list[float]] = {}
    for id, value in zip(prompt_ids, right, strict=True):
        if value is not None:
            shares.setdefault(id, []).append(value)
    total = sum(sum(values) / len(values) for values in shares.values())
    return (total / len(shares) if shares else None), list(wilson_interval(total, len(shares)))
