"""Is a reward model better than a coin? Asked before anything is sampled for it to judge.

Its accuracy is measured on the pairs that `judge.calibration` names, or was measured by `selfplay train-reward`, which leaves
it in a file beside the weights. A model whose 95 % interval is not above one half is refused: its pairs would be a coin's.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from selfplay import store
from selfplay.errors import DataError, RecipeError
from selfplay.judges.combine import Combine
from selfplay.judges.reward_model import check_reward_model
from selfplay.labelled import calibration, labelled_group
from selfplay.models import local_model
from selfplay.preferences import read_labelled
from selfplay.progress import Reporter
from selfplay.protocols import Judge, JudgeContext
from selfplay.recipe import Recipe, SourceView
from selfplay.recipe_judges import judges_in
from selfplay.recipe_prompts import PromptsRecipe
from selfplay.recipe_reward import RewardModelRecipe
from selfplay.stages import judge_groups, room_for_judge

ACCURACY = "accuracy.json"  # beside a reward model's weights


def known_accuracy(folder: Path) -> dict[str, Any] | None:
    """The held-out figures that lie beside the weights; None where there are none. DataError where they are those of other
    weights, or no such figures.
    """
    path = folder / ACCURACY
    if not path.is_file():
        return None
    try:
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        low, high = figures["accuracy_interval"]
        shares = 0 <= low <= high <= 1 and 0 <= figures["accuracy"] <= 1
        weights = figures["weights"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not what selfplay train-reward writes ({error!r}); remove it, or make it anew"
        ) from error
    if not shares:
        raise DataError(f"{path}: its accuracy or its interval are no shares; remove the file, or make it anew")
    if weights != store.weights_digest(folder):
        raise DataError(f"{path}: these figures are of other weights than those beside them; remove the file")
    return figures


def check_reward_models(recipe: Recipe) -> None:
    """What the files of a recipe's reward models say: RecipeError or DataError for one that can't be used or isn't trusted.
    A model of a hub that isn't here is left for the start of the run.
    """
    recipe.for_each(lambda _, view: _check_of_source(view))


def _check_of_source(view: SourceView) -> None:
    for key, asked in (("judge", view.judge), ("evaluate.judge", view.evaluate.judge)):
        for judge in judges_in(asked):
            if isinstance(judge, RewardModelRecipe) and (
                Path(judge.model).is_dir() or judge.model.startswith(("/", "."))
            ):
                try:
                    folder = local_model(judge.model)
                except DataError as error:
                    raise DataError(f"{key}.model: {error}") from error
                check_reward_model(judge, folder, key)
                if judge.calibration is None:
                    refuse_chance(known_accuracy(folder), judge, key, source=f"{folder / ACCURACY}")


def refuse_chance(figures: Mapping[str, Any] | None, judge: RewardModelRecipe, key: str, *, source: str) -> None:
    """RecipeError where these figures don't show that the judge beats a coin, unless the recipe allows it."""
    if figures is None or figures["accuracy_interval"][0] > 0.5 or judge.allow_chance:
        return
    raise RecipeError(
        f"{key}.model: {judge.model} is not shown to be better than a coin: accuracy {_in_words(figures)} ({source}), and "
        f"the interval does not lie above 0.5. Train it on more rows, name another judge, or say {key}.allow_chance: true"
    )


def require_trust(
    key: Literal["judge", "evaluate.judge"], recipe: SourceView, judge: Judge | None, folder: Path, report: Reporter
) -> list[dict[str, Any]]:
    """Says how good the reward models at `key` are, and returns the figures of their calibration files, each with its `model`,
    where the recipe names such files: measured now, and kept below `folder`. Nothing where there is no reward model.
    RecipeError where the figures don't show that one beats a coin.
    """
    if judge is None:
        return []
    asked = judges_in(recipe.judge if key == "judge" else recipe.evaluate.judge)
    judges = [member.judge for member in judge.members] if isinstance(judge, Combine) else [judge]
    found = [
        _require_trust(key, one, its, recipe.prompts, folder, report)
        for one, its in zip(asked, judges, strict=False)  # a judge of the user's own stands in for any number
        if isinstance(one, RewardModelRecipe)
    ]
    return [figures for figures in found if figures is not None]


def _require_trust(
    key: str, asked: RewardModelRecipe, judge: Judge, prompts: PromptsRecipe, folder: Path, report: Reporter
) -> dict[str, Any] | None:
    if asked.calibration is not None:
        figures = _measured(asked.calibration, judge, prompts, folder, report)
        report.note(f"{key}: accuracy {_in_words(figures)} on {asked.calibration}")
        refuse_chance(figures, asked, key, source=asked.calibration)
        return {"model": asked.model, **figures}
    model = local_model(asked.model, asked.model_revision)
    known = known_accuracy(model)
    if known is None:
        report.note(
            f"{key}: the accuracy of {asked.model} is unknown: there is no {ACCURACY} beside it, and {key}.calibration names "
            "no labelled pairs"
        )
    else:
        report.note(f"{key}: accuracy {_in_words(known)}, held out when it was trained")
        refuse_chance(known, asked, key, source=str(model / ACCURACY))
    return None


def _measured(source: str, judge: Judge, prompts: PromptsRecipe, folder: Path, report: Reporter) -> dict[str, Any]:
    rows, drops = read_labelled(source, prompt_column=prompts.prompt_column, system_prompt=prompts.system_prompt)
    asked = [judge.identity, [[row.prompt.id, row.chosen, row.rejected] for row in rows]]
    # a folder for each judge and each set of rows: figures of others are never taken for these
    kept = folder / "calibration" / hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    path = kept / "figures.json"
    if not path.exists():
        groups = [labelled_group(row) for row in rows]
        with room_for_judge(judge, None):
            judgements = judge_groups(judge, groups, JudgeContext(), kept / "judgements", report, "judge, calibration")
        store.write_json(path, {"pairs": source, "num_dropped": len(drops), **calibration(rows, judgements)})
    figures: dict[str, Any] = store.read_json(path)
    if figures["accuracy"] is None:
        raise DataError(f"{source}: the judge has a verdict on both completions of none of {len(rows)} pairs")
    return figures


def _in_words(figures: Mapping[str, Any]) -> str:
    low, high = figures["accuracy_interval"]
    return f"{figures['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
