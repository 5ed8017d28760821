"""`selfplay validate`: is a recipe right, before anything heavy is loaded?"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from selfplay.commands.options import AllowCode, Overrides
from selfplay.errors import SelfplayError
from selfplay.judges.against import check_measuring
from selfplay.judges.win_rate_scale import check_win_rate_scale
from selfplay.pool_checks import check_calibration, check_pool
from selfplay.prompts import load_pool
from selfplay.recipe import Recipe, SourceView
from selfplay.recipe_checks import check_named
from selfplay.recipe_file import load_recipe
from selfplay.recipe_prompts import HeldoutRecipe, PromptsRecipe
from selfplay.report import safe_text
from selfplay.sources import load_pools
from selfplay.trust import check_reward_models

JSON_SUFFIXES = (".jsonl", ".json")


def validate_command(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="Recipe files.", show_default=False)],
    overrides: Overrides = None,
    allow_code: AllowCode = False,
) -> None:
    """Check recipes and the files that they name. Loads no model, and without --allow-code runs no program."""
    codes = []
    for path in recipes:
        try:
            recipe = load_recipe(path, overrides or ())
            check(recipe, allow_code=allow_code)
        except SelfplayError as error:
            codes.append(error.exit_code)
            said = safe_text(str(error))
            typer.echo(said if said.startswith(str(path)) else f"{path}: {said}", err=True)
        else:
            alone = "" if recipe.has_prompts else ", without prompts: for train and what else reads files"
            typer.echo(f"{path}: ok{alone}")
    if codes:
        raise typer.Exit(codes[0])


def check(recipe: Recipe, *, allow_code: bool = False) -> None:
    """Raises RecipeError or DataError: scores that nobody gives, a file that isn't there or isn't right, a check that can't
    be run, a judge that can't be asked. With `allow_code` the programs that the recipe names are imported.
    """
    if recipe.has_prompts:
        recipe.check_judged()
    recipe.check_win_rates()
    check_named(recipe, allow_code=allow_code)
    recipe.for_each(lambda _, view: check_win_rate_scale(view))
    check_reward_models(recipe)
    check_measuring(recipe)
    recipe.for_each(lambda _, view: _check_labelled(view))
    _check_rows(recipe)


def _check_labelled(view: SourceView) -> None:
    labelled = view.audit.calibration
    if labelled is not None and Path(labelled).suffix in JSON_SUFFIXES:  # others take a library, or the network
        check_calibration(view, judge_given=not view.has_prompts)


def _check_rows(recipe: Recipe) -> None:
    """Reads the prompts, where they are files of JSON: tables and data sets take a library, and hubs the network."""
    if all(_is_json(view.prompts) for view in recipe.by_source.values()):
        pools = load_pools(recipe)
        recipe.for_each(lambda name, view: check_pool(view, pools[name]))
        return
    recipe.for_each(_check_rows_of)


def _check_rows_of(name: str, view: SourceView) -> None:
    """Reads the prompts of one source beside others that can't be read here."""
    if _is_json(view.prompts):
        check_pool(view, replace(load_pool(view.prompts, seed=view.seed), name=name))


def _is_json(prompts: PromptsRecipe) -> bool:
    held = prompts.heldout
    named = [source for source in (prompts.source, held) if isinstance(source, str)]
    return bool(named) and not isinstance(held, HeldoutRecipe) and all(Path(s).suffix in JSON_SUFFIXES for s in named)
