"""FSDP2 with everything else that a recipe may ask of training: two processes do what one does."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from jobs import flat, job_of, random_pairs, steps
from ranks import spawn
from safetensors.torch import load_file
from tiny import make_tiny_model

from selfplay.train.loop import run_training
from selfplay.train.settings import TrainJob

pytestmark = pytest.mark.slow

PAIRS = random_pairs(num_prompts=7, num_completions=2)
RIG: dict[str, Any] = {"batch_size": 3, "num_train_epochs": 2, "max_pack_tokens": 60}
LORA: dict[str, Any] = {"lora": {"r": 4, "lora_alpha": 8}}
CARRIED: dict[str, Any] = {"job": {"keep_optimizer_state": True}}
# What is changed, and by how much the step that training made may differ from that of one process. Where bf16 computes,
# other packs round otherwise.
VARIANTS: dict[str, tuple[dict[str, Any], float]] = {
    "lora": (LORA, 1e-3),
    "lora-bf16": ({**LORA, "bf16": True}, 0.1),
    "bf16-checkpointing": ({"bf16": True, "gradient_checkpointing": True}, 0.1),
    "rmsprop": ({"optim": "rmsprop", **CARRIED}, 1e-3),
    "carried": (CARRIED, 1e-3),
    "other-reference": ({}, 1e-3),
    "ema": ({}, 1e-3),
    "two-losses": ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, 1e-3),
}


def jobs(folder: Path, tiny: Path, other: Path) -> dict[str, TrainJob]:
    made = {name: job_of(folder / name, tiny, PAIRS, **{**RIG, **changes}) for name, (changes, _) in VARIANTS.items()}
    made["other-reference"] = dataclasses.replace(made["other-reference"], reference=str(other))
    made["ema"] = dataclasses.replace(made["ema"], reference=str(other), ref_model_mixup_alpha=0.5)
    for name in ("rmsprop", "carried"):  # a second round goes on with the state of the first one
        second = job_of(folder / f"{name}-on", tiny, PAIRS, **{**RIG, **VARIANTS[name][0]})
        state = str(Path(made[name].out) / "train" / "optimizer.safetensors")
        made[f"{name}-on"] = dataclasses.replace(second, policy=f"{made[name].out}/policy", optimizer_state=state)
    return made


@pytest.fixture(scope="module")
def played(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every job by one process, in one/, and by two, in two/."""
    folder = tmp_path_factory.mktemp("sharded")
    other = make_tiny_model(folder / "other", seed=3)
    for job in jobs(folder / "one", tiny, other).values():
        run_training(job)
    tasks = [dataclasses.asdict(job) for job in jobs(folder / "two", tiny, other).values()]
    (folder / "two").mkdir(exist_ok=True)
    spawn(folder / "two", [{"job": job, "fsdp": True, "fault": None, "rank": None} for job in tasks])
    return folder


@pytest.mark.parametrize("name", [*VARIANTS, "rmsprop-on", "carried-on"])
def test_two_processes_with_cut_weights_make_the_steps_of_one(name: str, played: Path, tiny: Path) -> None:
    files = list((played / "two" / name).glob("ranks-*.json"))
    assert len(files) == 2
    for seen in (json.loads(file.read_text()) for file in files):
        assert seen["error"] is None
        assert seen["sharded"] == seen["parameters"] > 0, "frozen weights are cut as well"
    one, two = (flat(played / kind / name / "out/policy") for kind in ("one", "two"))
    start = played / "one" / name.removesuffix("-on") / "out/policy" if name.endswith("-on") else tiny
    moved = (one - flat(start)).norm() if one.shape == flat(start).shape else one.norm()
    tolerance = VARIANTS[name.removesuffix("-on")][1]
    assert (one - two).norm() <= tolerance * moved
    if tolerance < 0.1:
        assert (one - two).norm() <= 1e-5 * one.norm()
    for ours, theirs in zip(steps(played / "two" / name), steps(played / "one" / name), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", ["rmsprop", "carried"])
def test_the_state_of_a_cut_optimizer_is_whole_on_disk(name: str, played: Path) -> None:
    one, two = (load_file(played / kind / name / "out/train/optimizer.safetensors") for kind in ("one", "two"))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert two[key].shape == tensor.shape, key
        assert (two[key].float() - tensor.float()).norm() <= 1e-4 * tensor.float().norm() + 1e-12, key
