"""`selfplay compare-judges` and `selfplay calibrate`: how far a judge can be trusted.

selfplay compare-judges w/judgements-a w/judgements-b --groups w/groups
selfplay calibrate RECIPE --pairs labelled.jsonl
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from selfplay.commands.options import AllowCode, AsJson, Overrides, RecipeFile, check_split
from selfplay.errors import DataError
from selfplay.progress import Reporter
from selfplay.recipe_file import load_recipe
from selfplay.report import interval, make_console, number, shown
from selfplay.types import Group

Judgements = Annotated[Path, typer.Argument(help="A folder of judgements, or one file of them.", show_default=False)]


def compare_judges_command(
    a: Judgements,
    b: Judgements,
    groups: Annotated[Path | None, typer.Option(help="The judged groups, to show the texts that differ.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Show at most this many disagreements.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Compare two judges on the same completions: agreement, kappa, rank correlation, disagreements."""
    from selfplay.agreement import compare_judges
    from selfplay.single import read_groups, read_judgements

    for path in (a, b):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
    figures = compare_judges(read_judgements(a), read_judgements(b), limit=limit)
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
        return
    typer.echo(
        f"{figures['num_prompts']} prompts judged by both ({figures['num_prompts_of_one']} by one alone), "
        f"{figures['num_completions']} completions ({figures['num_without_verdict']} without both verdicts)"
    )
    if count := figures["num_other_completions"]:
        typer.echo(f"left out: {count} prompts that both judged, but not the same completions of")
    if count := figures["num_unknown"]:
        typer.echo(f"not known of {count} prompts whether the completions are the same: older judgements don't say")
    typer.echo(f"pairs of completions of one prompt: {figures['num_pairs']}")
    typer.echo(f"agreement (better, worse or tie)  {number(figures['agreement'])}")
    typer.echo(f"Cohen's kappa                     {number(figures['kappa'])}")
    typer.echo(f"Kendall's tau-b, within prompts   {number(figures['kendall'])}")
    typer.echo(f"Spearman, all completions         {number(figures['spearman'])}")
    texts = {group.prompt.id: group for group in read_groups(groups)} if groups is not None else {}
    if figures["disagreements"]:
        typer.echo("disagreements, largest gap first (a gap is in shares of each judge's range):")
    for row in figures["disagreements"]:
        _print_disagreement(row, texts.get(row["prompt_id"]))


def _print_disagreement(row: Mapping[str, Any], group: Group | None) -> None:
    i, j = row["completions"]
    (a_i, a_j), (b_i, b_j) = row["a"], row["b"]
    typer.echo(
        f"prompt {row['prompt_id']}, completions {i} and {j}: A says {a_i:g} and {a_j:g}, B says {b_i:g} and {b_j:g}, "
        f"gap {row['gap']:.2f}"
    )
    if group is not None:
        for name, text in (("prompt", group.prompt.text), *((str(k), group.completions[k].text) for k in (i, j))):
            typer.echo(f"  {name}: {shown(text, 300)}")


def calibrate_command(
    recipe: RecipeFile,
    pairs: Annotated[str, typer.Option(help="Preference rows: a file or a data set id.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="The policy, for a judge that is the policy itself.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder to keep the judgements in; a stopped calibration goes on there.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Whose judge, where the recipe has several sources.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Judge the first rows only.")] = None,
    split: Annotated[str, typer.Option(help="The split of a data set id.")] = "train",
    name: Annotated[str | None, typer.Option(help="The configuration of a data set id.")] = None,
    overrides: Overrides = None,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Test the recipe's judge on labelled preference pairs: accuracy, ties, and what length alone would give."""
    check_split(pairs, name, split)
    loaded = load_recipe(recipe, overrides or ())
    from selfplay.calibrate import calibrate

    figures = calibrate(
        loaded,
        pairs,
        out,
        model=model,
        source=source,
        limit=limit,
        name=name,
        split=split,
        allow_code=allow_code,
        report=Reporter(),
    )
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
    else:
        _print_calibration(figures)


def _print_calibration(figures: Mapping[str, Any]) -> None:
    console = make_console()
    console.print(
        f"{figures['num_pairs']} pairs ({figures['num_dropped']} rows dropped), {figures['num_judged']} with both verdicts"
    )
    console.print(f"accuracy          {number(figures['accuracy'])} {interval(figures['accuracy_interval'])}")
    console.print(f"  length alone    {number(figures['longer_accuracy'])} {interval(figures['longer_interval'])}")
    console.print(f"swap consistency  {number(figures['swap_consistency'])}")
    console.print(f"ties              {number(figures['tie_rate'])}")
    console.print(f"unparsed          {number(figures['unparsed_rate'])}")
    console.print("(a tie counts half; 95 % intervals; length alone prefers the longer text)", markup=False)
    if figures["includes_chance"]:
        console.print("The interval includes chance, 0.5: on these pairs the judge is not shown to know anything.")
