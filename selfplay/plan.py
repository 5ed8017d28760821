"""What a run would do: `selfplay iterate RECIPE --dry-run`. Reads the data set and the headers of the weights; loads no
model, no tokenizer and, where the models are on this machine, no torch.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from selfplay.changes import continued, read_recipe
from selfplay.judges.against import check_measuring
from selfplay.judges.win_rate_scale import check_win_rate_scale
from selfplay.models import resolve_auto
from selfplay.plan_machine import this_machine
from selfplay.plan_memory import Phase, memory_lines, not_known, phases
from selfplay.plan_models import find_model, model_facts
from selfplay.plan_source import SourcePlan, comparisons, plan_source
from selfplay.pool_checks import check_calibration, check_pool
from selfplay.prompts import PromptPool
from selfplay.recipe import Recipe
from selfplay.recipe_checks import check_named
from selfplay.recipe_file import dump_recipe
from selfplay.recipe_values import at_round
from selfplay.report import print_table
from selfplay.sources import load_pools
from selfplay.train.devices import Devices
from selfplay.train.four_bit import BASE
from selfplay.train.settings import KEPT_CHECKPOINTS, STATE_BYTES, TrainSettings, settings_at
from selfplay.trust import check_reward_models

BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2}
# One sampled token on disk: its id, its logp with 17 digits, about 4 characters of text; pairs repeat ids and text.
RECORD_BYTES_PER_TOKEN = 50
GB = 1e9


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """One round. Tokens, pairs and steps are upper bounds: a completion may end early and a prompt may give no pair."""

    index: int
    init: str
    reference: str | None  # None where no loss reads one
    sources: tuple[SourcePlan, ...]
    num_completions: int
    max_tokens: int
    temperature: float
    max_steps: int
    settings: TrainSettings

    @property
    def num_prompts(self) -> int:
        return sum(source.num_prompts for source in self.sources)

    @property
    def max_pairs(self) -> int:
        return sum(source.max_pairs for source in self.sources)

    @property
    def tokens(self) -> int:
        return self.num_prompts * self.num_completions * self.max_tokens


@dataclass(frozen=True, slots=True)
class Plan:
    """All rounds, the panels, memory and disk. Bytes are None where nothing is known of the model."""

    recipe: Recipe
    pools: dict[str, PromptPool]  # by source
    rounds: tuple[RoundPlan, ...]
    panel_completions: int
    panel_tokens: int
    num_parameters: int | None
    num_trained: int | None  # fewer with train.lora
    bytes_needed: int | None
    bytes_free: int
    memory: tuple[Phase, ...]  # the largest first


def make_plan(recipe: Recipe, out: Path, devices: Devices | None = None) -> Plan:
    """The plan of a run in `out` that trains on `devices`, finished rounds counted as there. Raises what starting the run would
    raise about the recipe, a change of it, and the data set.
    """
    recipe.for_each(lambda _, view: view.prompts.needed_source)
    recipe.check_judged()
    recipe.check_win_rates()
    recipe.for_each(lambda _, view: check_win_rate_scale(view))
    check_reward_models(recipe)
    check_measuring(recipe)
    check_named(recipe)
    if (out / "recipe.yaml").exists():
        continued(recipe, read_recipe(out), out)
    recipe = _with_generator(recipe)
    pools = load_pools(recipe)
    recipe.for_each(lambda name, view: check_pool(view, pools[name]))
    recipe.for_each(lambda _, view: check_calibration(view))
    rounds = tuple(_plan_round(recipe, pools, index) for index in range(recipe.rounds))
    completions, tokens = _panel_work(recipe, _num_heldout(recipe, pools))
    if recipe.train.reference_path is not None:
        find_model(recipe.train.reference_path)
    facts = model_facts(recipe.model, recipe.model_revision)
    parameters = facts.num_parameters if facts is not None else None
    trained = facts.num_trained(recipe.train.lora) if facts is not None else None
    needed = None
    if parameters is not None and trained is not None:
        needed = _bytes_needed(recipe, rounds, tokens, parameters, trained, out)
    memory = phases(recipe, facts, [one.settings for one in rounds], devices, this_machine())
    return Plan(
        recipe, pools, rounds, completions, tokens, parameters, trained, needed, _bytes_free(out), tuple(memory)
    )


def _with_generator(recipe: Recipe) -> Recipe:
    """The recipe with the generator that this machine takes. A `bf16: auto` stays: to ask the machine would load torch."""
    known = recipe.train.model_copy(update={"bf16": False})
    return recipe.model_copy(update={"generator": resolve_auto(recipe.model_copy(update={"train": known})).generator})


def _num_heldout(recipe: Recipe, pools: Mapping[str, PromptPool]) -> int:
    return sum(len(pool.heldout[: recipe.evaluate.num_prompts]) for pool in pools.values())


def _plan_round(recipe: Recipe, pools: Mapping[str, PromptPool], index: int) -> RoundPlan:
    generator, train = recipe.generator, recipe.train
    settings = settings_at(train, index, bf16=train.bf16 is True)
    sources = tuple(plan_source(name, view, pools[name], index) for name, view in recipe.by_source.items())
    max_pairs = sum(source.max_pairs for source in sources)
    steps = math.ceil(max_pairs / settings.batch_size) * settings.num_train_epochs
    init = f"the policy of round {index - 1}" if index else recipe.model
    return RoundPlan(
        index=index,
        init=init,
        reference=_reference(recipe, index, init),
        sources=sources,
        num_completions=at_round(generator.num_completions, index),
        max_tokens=at_round(generator.max_tokens, index),
        temperature=at_round(generator.temperature, index),
        max_steps=settings.max_steps if settings.max_steps > 0 else steps,
        settings=settings,
    )


def _reference(recipe: Recipe, index: int, init: str) -> str | None:
    """Whose weights the reference of a round is, in words."""
    kind, alpha = recipe.train.reference, recipe.train.ref_model_mixup_alpha
    if kind is None or recipe.train.reference_path is not None:
        return kind
    if kind == "prior":
        return init
    if alpha is None or index == 0:
        return recipe.model
    before = f"the reference of round {index - 1}" if index > 1 else recipe.model
    return f"{alpha:g} x {init} + {1 - alpha:g} x {before}"


def _panel_work(recipe: Recipe, num_prompts: int) -> tuple[int, int]:
    """Completions and at most tokens of all panels: the initial policy, the rounds between, the last."""
    evaluate = recipe.evaluate
    between = evaluate.num_completions_between or evaluate.num_completions
    greedy = (recipe.rounds + 1) * evaluate.greedy
    count = num_prompts * (2 * evaluate.num_completions + (recipe.rounds - 1) * between + greedy)
    return count, count * (evaluate.max_tokens or at_round(recipe.generator.max_tokens, 0))


def _bytes_needed(
    recipe: Recipe, rounds: tuple[RoundPlan, ...], panel_tokens: int, whole: int, parameters: int, out: Path
) -> int:
    """What is still to be written and stays, of `parameters` that train in a model of `whole`. An ema of the reference is kept
    from round 1 on.
    """
    left = [plan for plan in rounds if not (out / f"round-{plan.index:03d}" / "policy").exists()]
    per_round = parameters * BYTES_PER_VALUE[recipe.train.save_dtype]
    if recipe.train.optimizer_state == "carried":
        per_round += parameters * STATE_BYTES[recipe.train.optim]
    ema = parameters * 4 * sum(plan.index > 0 for plan in left) if recipe.train.reference == "ema" else 0
    tokens = sum(plan.tokens for plan in left) + (panel_tokens if left else 0)
    base = 0
    if left and recipe.train.lora is not None and recipe.train.lora.load_in_4bit:
        # base-4bit, in the dtype that training computes in
        base = whole * (4 if recipe.train.bf16 is False else 2) * (not (out / BASE).exists())
    return len(left) * per_round + ema + base + tokens * RECORD_BYTES_PER_TOKEN


def _bytes_free(out: Path) -> int:
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def print_plan(plan: Plan, console: Console) -> None:
    """The resolved recipe, each round, the work, the memory, the disk."""
    console.print(dump_recipe(plan.recipe), markup=False, soft_wrap=True)
    for name, pool in plan.pools.items():
        whose = f"prompts of {name}" if name else "prompts"
        console.print(f"{whose}: {len(pool.train)} for training, {len(pool.heldout)} held out (form: {pool.form})")
        for line in pool.drop_lines:
            console.print(f"         {line}", markup=False, soft_wrap=True)
        if pool.drops:
            console.print("         prompts over max_prompt_length are dropped later")
        if (idle := plan.recipe.by_source[name].idle_panel_judge) is not None:
            console.print(f"         {idle}", markup=False, soft_wrap=True)
    console.print()
    for round in plan.rounds:
        for line in _round_lines(plan.recipe, round):
            console.print(line, markup=False, soft_wrap=True)
    console.print()
    print_table("work, at most", _work_table(plan), console)
    for name, view in plan.recipe.by_source.items():
        if asked := comparisons(view, len(plan.pools[name].heldout[: plan.recipe.evaluate.num_prompts])):
            console.print(f"panels{f' of {name}' if name else ''}: {asked}", soft_wrap=True)
    for line in memory_lines(plan.memory):
        console.print(line, markup=False, soft_wrap=True)
    _print_disk(plan, console)


def _round_lines(recipe: Recipe, plan: RoundPlan) -> list[str]:
    settings = plan.settings
    sampled = (
        f"{plan.num_completions} completions each (temperature {plan.temperature:g}, at most {plan.max_tokens} tokens)"
    )
    data = [f"  data       {sampled}"]
    for source in plan.sources:
        if not source.name:
            data = [f"  data       prompts {source.data} in dealing order, {sampled}"]
            data += [f"  judge      {_verdicts(source)}"] if source.num_verdicts else []
            data += [f"  audit      {source.audit}"] if source.audit else []
            data.append(f"  pairs      {source.pairs}")
        else:
            said = f"{source.num_prompts} prompts ({source.data} in dealing order), judge {source.judge}"
            data.append(f"  source     {source.name}: {said}, pairs {source.pairs}")
            data += [f"  judge      {source.name}: {_verdicts(source)}"] if source.num_verdicts else []
            data += [f"  audit      {source.name}: {source.audit}"] if source.audit else []
    span = "the run" if recipe.train.schedule_scope == "run" else "the round"
    if recipe.train.schedule_epochs is not None:
        span = f"{recipe.train.schedule_epochs} epochs"
    optimizer = "fresh" if recipe.train.optimizer_state == "fresh" or not plan.index else "of the round before"
    return [
        f"round {plan.index}",
        f"  init       {plan.init}",
        f"  reference  {_reference_line(plan)}",
        *data,
        f"  schedule   learning_rate {settings.learning_rate:g}, {settings.lr_scheduler_type} over {span}, "
        f"warmup_steps {settings.warmup_steps:g}; optimizer {optimizer}",
        f"  train      {_loss_line(settings)}, batch_size {settings.batch_size}, "
        + (f"{settings.max_steps} steps" if settings.max_steps > 0 else f"{settings.num_train_epochs} epochs"),
    ]


def _verdicts(source: SourcePlan) -> str:
    return f"{source.num_verdicts:,} verdicts: every two completions of a prompt are compared, in both orders"


def _reference_line(plan: RoundPlan) -> str:
    if plan.reference is None:
        return f"none: loss_type {' + '.join(plan.settings.loss_type)} reads no reference"
    return f"{plan.reference}; logps by the {plan.settings.reference_logps}"


def _loss_line(settings: TrainSettings) -> str:
    weighted = zip(settings.loss_weights, settings.loss_type, strict=True)
    loss = " + ".join(name if weight == 1 else f"{weight:g} x {name}" for weight, name in weighted)
    numbers = [f"{name} {value:g}" for name, value in settings.loss_numbers.items() if value]
    return ", ".join((f"loss {loss}", *numbers))


def _work_table(plan: Plan) -> Table:
    table = Table()
    for column in ("", "prompts", "completions", "tokens to sample", "pairs", "steps"):
        table.add_column(column, justify="right" if column else "left")
    for r in plan.rounds:
        work = (r.num_prompts, r.num_prompts * r.num_completions, r.tokens, r.max_pairs, r.max_steps)
        table.add_row(f"round {r.index}", *(f"{count:,}" for count in work))
    heldout = _num_heldout(plan.recipe, plan.pools)
    table.add_row("panels", f"{heldout:,}", f"{plan.panel_completions:,}", f"{plan.panel_tokens:,}", "", "")
    return table


def _trained_part(plan: Plan) -> str:
    """How many of them an adapter trains; nothing to say where all are trained."""
    return "" if plan.recipe.train.lora is None else f", an adapter of {(plan.num_trained or 0) / 1e6:.1f} M trained"


def _print_disk(plan: Plan, console: Console) -> None:
    free = f"{plan.bytes_free / GB:.2f} GB free"
    if plan.bytes_needed is None:
        console.print(f"disk: unknown: {not_known(plan.recipe.model)}; {free}", markup=False, soft_wrap=True)
        return
    size = f"{(plan.num_parameters or 0) / 1e6:.1f} M parameters{_trained_part(plan)}"
    dtype = plan.recipe.train.save_dtype
    console.print(f"disk: about {plan.bytes_needed / GB:.2f} GB needed ({size}, policies in {dtype}); {free}")
    # a new checkpoint is whole before the oldest one goes
    each = (plan.num_trained or 0) * (4 + STATE_BYTES[plan.recipe.train.optim])
    console.print(
        f"      checkpoints while a round trains: {each / GB:.2f} GB each, at most {KEPT_CHECKPOINTS + 1} at a time"
    )
    if plan.bytes_needed > plan.bytes_free:
        console.print("warning: the disk has too little room for this run; free some or take another --out")
