"""What a recipe names, looked at before anything heavy is loaded: models, files, chat templates, judges, programs."""

from importlib.util import find_spec
from pathlib import Path

from selfplay.chat import template_text
from selfplay.data_rows import FILE_SUFFIXES
from selfplay.errors import DataError, RecipeError
from selfplay.filters import load_programs
from selfplay.judges.api_key import read_key
from selfplay.judges.python import load_python_judge
from selfplay.judges.questions import Questions, check_asked
from selfplay.judges.template import load_template
from selfplay.judges.verifier import validate_checks
from selfplay.models import local_model
from selfplay.recipe import Recipe, SourceView
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
from selfplay.recipe_prompts import HeldoutRecipe
from selfplay.recipe_reward import RewardModelRecipe
from selfplay.targets import check_target


def check_named(recipe: Recipe, *, allow_code: bool = False) -> None:
    """Raises RecipeError or DataError, naming the recipe's key: a model, a file or a chat template that isn't there, a judge
    that can't be asked. Hub ids are not looked up. With `allow_code` the programs that the recipe names are imported.
    """
    _check_model("model", recipe.model)
    if recipe.train.reference_path is not None:
        _check_model("train.reference", recipe.train.reference_path)
    _check_template("chat.chat_template", recipe.chat.chat_template)
    for name, view in recipe.by_source.items():
        _check_source_of(f"sources.{name}." if name else "", view, allow_code=allow_code)


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


def _check_template(key: str, chat_template: str | None) -> None:
    if chat_template is not None:
        template_text(chat_template, key=key)


def _check_judge(key: str, judge: OneJudge, *, allow_code: bool) -> None:
    if isinstance(judge, VerifierRecipe):
        validate_checks(judge.checks, f"{key}.checks")
    elif isinstance(judge, LLMJudgeRecipe):
        _check_questions(key, judge)
        if judge.model != "policy":
            _check_model(f"{key}.model", judge.model)
        if judge.chat is not None:
            _check_template(f"{key}.chat.chat_template", judge.chat.chat_template)
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
    elif isinstance(judge, RewardModelRecipe):
        _check_template(f"{key}.chat_template", judge.chat_template)
        if judge.calibration is not None:
            _check_source(f"{key}.calibration", judge.calibration)


def _check_questions(key: str, judge: LLMJudgeRecipe | ApiJudgeRecipe) -> None:
    try:
        template = load_template(judge.template, Path())
        constrained = judge.verdict == "constrained"
        questions = Questions(template, judge.num_verdicts, judge.system_prompt, constrained)
        check_asked(questions, verdict=judge.verdict, temperature=judge.temperature or 0.0)
    except RecipeError as error:
        raise RecipeError(f"{key}: {error}") from error
