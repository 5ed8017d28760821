"""A small reward model from preference rows: `selfplay train-reward`. A share of the prompts is held out, and what the model
gets right there lies beside its weights, for whoever judges with it.
"""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from selfplay import store
from selfplay.adapters import is_adapter
from selfplay.chat import Chat
from selfplay.errors import DataError, RecipeError
from selfplay.judges.reward_model import encode_conversation, load_reward_chat
from selfplay.labelled import accuracy_by_prompt, preference
from selfplay.models import computes_bf16, declared_length, local_model
from selfplay.preferences import Labelled, read_labelled
from selfplay.progress import Reporter
from selfplay.recipe_reward import RewardTraining
from selfplay.train.reward import RewardTrainer, TokenPair
from selfplay.trust import ACCURACY
from selfplay.types import derive_seed


@dataclass(frozen=True, slots=True)
class RewardInputs:
    """What is trained on what: a causal model and preference rows, a file or a data set id with its `name` and `split`."""

    model: str
    pairs: str
    name: str | None = None
    split: str = "train"
    prompt_column: str | None = None
    system_prompt: str | None = None
    chat_template: str | None = None


@dataclass(frozen=True, slots=True)
class _Row:
    labelled: Labelled
    tokens: TokenPair


def reward_training(**flags: Any) -> RewardTraining:
    """The settings in flags. RecipeError names each that is wrong."""
    try:
        return RewardTraining.model_validate(flags)
    except ValidationError as error:
        faults = [f"--{str(f['loc'][0]).replace('_', '-')}: {f['msg']} (found {f['input']!r})" for f in error.errors()]
        raise RecipeError("\n".join(faults)) from None


def train_reward(inputs: RewardInputs, settings: RewardTraining, out: Path, report: Reporter) -> dict[str, Any]:
    """What stands in accuracy.json. `out` then is the model's folder: it is there whole or not at all.

    RecipeError or DataError: `out` is there already, no rows, a model without a chat template, too few prompts to hold some
    out.
    """
    if out.exists():
        raise RecipeError(f"--out {out}: already there; remove it, or name another folder")
    base = local_model(inputs.model)
    if is_adapter(base):
        raise DataError(f"{base}: this is a LoRA adapter; merge it into its base model first (selfplay merge)")
    chat = load_reward_chat(base, inputs.chat_template, key="--chat-template")
    kept, heldout = _split(_read(inputs, settings, base, chat, report), settings)
    bf16 = computes_bf16() if settings.bf16 == "auto" else settings.bf16
    trainer = RewardTrainer(base, settings, num_pairs=len(kept), bf16=bf16)
    losses = trainer.train([row.tokens for row in kept], report)
    figures = {
        "base": store.weights_digest(base),
        "pairs": inputs.pairs,
        "num_train_pairs": len(kept),
        "num_train_prompts": _num_prompts(kept),
        "num_heldout_pairs": len(heldout),
        "num_heldout_prompts": _num_prompts(heldout),
        **_accuracy(heldout, trainer.margins([row.tokens for row in heldout])),
        **_length_alone(kept, heldout),
        "num_steps": len(losses),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "settings": settings.model_dump() | {"bf16": bf16},
    }
    template = chat.tokenizer.chat_template if inputs.chat_template is not None else None

    def write(folder: Path) -> None:
        trainer.save(folder, chat_template=template)
        figures["weights"] = store.weights_digest(folder)
        (folder / ACCURACY).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")

    out.parent.mkdir(parents=True, exist_ok=True)
    store.write_folder(out, write)
    return figures


def _read(inputs: RewardInputs, settings: RewardTraining, base: Path, chat: Chat, report: Reporter) -> list[_Row]:
    limit = declared_length(base)
    if limit is not None and settings.max_length is not None and settings.max_length > limit:
        raise RecipeError(f"--max-length {settings.max_length}: {base} has {limit} positions")
    longest = settings.max_length or limit
    labelled, drops = read_labelled(
        inputs.pairs,
        name=inputs.name,
        split=inputs.split,
        prompt_column=inputs.prompt_column,
        system_prompt=inputs.system_prompt,
    )
    reasons = Counter(drop.reason for drop in drops)
    rows = []
    for row in labelled:
        chosen, rejected = (encode_conversation(chat, row.prompt, text) for text in (row.chosen, row.rejected))
        if chosen == rejected:
            reasons["chosen equals rejected"] += 1
        elif longest is not None and max(len(chosen), len(rejected)) > longest:
            reasons[f"longer than {longest} tokens"] += 1
        else:
            rows.append(_Row(row, TokenPair(chosen, rejected)))
    assert len(rows) + reasons.total() == len(labelled) + len(drops)
    for reason, count in reasons.items():
        report.note(f"rows: {count} dropped: {reason}")
    return rows


def _split(rows: Sequence[_Row], settings: RewardTraining) -> tuple[list[_Row], list[_Row]]:
    """(rows to train on, held-out rows). No prompt is in both: completions of one prompt are much alike."""
    ids = sorted({row.labelled.prompt.id for row in rows})
    random.Random(derive_seed(settings.seed, "reward heldout")).shuffle(ids)
    heldout = set(ids[: round(settings.heldout * len(ids))])
    if not heldout or len(heldout) == len(ids):
        raise DataError(
            f"{len(ids)} prompts are left, and --heldout {settings.heldout:g} of them leaves none to train on or none to "
            "measure on: give more rows"
        )
    return (
        [row for row in rows if row.labelled.prompt.id not in heldout],
        [row for row in rows if row.labelled.prompt.id in heldout],
    )


def _num_prompts(rows: Sequence[_Row]) -> int:
    return len({row.labelled.prompt.id for row in rows})


def _accuracy(rows: Sequence[_Row], margins: Sequence[float]) -> dict[str, Any]:
    right = [preference(margin, 0.0) for margin in margins]
    accuracy, interval = accuracy_by_prompt([row.labelled.prompt.id for row in rows], right)
    return {"accuracy": accuracy, "accuracy_interval": interval, "includes_chance": interval[0] <= 0.5 <= interval[1]}


def _length_alone(kept: Sequence[_Row], heldout: Sequence[_Row]) -> dict[str, Any]:
    """What preferring the longer text, or the shorter one where that is right more often in training, gives held out."""

    def longer(rows: Sequence[_Row]) -> list[float]:
        return [preference(len(row.labelled.chosen), len(row.labelled.rejected)) for row in rows]

    prefers_longer = 2 * sum(longer(kept)) >= len(kept)
    right = [value if prefers_longer else 1 - value for value in longer(heldout)]
    accuracy, interval = accuracy_by_prompt([row.labelled.prompt.id for row in heldout], right)
    return {
        "length_prefers": "longer" if prefers_longer else "shorter",
        "length_accuracy": accuracy,
        "length_interval": interval,
    }
