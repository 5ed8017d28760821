"""DPO on its own: one training job over our pairs or over any preference data set."""

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.adapters import check_lora
from selfplay.chat import Chat
from selfplay.errors import DataError, RecipeError
from selfplay.models import load_chat, local_model, resolve_auto
from selfplay.preferences import holds_our_pairs, read_preferences
from selfplay.progress import Reporter
from selfplay.recipe import Recipe
from selfplay.single import claimed, read_shards
from selfplay.train.settings import TrainJob, require_optimizer, schedule_span, settings_at
from selfplay.types import Drop, PreferencePair, derive_seed


@dataclass(frozen=True, slots=True)
class TrainInputs:
    """What is trained on what. `preferences` is a pairs.jsonl, another file, or a data set id with its `name` and `split`.

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


def train(recipe: Recipe, inputs: TrainInputs, out: Path, report: Reporter) -> dict[str, Any]:
    """What stands in train/result.json; `out` then holds policy/."""
    recipe = resolve_auto(recipe)
    _check_inputs(recipe, inputs)
    require_optimizer(recipe.train)
    folder = local_model(inputs.model)
    check_lora(folder, recipe.train.lora)
    chat = load_chat(str(folder), recipe.chat)
    job = make_job(recipe, inputs, folder, out, chat)
    with claimed(out, _identity(job, inputs), report):
        if (out / "policy").exists():
            store.remove_folder(out / "train" / "checkpoints")  # a kill may have come between the two
        else:
            from selfplay.train.launch import launch

            launch(replace(job, pairs=str(_our_pairs(recipe, inputs, chat, out, report))), report)
        result: dict[str, Any] = store.read_json(out / "train" / "result.json")
    return result


def _check_inputs(recipe: Recipe, inputs: TrainInputs) -> None:
    if inputs.round and recipe.train.reference == "initial" and inputs.reference is None:
        raise RecipeError("train.reference is the initial policy: name it with --reference")
    if inputs.round and recipe.train.optimizer_state == "carried" and inputs.optimizer_state is None:
        raise RecipeError("train.optimizer_state is carried: name the file of the round before with --optimizer-state")
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
        reference=_reference(inputs, folder),
        groups=tuple(str(path) for path in read_shards(inputs.groups)) if inputs.groups is not None else (),
        optimizer_state=str(inputs.optimizer_state) if carried and inputs.optimizer_state is not None else None,
        keep_optimizer_state=carried,
        first_step=first_step,
        total_steps=total_steps,
        chat_template=recipe.chat.chat_template and chat.tokenizer.chat_template,
    )


def _reference(inputs: TrainInputs, folder: Path) -> str | None:
    """None where the reference is the model itself: one copy of the weights then serves twice."""
    if inputs.reference is None:
        return None
    other = local_model(inputs.reference)
    return None if store.weights_digest(other) == store.weights_digest(folder) else str(other)


def _identity(job: TrainJob, inputs: TrainInputs) -> dict[str, Any]:
    source = Path(inputs.preferences)
    state = job.optimizer_state
    return {
        "stage": "train",
        "model": store.weights_digest(Path(job.policy)),
        "reference": store.weights_digest(Path(job.reference)) if job.reference is not None else None,
        "pairs": store.file_digest(source) if source.is_file() else [str(source), inputs.name, inputs.split],
        "settings": {key: value for key, value in asdict(job.settings).items() if key != "save_steps"},
        "seed": job.seed,
        "optimizer_state": store.file_digest(Path(state)) if state is not None else None,
        "schedule": [job.first_step, job.total_steps],
        "chat_template": job.chat_template,
    }


def _our_pairs(recipe: Recipe, inputs: TrainInputs, chat: Chat, out: Path, report: Reporter) -> Path:
    """The pairs file itself where it is ours; else what its rows became, in `out`, with drops.jsonl beside it."""
    if holds_our_pairs(inputs.preferences):
        return Path(inputs.preferences)
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
    for reason, count in Counter(drop.reason for drop in found.drops).items():
        report.note(f"preferences: {count} rows dropped: {reason}")
    store.write_records(out / "drops.jsonl", found.drops, Drop)
    store.write_records(out / "pairs.jsonl", found.pairs, PreferencePair)
    return out / "pairs.jsonl"
