"""A recipe's paths are relative to its file: all of them made absolute."""

import difflib
from pathlib import Path
from typing import Any

from selfplay.errors import RecipeError
from selfplay.recipe import Recipe, SourceRecipe, resolve_path
from selfplay.recipe_chat import ChatRecipe
from selfplay.recipe_filters import FilterRecipe, PythonFilterRecipe
from selfplay.recipe_judges import (
    SHIPPED_TEMPLATES,
    ApiJudgeRecipe,
    CombineRecipe,
    LLMJudgeRecipe,
    PythonJudgeRecipe,
    SimilarityRecipe,
)
from selfplay.recipe_prompts import HeldoutRecipe, PromptsRecipe
from selfplay.recipe_reward import RewardModelRecipe
from selfplay.recipe_train import REFERENCE_KINDS
from selfplay.recipe_values import check_revision


def with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    model = _model_path(recipe.model, recipe.model_revision, folder, "")
    update: dict[str, Any] = {"model": model, **_absolute_sections(recipe, folder, "")}
    if recipe.sources is not None:
        update["sources"] = {
            name: source.model_copy(update=_absolute_sections(source, folder, f"sources.{name}."))
            for name, source in recipe.sources.items()
        }
    if recipe.train.reference_path is not None:
        path = _reference_path(recipe.train.reference_path, folder)
        update["train"] = recipe.train.model_copy(update={"reference": path})
    update["chat"] = _absolute_chat(recipe.chat, folder)
    return recipe.model_copy(update=update)


def _absolute_sections(of: Recipe | SourceRecipe, folder: Path, at: str) -> dict[str, Any]:
    """The sections that a recipe of one source and a source have alike; `at` is what their keys begin with."""
    filters = [_absolute_filter(one, folder) for one in of.pairs.filters]
    panel_judge = _absolute_judge(of.evaluate.judge, folder, f"{at}evaluate.judge.")
    return {
        "prompts": _absolute_prompts(of.prompts, folder),
        "judge": _absolute_judge(of.judge, folder, f"{at}judge."),
        "pairs": of.pairs.model_copy(update={"filters": filters}),
        "evaluate": of.evaluate.model_copy(update={"judge": panel_judge}),
        "audit": of.audit.model_copy(
            update={"calibration": of.audit.calibration and resolve_path(of.audit.calibration, folder)}
        ),
    }


def _absolute_prompts(prompts: PromptsRecipe, folder: Path) -> PromptsRecipe:
    update: dict[str, Any] = {}
    if prompts.source is not None:
        update["source"] = resolve_path(prompts.source, folder)
    held = prompts.heldout
    if isinstance(held, str):
        update["heldout"] = resolve_path(held, folder)
    elif isinstance(held, HeldoutRecipe) and held.source is not None:
        update["heldout"] = held.model_copy(update={"source": resolve_path(held.source, folder)})
    return prompts.model_copy(update=update)


def _absolute_chat(chat: ChatRecipe, folder: Path) -> ChatRecipe:
    if chat.chat_template is None or not names_template_file(chat.chat_template):
        return chat
    return chat.model_copy(update={"chat_template": str((folder / chat.chat_template).resolve())})


def names_template_file(chat_template: str) -> bool:
    """Whether a chat_template is the name of a file. A template itself has a Jinja tag, or at least more than one line."""
    return "{" not in chat_template and "\n" not in chat_template


def _reference_path(text: str, folder: Path) -> str:
    path = resolve_path(text, folder)
    if "/" in path:
        return path
    close = difflib.get_close_matches(text, REFERENCE_KINDS, n=1)
    hint = f'did you mean "{close[0]}"?' if close else f"there is no such folder beside the recipe, in {folder}"
    raise RecipeError(f"train.reference: {text!r} is none of {', '.join(REFERENCE_KINDS)} and no model; {hint}")


def _absolute_judge(judge: Any, folder: Path, at: str) -> Any:
    if isinstance(judge, CombineRecipe):
        members = [
            m.model_copy(update={"judge": _absolute_judge(m.judge, folder, f"{at}judges.{n}.")})
            for n, m in enumerate(judge.judges)
        ]
        return judge.model_copy(update={"judges": members})
    if isinstance(judge, PythonJudgeRecipe):
        return judge.model_copy(update={"target": _absolute_target(judge.target, folder)})
    if isinstance(judge, LLMJudgeRecipe):
        places: dict[str, Any] = {"template": _absolute_template(judge.template, folder)}
        if judge.model != "policy":
            places["model"] = _model_path(judge.model, judge.model_revision, folder, at)
        if judge.chat is not None:
            places["chat"] = _absolute_chat(judge.chat, folder)
        return judge.model_copy(update=places)
    if isinstance(judge, SimilarityRecipe):
        return judge.model_copy(update={"model": resolve_path(judge.model, folder)})
    if isinstance(judge, ApiJudgeRecipe):
        return judge.model_copy(update={"template": _absolute_template(judge.template, folder)})
    if isinstance(judge, RewardModelRecipe):
        return _absolute_reward_model(judge, folder, at)
    return judge


def _absolute_template(template: str, folder: Path) -> str:
    """A judge template's file. Of one called as a shipped one, beside the recipe, only a path such as ./safety is the name."""
    return template if template in SHIPPED_TEMPLATES else str((folder / Path(template).expanduser()).resolve())


def _absolute_reward_model(judge: RewardModelRecipe, folder: Path, at: str) -> RewardModelRecipe:
    update: dict[str, Any] = {"model": _model_path(judge.model, judge.model_revision, folder, at)}
    if judge.chat_template is not None and names_template_file(judge.chat_template):
        update["chat_template"] = str((folder / judge.chat_template).resolve())
    if judge.calibration is not None:
        update["calibration"] = resolve_path(judge.calibration, folder)
    return judge.model_copy(update=update)


def _model_path(model: str, revision: str | None, folder: Path, at: str) -> str:
    path = resolve_path(model, folder)
    try:
        check_revision(path, revision)
    except ValueError as error:  # a folder beside the recipe, which a hub id may look like
        raise RecipeError(f"{at}{error}") from error
    return path


def _absolute_filter(one: FilterRecipe, folder: Path) -> FilterRecipe:
    if isinstance(one, PythonFilterRecipe):
        return one.model_copy(update={"target": _absolute_target(one.target, folder)})
    return one


def _absolute_target(target: str, folder: Path) -> str:
    file, _, name = target.partition(":")
    return f"{resolve_path(file, folder)}:{name}"
