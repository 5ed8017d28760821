"""`selfplay recipes`: the recipes that come with selfplay."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from selfplay.errors import RecipeError, StorageError
from selfplay.recipe import Recipe
from selfplay.recipe_file import load_recipe, recipe_folder
from selfplay.recipe_filters import PythonFilterRecipe
from selfplay.recipe_judges import ApiJudgeRecipe, LLMJudgeRecipe, PythonJudgeRecipe, judges_in
from selfplay.recipe_prompts import HeldoutRecipe
from selfplay.recipe_reward import RewardModelRecipe

recipes_app = typer.Typer(help="List the recipes that come with selfplay, or copy one.")


@recipes_app.callback(invoke_without_command=True)
def list_command(context: typer.Context) -> None:
    """List the recipes that come with selfplay, or copy one."""
    if context.invoked_subcommand is not None:
        return
    files = sorted(recipe_folder().glob("*.yaml"))
    width = max((len(file.stem) for file in files), default=0)
    for file in files:
        first = load_recipe(file).description.strip().partition("\n")[0]
        typer.echo(f"{file.stem:{width}}  {first}".rstrip())


@recipes_app.command("copy")
def copy_command(
    name: Annotated[str, typer.Argument(help="A name that `selfplay recipes` lists.", show_default=False)],
    dest: Annotated[Path, typer.Argument(help="The folder to copy into.")] = Path(),
) -> None:
    """Copy a recipe, and the files that it names, to make it your own."""
    folder = recipe_folder()
    file = folder / f"{name}.yaml"
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        raise RecipeError(f"no recipe {name!r}; there are {', '.join(names)}")
    sources = [file, *files_of(load_recipe(file), folder)]
    there = [target for source in sources if (target := dest / source.relative_to(folder)).exists()]
    if there:
        raise StorageError(f"{there[0]}: already there; nothing was copied")
    for source in sources:
        target = dest / source.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        typer.echo(target)


def files_of(recipe: Recipe, folder: Path) -> list[Path]:
    """The files in `folder` that a recipe names: data, held-out data, chat templates, judge templates, programs of judges and
    filters, and the labelled pairs of `audit.calibration` and of a reward model.
    """
    texts: list[object] = [recipe.chat.chat_template]
    for view in recipe.by_source.values():
        held = view.prompts.heldout
        texts += [view.prompts.source, held.source if isinstance(held, HeldoutRecipe) else held, view.audit.calibration]
        filters = [one for one in view.pairs.filters if isinstance(one, PythonFilterRecipe)]
        texts += [one.target.partition(":")[0] for one in filters]
        for judge in (*judges_in(view.judge), *judges_in(view.evaluate.judge)):
            texts += [judge.template] if isinstance(judge, LLMJudgeRecipe | ApiJudgeRecipe) else []
            texts += [judge.chat.chat_template] if isinstance(judge, LLMJudgeRecipe) and judge.chat is not None else []
            texts += [judge.target.partition(":")[0]] if isinstance(judge, PythonJudgeRecipe) else []
            texts += [judge.chat_template, judge.calibration] if isinstance(judge, RewardModelRecipe) else []
    paths = dict.fromkeys(Path(text) for text in texts if isinstance(text, str))
    return [path for path in paths if path.is_relative_to(folder) and path.is_file()]
