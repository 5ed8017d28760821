"""`selfplay tasks`: prompts that reasoning-gym makes."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from selfplay.errors import RecipeError
from selfplay.recipe_file import parse_yaml


def tasks_command(
    task: Annotated[str, typer.Argument(help="A task of reasoning-gym, such as chain_sum.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The .jsonl file to write.", show_default=False)],
    count: Annotated[int, typer.Option(min=1, help="How many to make; of equal ones one is kept.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Other seeds make other tasks.")] = 0,
    read: Annotated[
        Literal["tag", "last_number", "all"],
        typer.Option(help="What is scored: <answer> tags, the last number, or all."),
    ] = "tag",
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the task: min_terms=2. Repeatable."),
    ] = None,
) -> None:
    """Write prompts of a reasoning-gym task, with gold answers and checks, for a verifier."""
    from selfplay.tasks import write_tasks

    given = dict(_option(text) for text in options or ())
    num = write_tasks(task, out, count=count, seed=seed, read=read, options=given)
    typer.echo(f"{out}: {num} prompts")


def _option(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise RecipeError(f"--set {text}: write it as key=value")
    return key.strip(), parse_yaml(f"value: {value}", f"--set {text}")[0]["value"]
