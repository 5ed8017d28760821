"""Masters, optimizers, schedules and the order of the steps."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import job_of, random_pairs, steps, train, weights
from safetensors.torch import load_file, save_file

from selfplay import store
from selfplay.errors import DataError, StorageError
from selfplay.train.loop import run_training
from selfplay.types import PreferencePair


def test_masters_keep_updates_below_the_spacing_of_bf16(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    rows = train(tmp_path, tiny, pairs, bf16=True, learning_rate=1e-6, lr_scheduler_type="constant", shuffle=False)
    assert len(rows) == 3
    before, after = weights(tiny), weights(tmp_path / "out" / "policy")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert after[name].dtype == torch.float32
    moved = (after[name] - before[name]).abs()
    assert (moved > 0).float().mean() > 0.9
    # AdamW moves a weight by about the learning rate each step, in fp32 as in bf16
    assert moved.max() < 4e-6
    assert moved.median() > 5e-7
    assert (after[name].bfloat16() == before[name].bfloat16()).float().mean() > 0.99


def test_bf16_compute_follows_fp32(tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path) -> None:
    full = train(tmp_path / "full", tiny, pairs, num_train_epochs=2)
    half = train(tmp_path / "half", tiny, pairs, num_train_epochs=2, bf16=True)
    for one, other in zip(full, half, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=0.05)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.1)


def test_max_steps_goes_on_into_further_epochs_or_stops_within_one(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    rows = train(tmp_path / "more", tiny, pairs, max_steps=5, batch_size=4, shuffle=False)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["epoch"] == pytest.approx(5 / 3, abs=1e-3)
    assert len(train(tmp_path / "less", tiny, pairs, max_steps=2, num_train_epochs=9)) == 2


def test_unshuffled_steps_follow_the_file(tiny: Path, tmp_path: Path) -> None:
    drawn = random_pairs(num_prompts=6, num_completions=2)
    # one pair a step: the chosen logps of step n are those of pair n under a rate too small to matter
    rows = train(tmp_path, tiny, drawn, shuffle=False, batch_size=1, learning_rate=1e-12)
    reference = load_file(tmp_path / "out" / "reference.safetensors")["chosen"]
    assert [row["logps/chosen"] for row in rows] == pytest.approx(reference.tolist(), rel=1e-5)
    assert len({round(float(x), 3) for x in reference}) == 6


def test_every_epoch_has_its_own_order(tiny: Path, tmp_path: Path) -> None:
    drawn = random_pairs(num_prompts=6, num_completions=2)
    rows = train(tmp_path, tiny, drawn, batch_size=1, num_train_epochs=3, learning_rate=1e-12)
    epochs = [[round(row["logps/chosen"], 3) for row in rows[n : n + 6]] for n in (0, 6, 12)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]


def test_two_jobs_with_carried_state_and_the_runs_schedule_are_one_long_job(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    whole: dict[str, Any] = {"shuffle": False, "warmup_steps": 2, "lr_scheduler_type": "cosine"}
    long = job_of(tmp_path / "long", tiny, pairs, job={"reference": str(tiny)}, max_steps=6, **whole)
    run_training(long)
    one = job_of(
        tmp_path / "one",
        tiny,
        pairs,
        job={"reference": str(tiny), "keep_optimizer_state": True, "total_steps": 6},
        max_steps=3,
        **whole,
    )
    run_training(one)
    state = tmp_path / "one/out/train/optimizer.safetensors"
    following = {"policy": str(tmp_path / "one/out/policy"), "first_step": 3, "optimizer_state": str(state)}
    two = dataclasses.replace(one, **following, out=str(tmp_path / "two" / "out"))
    run_training(two)
    rates = [row["learning_rate"] for name in ("one", "two") for row in steps(tmp_path / name)]
    assert rates == [row["learning_rate"] for row in steps(tmp_path / "long")]
    assert rates[0] == 0
    assert max(rates) == pytest.approx(1e-3)
    long_policy, two_policy = weights(tmp_path / "long/out/policy"), weights(tmp_path / "two/out/policy")
    assert all(torch.equal(long_policy[name], two_policy[name]) for name in long_policy)
    fresh = dataclasses.replace(two, optimizer_state=None, out=str(tmp_path / "fresh" / "out"))
    run_training(fresh)
    fresh_policy = weights(tmp_path / "fresh/out/policy")
    assert not all(torch.equal(fresh_policy[name], two_policy[name]) for name in fresh_policy)


def test_optimizer_state_of_another_model_or_damaged_is_refused(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    state = tmp_path / "optimizer.safetensors"
    store.write_file(state, lambda path: save_file({"0/step": torch.tensor(1.0)}, path))
    with pytest.raises(DataError, match="optimizer state"):
        run_training(job_of(tmp_path, tiny, pairs, job={"optimizer_state": str(state)}))
    state.write_bytes(state.read_bytes()[:-1] + b"\xff")
    with pytest.raises(StorageError, match="damaged"):
        run_training(job_of(tmp_path, tiny, pairs, job={"optimizer_state": str(state)}))


@pytest.mark.parametrize("kind", ["linear", "constant", "constant_with_warmup", "cosine"])
def test_learning_rates_follow_the_schedule(
    kind: str, tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    rows = train(tmp_path, tiny, pairs, lr_scheduler_type=kind, warmup_steps=0.5, max_steps=4, learning_rate=1e-3)
    rates = [row["learning_rate"] for row in rows]
    wanted = {
        "linear": [0, 5e-4, 1e-3, 5e-4],
        "constant": [1e-3] * 4,
        "constant_with_warmup": [0, 5e-4, 1e-3, 1e-3],
        "cosine": [0, 5e-4, 1e-3, 5e-4],
    }
    assert rates == pytest.approx(wanted[kind], abs=1e-12)


def test_optimizers_differ_and_weight_decay_spares_norms(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    plain = {"max_steps": 1, "loss_type": "sigmoid"}
    train(tmp_path / "adamw", tiny, pairs, **plain)
    train(tmp_path / "rmsprop", tiny, pairs, optim="rmsprop", **plain)
    train(tmp_path / "decayed", tiny, pairs, weight_decay=0.5, **plain)
    adamw, rmsprop, decayed = (weights(tmp_path / n / "out/policy") for n in ("adamw", "rmsprop", "decayed"))
    matrix, norm = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    assert not torch.equal(adamw[matrix], rmsprop[matrix])
    assert torch.equal(adamw[norm], decayed[norm])
    assert torch.allclose(adamw[matrix] - decayed[matrix], weights(tiny)[matrix] * 1e-3 * 0.5, atol=1e-7)
