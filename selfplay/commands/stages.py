"""`selfplay generate | judge | pairs | train | evaluate`: the stages of a round as separate jobs over files.

selfplay generate RECIPE --model M --out w/groups
selfplay judge RECIPE --groups w/groups --out w/judgements
selfplay pairs RECIPE --groups w/groups --judgements w/judgements --out w/pairs.jsonl
selfplay train RECIPE --model M --pairs w/pairs.jsonl --groups w/groups --out w
selfplay evaluate RECIPE --model w/policy --out w/panel
"""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from selfplay.commands.options import (
    AccelerateConfig,
    AllowCode,
    Groups,
    Model,
    OutFolder,
    Overrides,
    RecipeFile,
    RoundIndex,
    check_split,
)
from selfplay.metrics import panel_alarms
from selfplay.progress import Reporter
from selfplay.recipe_file import load_recipe
from selfplay.report import filter_line, make_console, number, print_alarm, print_policy, reasons
from selfplay.train.devices import read_devices


def generate_command(
    recipe: RecipeFile, model: Model, out: OutFolder, round: RoundIndex = 0, overrides: Overrides = None
) -> None:
    """Sample the completions of a round's prompts."""
    loaded = load_recipe(recipe, overrides or ())
    from selfplay.single import generate

    groups = generate(loaded, model, out, round=round, report=Reporter())
    num_prompts = sum(map(len, groups.values()))
    ends = Counter(c.finish_reason for own in groups.values() for group in own for c in group.completions)
    typer.echo(f"{out}: {num_prompts} prompts, {ends.total()} completions, {ends['length']} cut at max_tokens")


def judge_command(
    recipe: RecipeFile,
    groups: Groups,
    out: OutFolder,
    model: Annotated[str | None, typer.Option(help="The policy, for a judge that is the policy itself.")] = None,
    round: RoundIndex = 0,
    overrides: Overrides = None,
    allow_code: AllowCode = False,
) -> None:
    """Score completions with the recipe's judge."""
    loaded = load_recipe(recipe, overrides or ())
    from selfplay.single import judge

    found = judge(loaded, groups, out, model=model, round=round, allow_code=allow_code, report=Reporter())
    for source, judgements in found.items():  # scores of two judges have no mean
        num_scores = num_missing = 0
        total = 0.0
        for judgement in judgements:
            known = [score for score in judgement.scores if score is not None]
            num_scores += len(known)
            num_missing += len(judgement.scores) - len(known)
            total += sum(known)
        mean = number(total / num_scores if num_scores else None)
        told = f"{num_scores + num_missing} completions, mean score {mean}, {num_missing} without a verdict"
        typer.echo(f"{out / source}: {told}")


def pairs_command(
    recipe: RecipeFile,
    groups: Groups,
    out: Annotated[Path, typer.Option(help="The file of pairs to write.", show_default=False)],
    judgements: Annotated[Path | None, typer.Option(help="A folder of judgements.", show_default=False)] = None,
    previous: Annotated[
        list[Path] | None,
        typer.Option(help="The pairs.jsonl of an earlier round, for the filter mix_previous. Repeatable."),
    ] = None,
    round: RoundIndex = 0,
    overrides: Overrides = None,
    allow_code: AllowCode = False,
) -> None:
    """Make preference pairs of judged completions."""
    loaded = load_recipe(recipe, overrides or ())
    from selfplay.single_pairs import PairInputs, pairs

    inputs = PairInputs(groups, judgements, previous or (), round)
    for name, counts in pairs(loaded, inputs, out, allow_code=allow_code).items():
        typer.echo(f"{out}: {counts['num_pairs']} pairs{name and f' of {name}'}")
        for count in counts["filters"]:
            typer.echo(f"filter {filter_line(count)}")
        typer.echo(f"prompts without a pair: {reasons(counts['num_prompts_without_pair'])}")
        typer.echo(f"completions not used: {reasons(counts['num_unusable_completions'])}")


def train_command(
    recipe: RecipeFile,
    model: Model,
    pairs: Annotated[
        str,
        typer.Option(
            help="pairs.jsonl, or any preference data; rows with one completion where loss_type is sft. A file or a "
            "data set id.",
            show_default=False,
        ),
    ],
    out: OutFolder,
    reference: Annotated[
        str | None, typer.Option(help="The reference policy. Default: what train.reference says.")
    ] = None,
    groups: Annotated[Path | None, typer.Option(help="What the model sampled, to check its engine.")] = None,
    optimizer_state: Annotated[Path | None, typer.Option(help="train/optimizer.safetensors to carry on.")] = None,
    round: RoundIndex = 0,
    split: Annotated[str, typer.Option(help="The split of a data set id.")] = "train",
    name: Annotated[str | None, typer.Option(help="The configuration of a data set id.")] = None,
    accelerate_config: AccelerateConfig = None,
    overrides: Overrides = None,
) -> None:
    """Train on preference pairs (DPO and others), or on single completions (SFT); the policy lies in OUT/policy."""
    check_split(pairs, name, split)
    loaded = load_recipe(recipe, overrides or ())
    from selfplay.single_train import TrainInputs, train

    devices = read_devices(accelerate_config) if accelerate_config is not None else None
    inputs = TrainInputs(model, pairs, name, split, reference, groups, optimizer_state, round, devices)
    result = train(loaded, inputs, out, Reporter())
    accuracy = result["rewards/accuracies"]
    typer.echo(
        f"{out / 'policy'}: {result['num_pairs']} {'completions' if accuracy is None else 'pairs'} "
        f"({result['num_too_long']} over max_length left out), {result['num_steps']} steps, "
        f"loss {result['loss_first']:.4f} -> {result['loss_last']:.4f}"
        + ("" if accuracy is None else f", accuracy {accuracy:.3f}")
    )


def evaluate_command(
    recipe: RecipeFile,
    model: Model,
    out: OutFolder,
    against: Annotated[
        Path | None,
        typer.Option(
            help="For a judge that compares: the panel of the recipe's own model, to compare with. RUN/initial of a run, or "
            "the folder of an earlier `evaluate`.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    allow_code: AllowCode = False,
) -> None:
    """Play the held-out panel of a model."""
    loaded = load_recipe(recipe, overrides or ())
    from selfplay.single_evaluate import evaluate

    figures = evaluate(loaded, model, out, allow_code=allow_code, report=Reporter(), against=against)
    console = make_console()
    print_policy(Path(model).name, figures, console, temperature=loaded.evaluate.temperature)
    bounds = {name: view.pairs.unparsed_bound for name, view in loaded.by_source.items()}
    for alarm in panel_alarms(figures, bounds):
        print_alarm(alarm, console)
