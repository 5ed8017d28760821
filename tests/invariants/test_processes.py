"""Two processes train as one does: the same losses and weights, no row lost, and resume to the last bit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import flat, job_of, random_pairs, steps
from ranks import spawn
from transformers import AutoModelForCausalLM

from selfplay.errors import StorageError
from selfplay.train.deal import deal, own_packs
from selfplay.train.loop import run_training
from selfplay.train.pack import units
from selfplay.train.world import World

# 7 pairs in steps of 3, 3 and 1: no step divides by two processes, and one has a single pair
RIG: dict[str, Any] = {"batch_size": 3, "num_train_epochs": 2, "max_pack_tokens": 60, "save_steps": 1}
PAIRS = random_pairs(num_prompts=7, num_completions=2)
LARGE: dict[str, Any] = {"batch_size": 7, "max_pack_tokens": 2048}  # several pairs in the packs of each process
KINDS = ("ddp", "fsdp")


def task(
    folder: Path, model: Path, kind: str, fault: str | None = None, rank: int | None = None, **changes: Any
) -> dict[str, Any]:
    job = job_of(folder, model, PAIRS, **{**RIG, **changes})
    return {"job": dataclasses.asdict(job), "fsdp": kind == "fsdp", "fault": fault, "rank": rank}


@pytest.fixture(scope="module")
def played(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Jobs of one process and of two: undisturbed, broken off in step 4 and gone on with, stopped and out of memory by what
    happens to process 1 alone, and with a loss that is not finite there.
    """
    folder = tmp_path_factory.mktemp("devices")
    run_training(job_of(folder / "one", tiny, PAIRS, **RIG))
    tasks = []
    for kind in KINDS:
        tasks.append(task(folder / kind, tiny, kind))
        tasks.append(task(folder / f"{kind}-broken", tiny, kind, "train.updated@4=raise"))
        tasks.append(task(folder / f"{kind}-broken", tiny, kind))
        tasks.append(task(folder / f"{kind}-nan", tiny, kind, "train.loss@1=nan", 1))
        tasks.append(task(folder / f"{kind}-stopped", tiny, kind, "train.boundary@2=term", 1))
    tasks.append(task(folder / "ddp-oom", tiny, "ddp", "train.pack@2=oom", 1, **LARGE))
    spawn(folder, tasks)
    return folder


def seen(folder: Path) -> list[dict[str, Any]]:
    """What the processes wrote of the tasks in a folder, those of process 0 before those of process 1."""
    files = sorted(folder.glob("ranks-*.json"), key=lambda f: (f.stem[-1], int(f.stem.split("-")[1])))
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_end_with_the_losses_and_weights_of_one(kind: str, played: Path, tiny: Path) -> None:
    one, two = flat(played / "one/out/policy"), flat(played / kind / "out/policy")
    assert (one - two).norm() / one.norm() < 1e-5
    assert (one - flat(tiny)).norm() > 1e-3 * one.norm(), "the policy has moved"
    ours, theirs = steps(played / kind), steps(played / "one")
    assert [row["num_pairs"] for row in ours] == [row["num_pairs"] for row in theirs] == [3, 3, 1] * 2
    assert [row["num_tokens"] for row in ours] == [row["num_tokens"] for row in theirs]
    for row, wanted in zip(ours, theirs, strict=True):
        assert row.keys() == wanted.keys()
        for name, value in wanted.items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert ours[0]["audit/zero_logratio"] == 0
    loaded = AutoModelForCausalLM.from_pretrained(played / kind / "out/policy")
    assert sum(p.numel() for p in loaded.parameters()) == seen(played / kind)[0]["elements"]


def test_fsdp_cuts_every_parameter_and_ddp_none(played: Path) -> None:
    for figures in seen(played / "ddp"):
        assert figures["sharded"] == 0
        assert figures["own"] == figures["elements"]
    both = seen(played / "fsdp")
    assert len(both) == 2
    assert all(figures["sharded"] == figures["parameters"] > 0 for figures in both)
    assert sum(figures["own"] for figures in both) == both[0]["elements"]
    assert max(figures["own"] for figures in both) < 0.6 * both[0]["elements"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_that_was_broken_off_ends_in_the_bytes_of_one_that_was_not(kind: str, played: Path) -> None:
    assert [figures["error"] for figures in seen(played / f"{kind}-broken")] == [
        "InjectedError: injected at train.updated",
        None,
    ] * 2
    for name in ("policy/model.safetensors", "train/steps.jsonl", "train/result.json", "reference.safetensors"):
        assert (played / f"{kind}-broken/out" / name).read_bytes() == (played / kind / "out" / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_what_happens_to_one_process_stops_both(kind: str, played: Path) -> None:
    for figures in seen(played / f"{kind}-nan"):
        assert "NonFiniteError: the loss of pairs" in figures["error"]
    assert not (played / f"{kind}-nan/out/policy").exists()
    for figures in seen(played / f"{kind}-stopped"):
        assert figures["error"].startswith("Stopped: stopped after training step 2 of 6")
    folders = {f.name for f in (played / f"{kind}-stopped/out/train/checkpoints").iterdir()}
    assert "step-000002" in folders
    names = {f.name for f in (played / f"{kind}-stopped/out/train/checkpoints/step-000002").iterdir()}
    assert {"state-00000.safetensors", "rank-00001-00000.safetensors", "checkpoint.json", "SHA256SUMS"} <= names


def test_packs_are_halved_everywhere_where_one_process_runs_out_of_memory(
    played: Path, tiny: Path, tmp_path: Path
) -> None:
    assert [figures["error"] for figures in seen(played / "ddp-oom")] == [None, None]
    result = json.loads((played / "ddp-oom/out/train/result.json").read_text())
    assert [row["step"] for row in result["out_of_memory"]] == [2]
    run_training(job_of(tmp_path, tiny, PAIRS, **{**RIG, **LARGE}))
    one, two = flat(tmp_path / "out/policy"), flat(played / "ddp-oom/out/policy")
    assert (one - two).norm() / one.norm() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_two_processes_is_refused_by_one(kind: str, played: Path, tiny: Path) -> None:
    job = job_of(played / f"{kind}-stopped", tiny, PAIRS, **RIG)
    with pytest.raises(StorageError, match=rf"written by 2 processes \({kind.upper()}.*this is 1 process"):
        run_training(job)


@pytest.mark.parametrize("shared", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_pairs_are_dealt_by_tokens_and_none_is_lost(size: int, shared: bool) -> None:
    drawn = random_pairs(num_prompts=11, num_completions=3)
    indices = list(range(len(drawn)))[::-1]
    shares = deal(drawn, indices, max_pack_tokens=90, shared=shared, size=size)
    assert sorted(index for share in shares for index in share) == sorted(indices)
    loads, largest = [], 0
    for share in shares:
        parts = units(drawn, share, max_pack_tokens=90, shared=shared)
        loads.append(sum(tokens for tokens, _ in parts))
        largest = max([largest, *(tokens for tokens, _ in parts)])
    assert max(loads) - min(loads) <= largest
    assert deal(drawn, indices, max_pack_tokens=90, shared=shared, size=1) == [indices]


def test_a_process_without_pairs_gets_a_pack_of_weight_0() -> None:
    drawn = random_pairs(num_prompts=1, num_completions=2)
    worlds = [World(torch.device("cpu"), rank, 2) for rank in range(2)]
    dealt = [own_packs(world, drawn, [0], max_pack_tokens=90, max_pack_length=None, shared=True) for world in worlds]
    assert sorted(weight for packs in dealt for _, weight in packs) == [0.0, 1.0]
    assert all(pack.pair_B == (0,) for packs in dealt for pack, _ in packs)
