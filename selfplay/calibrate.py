"""A judge against labelled preference pairs: how often does it prefer what people preferred?"""

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from selfplay.errors import RecipeError
from selfplay.labelled import calibration, labelled_group, labelled_rows
from selfplay.progress import Reporter
from selfplay.recipe import Recipe, SourceView
from selfplay.single import judge_here, text_digest


def calibrate(
    recipe: Recipe,
    pairs: str,
    out: Path | None,
    *,
    model: str | None,
    source: str | None = None,
    limit: int | None,
    name: str | None,
    split: str,
    allow_code: bool,
    report: Reporter,
) -> dict[str, Any]:
    """The figures of the recipe's judge on preference rows, the first `limit` of them; see `calibration`.

    `out` keeps the judgements, and a stopped calibration goes on from them; None keeps nothing. `model` is the policy, for a
    judge that is the policy itself; `source` says whose judge, where the recipe has several sources.
    """
    recipe = _view(recipe, source)
    found, drops = labelled_rows(pairs, recipe.prompts, name=name, split=split, limit=limit)
    groups = [labelled_group(row) for row in found]
    digest = text_digest([[r.prompt.id, r.prompt.gold, r.prompt.checks, r.chosen, r.rejected] for r in found])
    kept = tempfile.TemporaryDirectory() if out is None else nullcontext(str(out))
    with kept as folder:
        judged = judge_here(
            recipe,
            {"": groups},
            Path(folder),
            {"stage": "calibrate", "pairs": digest},
            model=model,
            round=0,
            allow_code=allow_code,
            report=report,
            trusted=True,
        )
        return {"num_dropped": len(drops)} | calibration(found, judged[""])  # they are read from that folder


def _view(recipe: Recipe, source: str | None) -> SourceView:
    """The recipe as that source has it. RecipeError where it isn't clear which one is meant."""
    views, named = recipe.by_source, recipe.sources is not None
    if (source or "") in views:
        return views[source or ""]
    there = f"the recipe's sources are {', '.join(views)}" if named else "the recipe has no sources"
    raise RecipeError(f"--source {source}: {there}" if source else f"{there}: say whose judge with --source")
