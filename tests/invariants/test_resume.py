"""Training that was stopped goes on from its checkpoint, to the same bytes."""

import dataclasses
import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import ALONE, job_of, random_pairs, weights
from safetensors.torch import load_file

from selfplay import faults, store
from selfplay.errors import Stopped, StorageError
from selfplay.train.checkpoint import AUTO_SECONDS, AUTO_SHARE, Checkpoints, Due
from selfplay.train.loop import run_training
from selfplay.train.model import load_model
from selfplay.train.optim import Masters, make_optimizer
from selfplay.train.settings import TrainJob
from selfplay.train.stop import stopping
from selfplay.types import PreferencePair

RIG: dict[str, Any] = {"max_steps": 5, "save_steps": 1, "warmup_steps": 2, "lr_scheduler_type": "cosine"}


class Watch:
    """Progress that keeps its notes, and calls `look` after each step."""

    def __init__(self, look: Callable[[int], None] = lambda step: None) -> None:
        self.notes: list[str] = []
        self.look = look

    def __call__(self, what: str, done: int, total: int) -> None:
        if what == "train":
            self.look(done)

    def note(self, text: str) -> None:
        self.notes.append(text)


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, pairs: Sequence[PreferencePair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_training(job_of(folder, tiny, pairs, **RIG))
    return folder / "out"


@pytest.fixture
def stopped(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path, fault: Callable[[str | None], None]
) -> TrainJob:
    """A job that stopped in its fourth step: it has checkpoints of steps 2 and 3."""
    job = job_of(tmp_path, tiny, pairs, **RIG)
    fault("train.updated@4=raise")
    with pytest.raises(faults.InjectedError):
        run_training(job)
    fault(None)
    assert checkpoints(job) == ["step-000002", "step-000003"]
    return job


def checkpoints(job: TrainJob) -> list[str]:
    return sorted(f.name for f in (Path(job.out) / "train" / "checkpoints").iterdir())


def spoil(job: TrainJob, name: str, *, file: str = "state-00000.safetensors") -> None:
    path = Path(job.out) / "train" / "checkpoints" / name / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_stopped_job_goes_on_from_its_newest_checkpoint(stopped: TrainJob, undisturbed: Path) -> None:
    begun: list[int] = []
    watch = Watch(begun.append)
    run_training(stopped, watch)
    assert begun == [4, 5]
    assert watch.notes == ["training: going on from the checkpoint of step 3"]
    assert files(Path(stopped.out)) == files(undisturbed)


@pytest.mark.parametrize("file", ["state-00000.safetensors", "checkpoint.json", "steps.jsonl", "SHA256SUMS"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(file: str, stopped: TrainJob, undisturbed: Path) -> None:
    spoil(stopped, "step-000003", file=file)
    watch = Watch()
    run_training(stopped, watch)
    assert len(watch.notes) == 2
    assert "a checkpoint is damaged" in watch.notes[0]
    assert "step-000003" in watch.notes[0]
    assert watch.notes[1].endswith("step 2")
    assert files(Path(stopped.out)) == files(undisturbed)


def test_where_all_checkpoints_are_damaged_training_starts_over(stopped: TrainJob, undisturbed: Path) -> None:
    spoil(stopped, "step-000002")
    folder = Path(stopped.out) / "train" / "checkpoints" / "step-000003"
    (folder / "state-00000.safetensors").unlink()
    begun: list[int] = []
    watch = Watch(begun.append)
    run_training(stopped, watch)
    assert begun == [1, 2, 3, 4, 5]
    assert len(watch.notes) == 2
    assert files(Path(stopped.out)) == files(undisturbed)


def test_folders_that_are_no_checkpoints_are_left_alone(stopped: TrainJob) -> None:
    folder = Path(stopped.out) / "train" / "checkpoints"
    (folder / "step-last").mkdir()
    (folder / "notes").write_text("mine")
    assert Checkpoints(folder, stopped, note=print, world=ALONE).newest() is not None
    assert {"step-last", "notes"} <= set(checkpoints(stopped))


def other_pairs(job: TrainJob) -> TrainJob:
    store.write_records(Path(job.pairs).with_name("other.jsonl"), random_pairs(), PreferencePair)
    return dataclasses.replace(job, pairs=str(Path(job.pairs).with_name("other.jsonl")))


def other_policy(job: TrainJob) -> TrainJob:
    from tiny import make_tiny_model

    return dataclasses.replace(job, policy=str(make_tiny_model(Path(job.out).parent / "other", seed=1)))


def other_rate(job: TrainJob) -> TrainJob:
    return dataclasses.replace(job, settings=dataclasses.replace(job.settings, learning_rate=2e-3))


OTHERS: dict[str, Callable[[TrainJob], TrainJob]] = {
    "pairs": other_pairs,
    "policy": other_policy,
    "settings": other_rate,
    "seed": lambda job: dataclasses.replace(job, seed=1),
    "schedule": lambda job: dataclasses.replace(job, first_step=1),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_another_job_is_refused(what: str, stopped: TrainJob) -> None:
    before = checkpoints(stopped)
    with pytest.raises(StorageError, match=rf"another training job: its {what} differ\. Delete the folder"):
        run_training(OTHERS[what](stopped))
    assert checkpoints(stopped) == before
    assert not (Path(stopped.out) / "policy").exists()


def test_a_schedule_longer_than_the_job_goes_on_where_it_was(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path, fault: Callable[[str | None], None]
) -> None:
    long = {"schedule_epochs": 18}
    whole, job = (job_of(tmp_path / name, tiny, pairs, job=long, **RIG) for name in ("whole", "stopped"))
    run_training(whole)
    fault("train.updated@4=raise")
    with pytest.raises(faults.InjectedError):
        run_training(job)
    fault(None)
    with pytest.raises(StorageError, match=r"another training job: its schedule differ"):
        run_training(dataclasses.replace(job, schedule_epochs=17))
    run_training(job)
    assert files(Path(job.out)) == files(Path(whole.out))


def test_how_often_checkpoints_are_written_may_change(stopped: TrainJob, undisturbed: Path) -> None:
    run_training(dataclasses.replace(stopped, settings=dataclasses.replace(stopped.settings, save_steps=2)))
    assert weights(Path(stopped.out) / "policy").keys() == weights(undisturbed / "policy").keys()
    assert (Path(stopped.out) / "policy/model.safetensors").read_bytes() == (
        undisturbed / "policy/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_request_to_stop_is_honoured_after_the_step_with_a_checkpoint(
    step: int,
    tiny: Path,
    pairs: Sequence[PreferencePair],
    tmp_path: Path,
    undisturbed: Path,
    fault: Callable[[str | None], None],
) -> None:
    job = job_of(tmp_path, tiny, pairs, **{**RIG, "save_steps": "auto"})
    fault(f"train.pack@{step}=term")
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=f"after training step {step} of 5") as caught:
        run_training(job)
    assert caught.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is handler
    assert checkpoints(job) == [f"step-{step:06d}"]
    assert len(store.read_json_lines(tmp_path / "out/train/steps.jsonl")) == step
    fault(None)
    begun: list[int] = []
    run_training(
        dataclasses.replace(job, settings=dataclasses.replace(job.settings, save_steps=1)), Watch(begun.append)
    )
    assert begun == list(range(step + 1, 6))
    assert files(tmp_path / "out") == files(undisturbed)


def test_a_second_request_stops_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with stopping() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert "stopping after this training step" in capfd.readouterr().err


def test_steps_can_be_read_while_training_runs_and_at_most_two_checkpoints_are_kept(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    job = job_of(tmp_path, tiny, pairs, **RIG)
    kept = []

    def look(step: int) -> None:
        rows = store.read_json_lines(tmp_path / "out/train/steps.jsonl")
        assert [row["step"] for row in rows] == list(range(1, step + 1))
        kept.append(len(checkpoints(job)) if step > 1 else 0)

    run_training(job, Watch(look))
    assert kept == [0, 1, 2, 2, 2]
    assert sorted(f.name for f in (tmp_path / "out/train").iterdir()) == [
        "result.json",
        "result.json.sha256",
        "steps.jsonl",
    ]


def test_a_checkpoint_holds_what_a_step_leaves_behind(stopped: TrainJob) -> None:
    folder = Path(stopped.out) / "train" / "checkpoints" / "step-000003"
    tensors = load_file(folder / "state-00000.safetensors")
    names = {name.partition("/")[0] for name in tensors}
    assert names == {"weights", "optimizer", "random"}
    assert all(tensor.dtype == torch.float32 for name, tensor in tensors.items() if name.startswith("weights/"))
    steps = {float(tensor) for name, tensor in tensors.items() if name.endswith("/step")}
    assert steps == {3.0}
    data = json.loads((folder / "checkpoint.json").read_text())
    assert (data["step"], data["epoch"], data["max_pack_tokens"]) == (3, 1.5, 2048)


def test_bf16_training_resumes_from_its_fp32_masters(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path, fault: Callable[[str | None], None]
) -> None:
    whole = job_of(tmp_path / "whole", tiny, pairs, bf16=True, **RIG)
    run_training(whole)
    job = job_of(tmp_path / "stopped", tiny, pairs, bf16=True, **RIG)
    fault("train.boundary@4=raise")
    with pytest.raises(faults.InjectedError):
        run_training(job)
    fault(None)
    run_training(job)
    assert files(tmp_path / "stopped/out") == files(tmp_path / "whole/out")


def test_the_random_state_travels_with_a_checkpoint(stopped: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(stopped.policy)
    masters = Masters(model, compute_dtype=torch.float32)
    optimizer = make_optimizer(masters, stopped.settings)
    held = Checkpoints(Path(stopped.out) / "train" / "checkpoints", stopped, note=print, world=ALONE)
    torch.manual_seed(7)
    held.save(masters, optimizer, max_pack_tokens=9, result={}, rows=[{"step": 8, "epoch": 2.5}])
    wanted = torch.rand(3)
    torch.manual_seed(0)
    found = held.newest()
    assert found is not None
    assert (found.step, found.max_pack_tokens, found.rows) == (8, 9, [{"step": 8, "epoch": 2.5}])
    found.restore(masters, optimizer)
    assert torch.equal(torch.rand(3), wanted)


def test_large_states_are_cut_into_several_files(stopped: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfplay.train.checkpoint.FILE_BYTES", 100_000)
    masters = Masters(load_model(stopped.policy), compute_dtype=torch.float32)
    optimizer = make_optimizer(masters, stopped.settings)
    held = Checkpoints(Path(stopped.out) / "train" / "checkpoints", stopped, note=print, world=ALONE)
    folder = held.save(masters, optimizer, max_pack_tokens=9, result={}, rows=[{"step": 8, "epoch": 2.5}])
    assert len(list(folder.glob("state-*.safetensors"))) > 2
    wanted = {name: weight.clone() for name, weight in masters.named()}
    with torch.no_grad():
        for weight in masters.weights:
            weight.zero_()
    found = held.newest()
    assert found is not None
    found.restore(masters, optimizer)
    assert all(torch.equal(weight, wanted[name]) for name, weight in masters.named())


def test_checkpoints_come_every_so_many_steps_or_by_the_clock() -> None:
    assert [step for step in range(1, 10) if Due(3).after(step)] == [3, 6, 9]
    now = 0.0
    due = Due("auto", clock=lambda: now)
    now = AUTO_SECONDS - 1
    assert not due.after(1)
    now = AUTO_SECONDS
    assert due.after(2)
    now = started = 1000.0
    now = 1090.0  # writing took 90 seconds
    due.written(started)
    now = 1090.0 + AUTO_SHARE * 90 - 1
    assert not due.after(3)
    now += 1
    assert due.after(4)
