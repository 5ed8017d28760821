"""Pairs and training jobs for tests: small, real, and made from plain values."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from selfplay import store
from selfplay.generators.engine import EngineSettings, Request
from selfplay.recipe_train import TrainRecipe
from selfplay.train.settings import TrainJob, TrainSettings, settings_at
from selfplay.train.world import World
from selfplay.types import Message, PreferencePair, Sampling

if TYPE_CHECKING:
    from torch import Tensor

ALONE = World(torch.device("cpu"))
Tokens = tuple[int, ...]


def pair_of(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int], **values: Any) -> PreferencePair:
    """A pair of bare token ids; its texts spell the ids."""
    name = "-".join(map(str, prompt))
    return PreferencePair(
        prompt_id=name,
        prompt=(Message("user", name),),
        chosen=(Message("assistant", str(chosen)),),
        rejected=(Message("assistant", str(rejected)),),
        prompt_token_ids=tuple(prompt),
        chosen_token_ids=tuple(chosen),
        rejected_token_ids=tuple(rejected),
        **values,
    )


def random_pairs(
    *, num_prompts: int = 3, num_completions: int = 3, prompt_length: int = 12, length: int = 8, seed: int = 0
) -> list[PreferencePair]:
    """All ordered pairs (a before b) of every prompt's completions, of lengths from about half to the given ones. Ids lie
    in 6..259, the bytes of the tiny tokenizer; every completion ends with its end token, 1.
    """
    draw = random.Random(seed)

    def tokens(most: int) -> Tokens:
        return tuple(draw.randrange(6, 260) for _ in range(draw.randint(max(1, most // 2), most)))

    pairs = []
    for _ in range(num_prompts):
        prompt = tokens(prompt_length)
        completions = [(*tokens(length), 1) for _ in range(num_completions)]
        pairs += [pair_of(prompt, a, b) for n, a in enumerate(completions) for b in completions[n + 1 :]]
    return pairs


def settings(**changes: Any) -> TrainSettings:
    """A recipe's defaults, fp32, one batch size for tiny data, and `changes`."""
    recipe = TrainRecipe.model_validate({"learning_rate": 1e-3, "batch_size": 4, **changes})
    return settings_at(recipe, 0, bf16=recipe.bf16 is True)


def job_of(
    folder: Path, model: Path, pairs: Sequence[PreferencePair], *, job: dict[str, Any] | None = None, **changes: Any
) -> TrainJob:
    """A training job over `pairs` in `folder`; `job` sets fields of TrainJob, the rest are settings."""
    store.write_records(folder / "pairs.jsonl", pairs, PreferencePair)
    made = TrainJob(str(model), str(folder / "pairs.jsonl"), str(folder / "out"), settings(**changes), seed=0)
    return replace(made, **(job or {}))


def train(folder: Path, model: Path, pairs: Sequence[PreferencePair], **changes: Any) -> list[dict[str, Any]]:
    """Runs `job_of` and returns its steps."""
    from selfplay.train.loop import run_training

    run_training(job_of(folder, model, pairs, **changes))
    return steps(folder)


def steps(folder: Path) -> list[dict[str, Any]]:
    """The lines of steps.jsonl of a job in `folder`."""
    return store.read_json_lines(folder / "out" / "train" / "steps.jsonl")


def logps_of(model: Any, pairs: Sequence[PreferencePair]) -> "Tensor":
    """Per-token logps of all completions under a loaded model, in one pack."""
    from selfplay.train.logps import TokenLogps
    from selfplay.train.pack import build_packs

    (pack,) = build_packs(pairs, range(len(pairs)), max_pack_tokens=4096, shared=True)
    with torch.no_grad():
        return TokenLogps(model)(pack)


def greedy(settings: EngineSettings, prompt: Tokens) -> tuple[Tokens, "Tensor"]:
    """Token ids of a greedy completion by the transformers engine, at most 16, and their logps."""
    from selfplay.generators.transformers import TransformersEngine

    (result,) = TransformersEngine(settings).run([Request("a", prompt, 0, Sampling(temperature=0.0, max_tokens=16))])
    return result.token_ids, torch.tensor(result.logps)


def weights(model: Path) -> dict[str, "Tensor"]:
    """The tensors of a model's folder, or of an adapter's."""
    from safetensors.torch import load_file

    return load_file(next(model.glob("*model.safetensors")))


def flat(model: Path) -> "Tensor":
    """All of them in one vector."""
    return torch.cat([tensor.flatten() for _, tensor in sorted(weights(model).items())])
