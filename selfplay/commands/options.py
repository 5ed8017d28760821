"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from selfplay.data_rows import FILE_SUFFIXES
from selfplay.errors import RecipeError

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key of the recipe: train.learning_rate=1e-6. Repeatable."
    ),
]
AccelerateConfig = Annotated[
    str | None,
    typer.Option(
        "--accelerate-config",
        metavar="NAME_OR_PATH",
        help="Train on several devices: one_gpu, eight_gpus, eight_gpus_fsdp2, fsdp2_nodes, or a file of `accelerate config`.",
        show_default=False,
    ),
]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Run the programs that the recipe names.")]
RoundIndex = Annotated[int, typer.Option("--round", min=0, help="The round, from 0: its prompts, seeds and settings.")]
Model = Annotated[str, typer.Option(help="A model folder, or a hub id.", show_default=False)]
Groups = Annotated[
    Path, typer.Option(help="A folder of groups, of `generate` or of a run's round.", show_default=False)
]
OutFolder = Annotated[Path, typer.Option(help="The folder to write.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def check_split(pairs: str, name: str | None, split: str) -> None:
    """RecipeError where --name or --split would do nothing."""
    if Path(pairs).suffix in FILE_SUFFIXES and (name is not None or split != "train"):
        raise RecipeError(f"--name and --split are of a data set id; {pairs} is a file and has neither: leave them out")
