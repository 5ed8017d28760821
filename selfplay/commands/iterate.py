"""`selfplay iterate`: all rounds of a recipe, or with --dry-run what they would be."""

from pathlib import Path
from typing import Annotated

import typer

from selfplay.collection import collection_paused
from selfplay.commands.options import AccelerateConfig, AllowCode, Overrides, RecipeFile
from selfplay.recipe_file import load_recipe
from selfplay.report import make_console, print_run
from selfplay.report_texts import print_compared
from selfplay.train.devices import read_devices, require_possible


def iterate_command(
    recipe: RecipeFile,
    out: Annotated[
        Path | None, typer.Option(help="The run directory. Default: runs/ and the recipe's name.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show recipe, rounds, work, memory and disk; load no model.")
    ] = False,
    accelerate_config: AccelerateConfig = None,
    allow_code: AllowCode = False,
) -> None:
    """Play all rounds of a recipe; the same command goes on where it stopped."""
    loaded = load_recipe(recipe, overrides or ())
    folder = out or Path("runs") / recipe.stem
    console = make_console()
    devices = read_devices(accelerate_config) if accelerate_config is not None else None
    if dry_run:
        from selfplay.plan import make_plan, print_plan

        require_possible(loaded.train, devices)
        print_plan(make_plan(loaded, folder, devices), console)
        for line in devices.lines if devices is not None else ["training on 1 process"]:
            console.print(line, markup=False, soft_wrap=True)
        return
    from selfplay.progress import Reporter

    with collection_paused():
        from selfplay.rounds import iterate

    figures = iterate(loaded, folder, allow_code=allow_code, devices=devices, report=Reporter())
    print_run(folder, figures, console)
    print_compared(folder, figures, console)
    typer.echo(f"policy: {folder / f'round-{loaded.rounds - 1:03d}' / 'policy'}")
