"""What a run would do: `selfplay iterate RECIPE --dry-run`. Reads the data set and the headers of the weights; loads no
model, no tokenizer and no torch.
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from selfplay.adapters import base_folder
from selfplay.canaries import WHAT
from selfplay.errors import DataError
from selfplay.filters import make_mix
from selfplay.judges.verifier import check_verifiable
from selfplay.models import resolve_auto
from selfplay.prompts import PromptPool, check_gold, load_pool
from selfplay.recipe import Recipe
from selfplay.recipe_file import dump_recipe
from selfplay.recipe_filters import MixPreviousRecipe
from selfplay.recipe_judges import ApiJudgeRecipe, LLMJudgeRecipe
from selfplay.recipe_train import LoraRecipe
from selfplay.recipe_values import at_round
from selfplay.report import print_table
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
    num_prompts: int
    first_prompt: int | None  # place in dealing order; None where every round gets all prompts
    num_completions: int
    max_tokens: int
    temperature: float
    max_pairs: int
    max_steps: int
    settings: TrainSettings

    @property
    def tokens(self) -> int:
        return self.num_prompts * self.num_completions * self.max_tokens


@dataclass(frozen=True, slots=True)
class Plan:
    """All rounds, the panels, and the disk. Bytes are None where the model isn't on this machine."""

    recipe: Recipe
    pool: PromptPool
    rounds: tuple[RoundPlan, ...]
    panel_completions: int
    panel_tokens: int
    num_parameters: int | None
    num_trained: int | None  # fewer with train.lora
    bytes_needed: int | None
    bytes_free: int


def make_plan(recipe: Recipe, out: Path) -> Plan:
    """The plan of a run in `out`, finished rounds counted as there. Raises what starting the run would raise about the
    recipe and the data set.
    """
    _ = recipe.prompts.needed_source
    recipe.check_judged()
    recipe.check_win_rates()
    check_reward_models(recipe)
    recipe = _with_generator(recipe)
    pool = load_pool(recipe.prompts, seed=recipe.seed)
    for index in range(recipe.rounds):
        check_gold(recipe, pool.deal(recipe.prompts, index))
    check_verifiable(recipe, pool, judge_given=False)
    rounds = tuple(_plan_round(recipe, pool, index) for index in range(recipe.rounds))
    completions, tokens = _panel_work(recipe, len(pool.heldout[: recipe.evaluate.num_prompts]))
    folder = find_model(recipe.model)
    if recipe.train.reference_path is not None:
        find_model(recipe.train.reference_path)
    parameters = num_parameters(folder) if folder is not None else None
    trained = None if folder is None else num_trained(folder, recipe.train.lora)
    needed = None if trained is None else _bytes_needed(recipe, rounds, tokens, trained, out)
    return Plan(recipe, pool, rounds, completions, tokens, parameters, trained, needed, _bytes_free(out))


def _with_generator(recipe: Recipe) -> Recipe:
    """The recipe with the generator that this machine takes. A `bf16: auto` stays: to ask the machine would load torch."""
    known = recipe.train.model_copy(update={"bf16": False})
    return recipe.model_copy(update={"generator": resolve_auto(recipe.model_copy(update={"train": known})).generator})


def _plan_round(recipe: Recipe, pool: PromptPool, index: int) -> RoundPlan:
    prompts, generator, train = recipe.prompts, recipe.generator, recipe.train
    count = len(pool.deal(prompts, index))
    disjoint = prompts.deal == "disjoint" and prompts.num_prompts is not None
    settings = settings_at(train, index, bf16=train.bf16 is True)
    max_pairs = _most_pairs(recipe, [len(pool.deal(prompts, r)) for r in range(index + 1)])
    steps = math.ceil(max_pairs / settings.batch_size) * settings.num_train_epochs
    init = f"the policy of round {index - 1}" if index else recipe.model
    return RoundPlan(
        index=index,
        init=init,
        reference=_reference(recipe, index, init),
        num_prompts=count,
        first_prompt=sum(at_round(prompts.num_prompts or 0, r) for r in range(index)) + 1 if disjoint else None,
        num_completions=at_round(generator.num_completions, index),
        max_tokens=at_round(generator.max_tokens, index),
        temperature=at_round(generator.temperature, index),
        max_pairs=max_pairs,
        max_steps=settings.max_steps if settings.max_steps > 0 else steps,
        settings=settings,
    )


def _most_pairs(recipe: Recipe, num_prompts: list[int]) -> int:
    """The most pairs of a round that is dealt the last of `num_prompts`, those that it mixes in among them."""
    counts = [at_round(recipe.generator.num_completions, r) for r in range(len(num_prompts))]
    own = [n * recipe.pairs.most_pairs(r, counts[r]) for r, n in enumerate(num_prompts)]
    round = len(own) - 1
    for one in recipe.pairs.filters:
        if isinstance(one, MixPreviousRecipe):
            return own[-1] + make_mix(one, round).most_added(own)
    return own[-1]


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


def find_model(model: str) -> Path | None:
    """The folder of a model, or the snapshot of a hub id that is already on this machine; None where there is neither."""
    if Path(model).is_dir():
        return Path(model)
    if model.startswith(("/", ".")):
        raise DataError(f"model {model}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise DataError(f"model {model}: neither a folder here nor a hub id ({error})") from error


def num_parameters(folder: Path) -> int:
    """Parameters in the .safetensors files of a model (of its base, for an adapter), from their headers alone."""
    return sum(math.prod(shape) for shape in _shapes(base_folder(folder)).values())


def num_trained(folder: Path, lora: LoraRecipe | None) -> int:
    """Parameters that training changes: all, or those of an adapter, which are r (n + m) for each n x m matrix."""
    if lora is None:
        return num_parameters(folder)
    base = base_folder(folder)
    vocabulary = json.loads((base / "config.json").read_text()).get("vocab_size")
    total = 0
    for name, shape in _shapes(base).items():
        module = name.removesuffix(".weight").rpartition(".")[2]
        # peft's all-linear leaves out the head; embeddings are no linear layers
        asked = vocabulary not in shape if lora.target_modules == "all-linear" else module in lora.target_modules
        if asked and len(shape) == 2 and name.endswith(".weight"):
            total += lora.r * sum(shape)
    return total


def _shapes(folder: Path) -> dict[str, list[int]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(f"model {folder}: no .safetensors weights in this folder (see selfplay import-gguf)")
    return {name: shape for file in files for name, shape in _shapes_in(file).items()}


def _shapes_in(file: Path) -> dict[str, list[int]]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            raise DataError(f"{file}: no safetensors file, or cut short; fetch it again")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise DataError(f"{file}: no safetensors file ({error}); fetch it again") from error
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def _bytes_needed(recipe: Recipe, rounds: tuple[RoundPlan, ...], panel_tokens: int, parameters: int, out: Path) -> int:
    """What is still to be written and stays. An ema of the reference is kept from round 1 on."""
    left = [plan for plan in rounds if not (out / f"round-{plan.index:03d}" / "policy").exists()]
    per_round = parameters * BYTES_PER_VALUE[recipe.train.save_dtype]
    if recipe.train.optimizer_state == "carried":
        per_round += parameters * STATE_BYTES[recipe.train.optim]
    ema = parameters * 4 * sum(plan.index > 0 for plan in left) if recipe.train.reference == "ema" else 0
    tokens = sum(plan.tokens for plan in left) + (panel_tokens if left else 0)
    base = 0
    if (
        left
        and recipe.train.lora is not None
        and recipe.train.lora.load_in_4bit
        and (folder := find_model(recipe.model))
    ):
        # base-4bit, in the dtype that training computes in
        base = num_parameters(folder) * (4 if recipe.train.bf16 is False else 2) * (not (out / BASE).exists())
    return len(left) * per_round + ema + base + tokens * RECORD_BYTES_PER_TOKEN


def _bytes_free(out: Path) -> int:
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def print_plan(plan: Plan, console: Console) -> None:
    """The resolved recipe, each round, the work, the disk."""
    console.print(dump_recipe(plan.recipe), markup=False, soft_wrap=True)
    pool = plan.pool
    console.print(f"prompts: {len(pool.train)} for training, {len(pool.heldout)} held out (form: {pool.form})")
    for line in pool.drop_lines:
        console.print(f"         {line}", markup=False, soft_wrap=True)
    if pool.drops:
        console.print("         prompts over max_prompt_length are dropped later")
    console.print()
    for round in plan.rounds:
        for line in _round_lines(plan.recipe, round):
            console.print(line, markup=False, soft_wrap=True)
    console.print()
    print_table("work, at most", _work_table(plan), console)
    _print_disk(plan, console)


def _round_lines(recipe: Recipe, plan: RoundPlan) -> list[str]:
    settings = plan.settings
    data = "all" if plan.first_prompt is None else f"{plan.first_prompt} to {plan.first_prompt + plan.num_prompts - 1}"
    span = "the run" if recipe.train.schedule_scope == "run" else "the round"
    optimizer = "fresh" if recipe.train.optimizer_state == "fresh" or not plan.index else "of the round before"
    return [
        f"round {plan.index}",
        f"  init       {plan.init}",
        f"  reference  {_reference_line(plan)}",
        f"  data       prompts {data} in dealing order, {plan.num_completions} completions each "
        f"(temperature {plan.temperature:g}, at most {plan.max_tokens} tokens)",
        *_canary_lines(recipe, plan),
        f"  pairs      {' -> '.join([recipe.pairs.kind, *(one.kind for one in recipe.pairs.filters)])}",
        f"  schedule   learning_rate {settings.learning_rate:g}, {settings.lr_scheduler_type} over {span}, "
        f"warmup_steps {settings.warmup_steps:g}; optimizer {optimizer}",
        f"  train      {_loss_line(settings)}, batch_size {settings.batch_size}, "
        + (f"{settings.max_steps} steps" if settings.max_steps > 0 else f"{settings.num_train_epochs} epochs"),
    ]


def _canary_lines(recipe: Recipe, plan: RoundPlan) -> list[str]:
    """What canaries cost the judge, at most; nothing where there are none."""
    prompts = min(recipe.num_canaries, plan.num_prompts)
    if not prompts:
        return []
    several = recipe.judge.num_verdicts if isinstance(recipe.judge, LLMJudgeRecipe | ApiJudgeRecipe) else 1
    times = f" x {several} verdicts" if several > 1 else ""
    shown = f"{len(WHAT)} canaries for each of {prompts} prompts, {2 * len(WHAT) * prompts} completions to judge"
    return [f"  audit      {shown}{times}, beside {plan.num_prompts * plan.num_completions}"]


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
    heldout = len(plan.pool.heldout[: plan.recipe.evaluate.num_prompts])
    table.add_row("panels", f"{heldout:,}", f"{plan.panel_completions:,}", f"{plan.panel_tokens:,}", "", "")
    return table


def _trained_part(plan: Plan) -> str:
    """How many of them an adapter trains; nothing to say where all are trained."""
    return "" if plan.recipe.train.lora is None else f", an adapter of {(plan.num_trained or 0) / 1e6:.1f} M trained"


def _print_disk(plan: Plan, console: Console) -> None:
    free = f"{plan.bytes_free / GB:.2f} GB free"
    if plan.bytes_needed is None:
        console.print(f"disk: unknown, for {plan.recipe.model} is not on this machine; {free}", markup=False)
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
