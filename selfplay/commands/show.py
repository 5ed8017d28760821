"""`selfplay status` and `selfplay show`: what a run directory holds."""

import json
from pathlib import Path
from typing import Annotated

import typer

from selfplay import store
from selfplay.commands.options import AsJson
from selfplay.errors import DataError
from selfplay.metrics import compare, status
from selfplay.report import make_console, print_run
from selfplay.report_compare import print_comparison
from selfplay.report_texts import print_group, print_pair
from selfplay.types import Group, Judgement, PreferencePair

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)]


def status_command(run: RunFolder, as_json: AsJson = False) -> None:
    """Show the figures of a run, finished or not."""
    figures = status(run)
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
    else:
        print_run(run, figures, make_console())


def compare_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Put runs side by side, such as the seeds of a recipe, with their mean gain and its interval."""
    found = compare(runs)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_comparison(found, make_console())


def show_command(
    run: RunFolder,
    round: Annotated[int, typer.Option("--round", min=0, help="The round, from 0.", show_default=False)],
    limit: Annotated[int, typer.Option(min=1, help="Show at most this many prompts of each source.")] = 5,
) -> None:
    """Show prompts, completions with their scores, and pairs of a round."""
    folder = run / f"round-{round:03d}"
    if not (folder / "groups").is_dir():
        there = ", ".join(str(int(p.name.removeprefix("round-"))) for p in sorted(run.glob("round-*")))
        if not there:
            raise DataError(
                f"{run}: no rounds here. Name a run directory, such as selfplay iterate RECIPE --out {run} makes"
            )
        raise DataError(f"{run}: round {round} has no completions; rounds here: {there}")
    pairs: dict[str, list[PreferencePair]] = {}
    if (folder / "pairs.jsonl").exists():
        for pair in store.read_records(folder / "pairs.jsonl", PreferencePair):
            if pair.origin_round != round:
                continue  # its indices are places in the group of the round that it was mixed in from
            pairs.setdefault(pair.prompt_id, []).append(pair)
    console = make_console()
    for group, judgement in first_groups(folder, limit):
        print_group(group, judgement, console)
        for pair in pairs.get(group.prompt.id, []):
            print_pair(pair, console)
        console.print()


def first_groups(folder: Path, limit: int) -> list[tuple[Group, Judgement | None]]:
    """The first groups of each source of a round with their judgements; only as many shards are read as are needed."""
    groups, judgements = folder / "groups", folder / "judgements"
    sources = sorted(path.name for path in groups.iterdir() if path.is_dir()) or [""]
    return [pair for name in sources for pair in _first_groups(groups / name, judgements / name, limit)]


def _first_groups(folder: Path, judgements: Path, limit: int) -> list[tuple[Group, Judgement | None]]:
    found: list[tuple[Group, Judgement | None]] = []
    for path in sorted(folder.glob("*.jsonl")):
        if len(found) >= limit:
            break
        groups = store.read_records(path, Group)
        judged = judgements / path.name
        by_id = {j.prompt_id: j for j in store.read_records(judged, Judgement)} if judged.exists() else {}
        found += [(group, by_id.get(group.prompt.id)) for group in groups]
    return found[:limit]
