"""`selfplay train-reward`: a small reward model from preference rows.

selfplay train-reward --model M --pairs FILE --out DIR
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from selfplay.commands.options import AsJson, Model, check_split
from selfplay.progress import Reporter
from selfplay.recipe_reward import RewardTraining
from selfplay.report import interval, make_console, number

_DEFAULT = RewardTraining()


def train_reward_command(
    model: Model,
    pairs: Annotated[str, typer.Option(help="Preference rows: a file or a data set id.", show_default=False)],
    out: Annotated[
        Path, typer.Option(help="The folder of the reward model; it must not be there.", show_default=False)
    ],
    learning_rate: Annotated[float, typer.Option(help="The highest of the schedule.")] = _DEFAULT.learning_rate,
    batch_size: Annotated[int, typer.Option(help="Pairs of an optimizer step.")] = _DEFAULT.batch_size,
    num_train_epochs: Annotated[int, typer.Option(help="Passes over the pairs.")] = _DEFAULT.num_train_epochs,
    max_length: Annotated[
        int | None, typer.Option(help="Drop pairs with more tokens on a side. Default: the model's own length.")
    ] = None,
    heldout: Annotated[float, typer.Option(help="The share of prompts to measure on.")] = _DEFAULT.heldout,
    center_rewards_coefficient: Annotated[
        float, typer.Option(help="Holds the mean reward of a pair near 0; 0.01 is common.")
    ] = _DEFAULT.center_rewards_coefficient,
    weight_decay: Annotated[float, typer.Option(help="Of matrices alone.")] = _DEFAULT.weight_decay,
    warmup_steps: Annotated[float, typer.Option(help="Steps, or below 1 a share.")] = _DEFAULT.warmup_steps,
    lr_scheduler_type: Annotated[
        str, typer.Option(help="linear, cosine or constant_with_warmup.")
    ] = _DEFAULT.lr_scheduler_type,
    max_batch_tokens: Annotated[
        int, typer.Option(help="Tokens of a forward pass, padding counted.")
    ] = _DEFAULT.max_batch_tokens,
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--no-bf16", help="Compute in bfloat16. Default: where the machine does.")
    ] = None,
    save_dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = _DEFAULT.save_dtype,
    seed: Annotated[int, typer.Option(help="Of the split, the head and the order.")] = _DEFAULT.seed,
    chat_template: Annotated[
        str | None, typer.Option(help="In the place of the model's own: text, or a file.", show_default=False)
    ] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Where it has no usual name.", show_default=False)] = None,
    system_prompt: Annotated[
        str | None, typer.Option(help="For rows without a system turn.", show_default=False)
    ] = None,
    split: Annotated[str, typer.Option(help="The split of a data set id.")] = "train",
    name: Annotated[str | None, typer.Option(help="The configuration of a data set id.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a reward model on preference pairs (Bradley-Terry), and measure it on held-out prompts."""
    check_split(pairs, name, split)
    from selfplay.train_reward import RewardInputs, reward_training, train_reward

    settings = reward_training(
        learning_rate=learning_rate,
        batch_size=batch_size,
        num_train_epochs=num_train_epochs,
        max_length=max_length,
        heldout=heldout,
        center_rewards_coefficient=center_rewards_coefficient,
        weight_decay=weight_decay,
        warmup_steps=warmup_steps,
        lr_scheduler_type=lr_scheduler_type,
        max_batch_tokens=max_batch_tokens,
        bf16="auto" if bf16 is None else bf16,
        save_dtype=save_dtype,
        seed=seed,
    )
    inputs = RewardInputs(model, pairs, name, split, prompt_column, system_prompt, chat_template)
    figures = train_reward(inputs, settings, out, Reporter())
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
    else:
        _print_figures(figures, out)


def _print_figures(figures: Mapping[str, Any], out: Path) -> None:
    console = make_console()
    console.print(f"held-out accuracy {number(figures['accuracy'])} {interval(figures['accuracy_interval'])}")
    console.print(
        f"  length alone    {number(figures['length_accuracy'])} {interval(figures['length_interval'])} "
        f"(the {figures['length_prefers']} text)"
    )
    console.print(
        f"held out: {figures['num_heldout_pairs']} pairs of {figures['num_heldout_prompts']} prompts; trained on "
        f"{figures['num_train_pairs']} pairs of {figures['num_train_prompts']}"
    )
    console.print(
        f"loss {number(figures['loss_first'], 4)} -> {number(figures['loss_last'], 4)} in {figures['num_steps']} steps"
    )
    console.print("(95 % intervals, with the number of prompts as the count)", markup=False)
    if figures["accuracy_interval"][0] <= 0.5:
        console.print(
            "The interval is not above chance, 0.5: a recipe that judges with this model is refused, unless it says "
            "judge.allow_chance: true."
        )
    console.print(f"reward model: {out}", markup=False, soft_wrap=True)
