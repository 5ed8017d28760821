"""Masters, optimizers, schedules and the order of the steps."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from jobs import job_of, random_pairs, settings, steps, train, weights
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model

from selfplay import faults, store
from selfplay.errors import DataError, RecipeError, StorageError
from selfplay.recipe_schedule import ScheduleName
from selfplay.recipe_train import TrainRecipe
from selfplay.train.loop import run_training
from selfplay.train.optim import make_schedule
from selfplay.train.settings import TrainJob, require_packages
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


def test_a_schedule_may_be_longer_than_what_is_trained(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    # 12 pairs of 4 prompts in steps of 3: 4 steps an epoch
    set_up: dict[str, Any] = {"batch_size": 3, "warmup_steps": 0.25}
    short = train(tmp_path / "short", tiny, pairs, num_train_epochs=3, **set_up)
    long = train(tmp_path / "long", tiny, pairs, num_train_epochs=1, job={"schedule_epochs": 3}, **set_up)
    rates = [[row["learning_rate"] for row in rows] for rows in (short, long)]
    assert len(rates[0]) == 12
    assert rates[1] == rates[0][:4]
    assert rates[1] == pytest.approx([0.0, 1e-3 / 3, 2e-3 / 3, 1e-3])


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


# Rates in thousandths over 6 steps, the first 2 of them warm-up, worked by hand: cos(pi/4) = 0.7071, 1/sqrt(2) = 0.7071.
RATES: dict[str, tuple[dict[str, Any], list[float]]] = {
    "linear": ({}, [0, 0.5, 1, 0.75, 0.5, 0.25]),
    "cosine": ({}, [0, 0.5, 1, 0.853553, 0.5, 0.146447]),
    "cosine_with_restarts": ({"num_cycles": 2}, [0, 0.5, 1, 0.5, 1, 0.5]),
    "polynomial": ({"power": 2, "lr_end": 1e-4}, [0, 0.5, 1, 0.60625, 0.325, 0.15625]),
    "constant_with_warmup": ({}, [0, 0.5, 1, 1, 1, 1]),
    "inverse_sqrt": ({"timescale": 2}, [0, 0.5, 1, 0.816497, 0.707107, 0.632456]),
    "cosine_with_min_lr": ({"min_lr": 2e-4}, [0, 0.5, 1, 0.882843, 0.6, 0.317157]),
    # it has no step at rate 0, and ends one step earlier
    "cosine_warmup_with_min_lr": ({"min_lr_rate": 0.2}, [0.5, 1, 0.882843, 0.6, 0.317157, 0.2]),
    "warmup_stable_decay": ({"num_decay_steps": 2, "decay_type": "linear"}, [0, 0.5, 1, 1, 1, 0.5]),
}


def test_every_schedule_of_a_recipe_is_tried_here() -> None:
    assert {*RATES, "constant"} == set(get_args(ScheduleName))


@pytest.mark.parametrize("kind", [*RATES, "constant"])
def test_learning_rates_follow_the_schedule_from_any_step(kind: str, tiny: Path) -> None:
    kwargs, wanted = RATES.get(kind, ({}, [1.0] * 6))
    chosen = settings(
        lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs, warmup_steps=2 if kind in RATES else 0, max_steps=6
    )
    job = TrainJob("", "", "", chosen, seed=0)
    for done in (0, 4):
        optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=chosen.learning_rate)
        schedule = make_schedule(optimizer, job, 6, done=done)
        rates = []
        for _ in range(done, 6):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        assert rates == pytest.approx([rate * 1e-3 for rate in wanted[done:]], abs=1e-9)


def test_warmup_may_be_a_share_and_must_fit_the_schedule(tiny: Path) -> None:
    weights = [torch.zeros(1, requires_grad=True)]
    job = TrainJob("", "", "", settings(warmup_steps=0.5), seed=0)
    schedule = make_schedule(torch.optim.AdamW(weights, lr=1e-3), job, 6, done=3)
    assert schedule.get_last_lr()[0] == 1e-3
    # 1.2 steps are 2, as in transformers: the second step has half the rate
    fifth = TrainJob("", "", "", settings(warmup_steps=0.2), seed=0)
    assert make_schedule(torch.optim.AdamW(weights, lr=1e-3), fifth, 6, done=1).get_last_lr()[0] == 5e-4
    stable = settings(
        lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 5}, warmup_steps=2
    )
    with pytest.raises(RecipeError, match="2 warm-up steps and num_decay_steps 5 don't fit the 6 steps"):
        make_schedule(torch.optim.AdamW(weights, lr=1e-3), TrainJob("", "", "", stable, seed=0), 6, done=0)


def test_a_carried_state_of_another_kind_of_optimizer_or_of_another_model_is_refused(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    run_training(job_of(tmp_path / "one", tiny, pairs, max_steps=1, job={"keep_optimizer_state": True}))
    carried = {"optimizer_state": str(tmp_path / "one/out/train/optimizer.safetensors")}
    run_training(job_of(tmp_path / "same", tiny, pairs, max_steps=1, job=carried))
    with pytest.raises(DataError, match=r"is of adamw_torch, but train\.optim is rmsprop"):
        run_training(job_of(tmp_path / "two", tiny, pairs, max_steps=1, job=carried, optim="rmsprop"))
    narrow = make_tiny_model(tmp_path / "narrow", intermediate_size=64)
    with pytest.raises(DataError, match="of another model"):
        run_training(job_of(tmp_path / "three", narrow, pairs, max_steps=1, job=carried))


def test_a_missing_bitsandbytes_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = TrainRecipe(optim="adamw_bnb_8bit")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install .*selfplay-dpo\[bnb\]"):
        require_packages(recipe)
    require_packages(TrainRecipe())


def test_8_bit_adamw_follows_adamw_resumes_and_is_carried(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    rig: dict[str, Any] = {"max_steps": 5, "save_steps": 2, "job": {"keep_optimizer_state": True}}
    full = train(tmp_path / "full", tiny, pairs, **rig)
    rows = train(tmp_path / "whole", tiny, pairs, optim="adamw_bnb_8bit", **rig)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in full], abs=0.05)
    assert rows[-1]["loss"] < 0.6
    assert rows[-1]["loss"] != full[-1]["loss"]
    job = job_of(tmp_path / "killed", tiny, pairs, optim="adamw_bnb_8bit", **rig)
    monkeypatch.setenv(faults.VARIABLE, "train.updated@4=raise")
    with pytest.raises(faults.InjectedError):
        run_training(job)
    monkeypatch.delenv(faults.VARIABLE)
    run_training(job)
    # bitsandbytes gives other last bits from one run to the next, killed or not
    resumed = steps(tmp_path / "killed")
    assert [row["loss"] for row in resumed] == pytest.approx([row["loss"] for row in rows], abs=1e-3)
    assert [row["step"] for row in resumed] == [row["step"] for row in rows]
    before, after = (load_file(tmp_path / name / "out/policy/model.safetensors") for name in ("whole", "killed"))
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=1e-3, atol=1e-4)
    state = load_file(tmp_path / "whole/out/train/optimizer.safetensors")
    assert {tensor.dtype for name, tensor in state.items() if name.endswith("state1")} == {torch.uint8, torch.float32}
    assert state["0/state1"].dtype == torch.float32, "the embeddings' state"
    carried = {"optimizer_state": str(tmp_path / "whole/out/train/optimizer.safetensors"), "keep_optimizer_state": True}
    run_training(job_of(tmp_path / "next", tiny, pairs, optim="adamw_bnb_8bit", max_steps=1, job=carried))
    state = load_file(tmp_path / "next/out/train/optimizer.safetensors")
    assert {int(tensor) for name, tensor in state.items() if name.endswith("/step")} == {6}
    with pytest.raises(DataError, match=r"is of adamw_bnb_8bit, but train\.optim is adamw_torch"):
        run_training(job_of(tmp_path / "wrong", tiny, pairs, max_steps=1, job=carried))


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
