"""`selfplay validate`: is a recipe right, before anything heavy is loaded?"""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from selfplay.commands.options import AllowCode, Overrides
from selfplay.data_rows import FILE_SUFFIXES
from selfplay.errors import DataError, RecipeError, SelfplayError
from selfplay.filters import load_programs
from selfplay.judges.against import check_measuring
from selfplay.judges.api_key import read_key
from selfplay.judges.python import load_python_judge
from selfplay.judges.questions import Questions, check_asked
from selfplay.judges.template import load_template
from selfplay.judges.verifier import validate_checks
from selfplay.judges.win_rate_scale import check_win_rate_scale
from selfplay.models import local_model
from selfplay.pool_checks import check_calibration, check_pool
from selfplay.prompts import load_pool
from selfplay.recipe import Recipe, SourceView
from selfplay.recipe_file import load_recipe
from selfplay.recipe_filters import PythonFilterRecipe
from selfplay.recipe_judges import (
    ApiJudgeRecipe,
    LLMJudgeRecipe,
    OneJudge,
    PythonJudgeRecipe,
    SimilarityRecipe,
    VerifierRecipe,
    judges_in,
)
from selfplay.recipe_prompts import HeldoutRecipe, PromptsRecipe
from selfplay.recipe_reward import RewardModelRecipe
from selfplay.report import safe_text
from selfplay.sources import load_pools
from selfplay.targets import check_target
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
    _check_model("model", recipe.model)
    if recipe.train.reference_path is not None:
        _check_model("train.reference", recipe.train.reference_path)
    for name, view in recipe.by_source.items():
        _check_source_of(f"sources.{name}." if name else "", view, allow_code=allow_code)
    recipe.for_each(lambda _, view: check_win_rate_scale(view))
    check_reward_models(recipe)
    check_measuring(recipe)
    recipe.for_each(lambda _, view: _check_labelled(view))
    _check_rows(recipe)


def _check_source_of(at: str, view: SourceView, *, allow_code: bool) -> None:
    held = view.prompts.heldout
    held_source = held.source if isinstance(held, HeldoutRecipe) else held
    for key, source in (("prompts.source", view.prompts.source), ("prompts.heldout", held_source)):
        if isinstance(source, str):
            _check_source(at + key, source)
    for key, judge in (("judge", view.judge), ("evaluate.judge", view.evaluate.judge)):
        for one in judges_in(judge):
            _check_judge(at + key, one, allow_code=allow_code)
    for index, named in enumerate(view.pairs.filters):
        if isinstance(named, PythonFilterRecipe):
            check_target(named.target, f"{at}pairs.filters.{index}.target")
    labelled = view.audit.calibration
    if labelled is not None:
        _check_source(at + "audit.calibration", labelled)
    if allow_code:
        load_programs(view.pairs, allow_code=True)


def _check_labelled(view: SourceView) -> None:
    labelled = view.audit.calibration
    if labelled is not None and Path(labelled).suffix in JSON_SUFFIXES:  # others take a library, or the network
        check_calibration(view, judge_given=not view.has_prompts)


def _check_model(key: str, model: str) -> None:
    # a hub id is looked up when the run starts: that needs the network
    if Path(model).is_dir() or model.startswith(("/", ".")):
        try:
            local_model(model)
        except DataError as error:
            raise DataError(f"{key}: {error}") from error


def _check_source(key: str, source: str) -> None:
    path = Path(source)
    if path.suffix in FILE_SUFFIXES:
        if not path.is_file():
            raise DataError(f"{key}: {source}: no such file")
    elif source.startswith(("/", ".")) and not path.is_dir():  # a data set that `datasets` reads from a folder
        raise DataError(f"{key}: {source}: no such file or folder")


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


def _check_judge(key: str, judge: OneJudge, *, allow_code: bool) -> None:
    if isinstance(judge, VerifierRecipe):
        validate_checks(judge.checks, f"{key}.checks")
    elif isinstance(judge, LLMJudgeRecipe):
        _check_questions(key, judge)
        if judge.model != "policy":
            _check_model(f"{key}.model", judge.model)
    elif isinstance(judge, SimilarityRecipe):
        _check_model(f"{key}.model", judge.model)
    elif isinstance(judge, ApiJudgeRecipe):
        _check_questions(key, judge)
        read_key(judge)
        if find_spec("openai") is None:
            raise RecipeError(f'{key}.kind api needs the package openai: pip install "selfplay-dpo[api]"')
    elif isinstance(judge, PythonJudgeRecipe):
        check_target(judge.target, f"{key}.target")
        if allow_code:
            load_python_judge(judge.target, Path(), allow_code=True)
    elif isinstance(judge, RewardModelRecipe) and judge.calibration is not None:
        _check_source(f"{key}.calibration", judge.calibration)


def _check_questions(key: str, judge: LLMJudgeRecipe | ApiJudgeRecipe) -> None:
    try:
        template = load_template(judge.template, Path())
        constrained = judge.verdict == "constrained"
        questions = Questions(template, judge.num_verdicts, judge.system_prompt, constrained)
        check_asked(questions, verdict=judge.verdict, temperature=judge.temperature or 0.0)
    except RecipeError as error:
        raise RecipeError(f"{key}: {error}") from error
