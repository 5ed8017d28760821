"""Training on its own: one job over our pairs, over any preference data set, or over single completions (SFT)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.adapters import check_lora
from selfplay.chat import Chat
from selfplay.errors import DataError, RecipeError
from selfplay.models import load_chat, named_model, resolve_auto
from selfplay.preferences import holds_preferences, our_records, read_demonstrations, read_preferences
from selfplay.progress import Reporter
from selfplay.recipe import Recipe
from selfplay.recipe_train import reads
from selfplay.single import claimed, source_shards, text_digest
from selfplay.train.devices import Devices, require_machines, require_possible
from selfplay.train.settings import TrainJob, require_packages, schedule_span, settings_at
from selfplay.types import Demonstration, Drop, PreferencePair, derive_seed


@dataclass(frozen=True, slots=True)
class TrainInputs:
    """What is trained on what. `preferences` is a pairs.jsonl, another file, or a data set id with its `name` and `split`.

    `reference` stands in for what the recipe says; in a later round of an ema it is the reference of the round before.
    `groups` are what the model sampled: with them the engine's logps are checked against the trainer's.
    `optimizer_state` is the train/optimizer.safetensors of the round before, where a recipe carries it on.
    """

    model: str
    preferences: str
    name: str | None = None
    split: str = "train"
    reference: str | None = None
    groups: Path | None = None
    optimizer_state: Path | None = None
    round: int = 0
    devices: Devices | None = None


def train(recipe: Recipe, inputs: TrainInputs, out: Path, report: Reporter) -> dict[str, Any]:
    """What stands in train/result.json; `out` then holds policy/."""
    recipe = resolve_auto(recipe)
    _check_inputs(recipe, inputs)
    require_packages(recipe.train)
    require_possible(recipe.train, inputs.devices)
    require_machines(inputs.devices)
    folder = named_model(recipe, inputs.model)
    check_lora(folder, recipe.train.lora)
    chat = load_chat(str(folder), recipe.chat)
    job = make_job(recipe, inputs, folder, out, chat)
    with claimed(out, _identity(job, inputs, recipe, chat), report):
        if (out / "policy").exists():
            store.remove_folder(out / "train" / "checkpoints")  # a kill may have come between the two
        else:
            from selfplay.train.four_bit import playable
            from selfplay.train.launch import launch

            start, rows = playable(folder, out, recipe.train), _our_rows(recipe, inputs, chat, out, report)
            launch(replace(job, policy=str(start), pairs=str(rows)), report, inputs.devices)
        result: dict[str, Any] = store.read_json(out / "train" / "result.json")
    return result


def _check_inputs(recipe: Recipe, inputs: TrainInputs) -> None:
    train = recipe.train
    if inputs.round and inputs.reference is None and train.reference in ("initial", "ema"):
        whose = "the initial policy" if train.reference == "initial" else "mixed from that of the round before"
        raise RecipeError(f"train.reference is {whose}: name it with --reference")
    if train.reference is None and inputs.reference is not None:
        raise RecipeError(f"--reference is given, but train.loss_type {' + '.join(train.losses)} reads no reference")
    if train.reference_logps == "engine" and inputs.groups is None:
        raise RecipeError("train.reference_logps is engine: name what the model sampled with --groups")
    if inputs.round and recipe.train.optimizer_state == "carried" and inputs.optimizer_state is None:
        raise RecipeError("train.optimizer_state is carried: name the file of the round before with --optimizer-state")
    if inputs.optimizer_state is not None and train.optimizer_state == "fresh":
        raise RecipeError(
            "--optimizer-state is given, but train.optimizer_state is fresh: say carried, or leave it out"
        )
    if inputs.optimizer_state is not None and not inputs.optimizer_state.is_file():
        raise DataError(f"{inputs.optimizer_state}: no such file")


def make_job(recipe: Recipe, inputs: TrainInputs, folder: Path, out: Path, chat: Chat) -> TrainJob:
    """The job that `iterate` gives the trainer in this round."""
    train, round = recipe.train, inputs.round
    first_step, total_steps = schedule_span(train, round, rounds=recipe.rounds)
    carried = train.optimizer_state == "carried"
    return TrainJob(
        policy=str(folder),
        pairs=inputs.preferences,
        out=str(out),
        settings=settings_at(train, round, bf16=bool(train.bf16)),
        seed=derive_seed(recipe.seed, round, "train"),
        reference=_reference(recipe, inputs, folder),
        ref_model_mixup_alpha=train.ref_model_mixup_alpha if round else None,
        groups=_sampled(recipe, inputs),
        optimizer_state=str(inputs.optimizer_state) if carried and inputs.optimizer_state is not None else None,
        keep_optimizer_state=carried,
        first_step=first_step,
        total_steps=total_steps,
        schedule_epochs=train.schedule_epochs,
        chat_template=recipe.chat.chat_template and chat.tokenizer.chat_template,
    )


def _sampled(recipe: Recipe, inputs: TrainInputs) -> tuple[str, ...]:
    if inputs.groups is None:
        return ()
    found = source_shards(recipe, inputs.groups, inputs.round)
    return tuple(str(path) for paths in found.values() for path in paths)


def _reference(recipe: Recipe, inputs: TrainInputs, folder: Path) -> str | None:
    """None where the reference is the model itself: one copy of the weights then serves twice."""
    named = inputs.reference or recipe.train.reference_path
    if named is None:
        return None
    other = named_model(recipe, named)
    if store.weights_digest(other) == store.weights_digest(folder):
        return None
    if recipe.train.reference_logps == "engine":
        raise RecipeError(
            f"train.reference_logps is engine, but {other} is not the model that sampled. Say reference_logps: trainer"
        )
    return str(other)


def _identity(job: TrainJob, inputs: TrainInputs, recipe: Recipe, chat: Chat) -> dict[str, Any]:
    source = Path(inputs.preferences)
    state = job.optimizer_state
    return {
        "stage": "train",
        "model": store.weights_digest(Path(job.policy)),
        "reference": store.weights_digest(Path(job.reference)) if job.reference is not None else None,
        "ref_model_mixup_alpha": job.ref_model_mixup_alpha,
        "groups": [store.file_digest(Path(path)) for path in job.groups] if reads_groups(job) else None,
        "pairs": store.file_digest(source) if source.is_file() else [str(source), inputs.name, inputs.split],
        "settings": {key: value for key, value in asdict(job.settings).items() if key != "save_steps"},
        "seed": job.seed,
        "optimizer_state": store.file_digest(Path(state)) if state is not None else None,
        "schedule": job.schedule,
        "chat": text_digest(chat.template_digest_text),
        "rows": recipe.prompts.model_dump(
            include={"system_prompt", "prompt_column", "gold_column", "turns", "max_prompt_length"}
        ),
    }


def reads_groups(job: TrainJob) -> bool:
    """Whether groups decide what is trained; else they are for the audit."""
    return job.settings.reference_logps == "engine"


def _our_rows(recipe: Recipe, inputs: TrainInputs, chat: Chat, out: Path, report: Reporter) -> Path:
    """The file itself where its records are ours; else what its rows became, in `out`, with drops.jsonl beside it."""
    source = inputs.preferences
    if our_records(source) is not None:
        return Path(source)
    with_rejected = "rejected" in reads(recipe.train.losses)
    if with_rejected or holds_preferences(source, name=inputs.name, split=inputs.split):
        return _pairs_of(recipe, inputs, chat, out, report)
    prompts = recipe.prompts.model_copy(update={"name": inputs.name, "split": inputs.split})
    found = read_demonstrations(source, chat, prompts)
    report.note(f"demonstrations: {len(found.rows)} rows (form: {found.form})")
    _write_drops(found.drops, out, report)
    store.write_records(out / "demonstrations.jsonl", found.rows, Demonstration)
    return out / "demonstrations.jsonl"


def _pairs_of(recipe: Recipe, inputs: TrainInputs, chat: Chat, out: Path, report: Reporter) -> Path:
    found = read_preferences(
        inputs.preferences,
        chat,
        name=inputs.name,
        split=inputs.split,
        prompt_column=recipe.prompts.prompt_column,
        system_prompt=recipe.prompts.system_prompt,
        max_prompt_length=recipe.prompts.max_prompt_length,
    )
    report.note(f"preferences: {len(found.pairs)} pairs (form: {found.form})")
    _write_drops(found.drops, out, report)
    store.write_records(out / "pairs.jsonl", found.pairs, PreferencePair)
    return out / "pairs.jsonl"


def _write_drops(drops: Sequence[Drop], out: Path, report: Reporter) -> None:
    for reason, count in Counter(drop.reason for drop in drops).items():
        report.note(f"rows: {count} dropped: {reason}")
    store.write_records(out / "drops.jsonl", drops, Drop)
