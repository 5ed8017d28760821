"""`selfplay validate`: is a recipe right, before anything heavy is loaded?"""

from pathlib import Path
from typing import Annotated

import typer

from selfplay.commands.options import Overrides
from selfplay.errors import DataError, RecipeError, SelfplayError
from selfplay.judges.api_key import read_key
from selfplay.judges.template import load_template
from selfplay.judges.verifier import validate_checks
from selfplay.models import local_model
from selfplay.recipe import Recipe
from selfplay.recipe_file import load_recipe
from selfplay.recipe_filters import PythonFilterRecipe
from selfplay.recipe_judges import ApiJudgeRecipe, JudgeRecipe, LLMJudgeRecipe, PythonJudgeRecipe, VerifierRecipe
from selfplay.recipe_reward import RewardModelRecipe
from selfplay.report import safe_text
from selfplay.trust import check_reward_models

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def validate_command(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="Recipe files.", show_default=False)],
    overrides: Overrides = None,
) -> None:
    """Check recipes and the files that they name. Loads no model and runs no code."""
    codes = []
    for path in recipes:
        try:
            check(load_recipe(path, overrides or ()))
        except SelfplayError as error:
            codes.append(error.exit_code)
            said = safe_text(str(error))
            typer.echo(said if said.startswith(str(path)) else f"{path}: {said}", err=True)
        else:
            typer.echo(f"{path}: ok")
    if codes:
        raise typer.Exit(codes[0])


def check(recipe: Recipe) -> None:
    """Raises RecipeError or DataError: scores that nobody gives, a file that isn't there, a check that can't be run."""
    recipe.check_judged()
    recipe.check_win_rates()
    _check_model("model", recipe.model)
    if recipe.train.reference_path is not None:
        _check_model("train.reference", recipe.train.reference_path)
    for key, source in (("prompts.source", recipe.prompts.source), ("prompts.heldout", recipe.prompts.heldout)):
        if isinstance(source, str):
            _check_source(key, source)
    for key, judge in (("judge", recipe.judge), ("evaluate.judge", recipe.evaluate.judge)):
        if judge is not None:
            _check_judge(key, judge)
    check_reward_models(recipe)
    for index, one in enumerate(recipe.pairs.filters):
        if isinstance(one, PythonFilterRecipe):
            _check_target(f"pairs.filters.{index}", one.target)


def _check_model(key: str, model: str) -> None:
    # a hub id is looked up when the run starts: that needs the network
    if Path(model).is_dir() or model.startswith(("/", ".")):
        try:
            local_model(model)
        except DataError as error:
            raise DataError(f"{key}: {error}") from error


def _check_source(key: str, source: str) -> None:
    path = Path(source)
    if (path.suffix in DATA_SUFFIXES or source.startswith(("/", "."))) and not path.is_file():
        raise DataError(f"{key}: {source}: no such file")


def _check_judge(key: str, judge: JudgeRecipe) -> None:
    if isinstance(judge, VerifierRecipe):
        validate_checks(judge.checks, f"{key}.checks")
    elif isinstance(judge, LLMJudgeRecipe):
        load_template(judge.template, Path())
        if judge.model != "policy":
            _check_model(f"{key}.model", judge.model)
    elif isinstance(judge, ApiJudgeRecipe):
        load_template(judge.template, Path())
        read_key(judge)
    elif isinstance(judge, PythonJudgeRecipe):
        _check_target(key, judge.target)
    elif isinstance(judge, RewardModelRecipe) and judge.calibration is not None:
        _check_source(f"{key}.calibration", judge.calibration)


def _check_target(key: str, target: str) -> None:
    file = target.partition(":")[0]
    if file.endswith(".py") and not Path(file).is_file():
        raise RecipeError(f"{key}.target: {file}: no such file")
