"""A training process that is killed is started again, within bounds, and the policy has the bytes of an undisturbed one."""

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from jobs import job_of

from selfplay import store
from selfplay.errors import SelfplayError, TrainerError
from selfplay.progress import SILENT
from selfplay.train import launch
from selfplay.train.launch import run_in_child
from selfplay.train.loop import run_training
from selfplay.train.restart import restarted, was_killed
from selfplay.train.settings import TrainJob
from selfplay.types import PreferencePair

KILLED = "the training process was ended by signal 9 (SIGKILL)"


@pytest.fixture
def job(tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path) -> TrainJob:
    return job_of(tmp_path / "child", tiny, pairs, max_steps=3, save_steps=1)


def records(job: TrainJob) -> list[Any]:
    return store.read_json_lines(Path(job.out) / "train" / "restarts.jsonl")


@pytest.mark.slow
def test_a_child_that_is_killed_goes_on_from_its_last_checkpoint_by_itself(
    job: TrainJob,
    tiny: Path,
    pairs: Sequence[PreferencePair],
    tmp_path: Path,
    fault: Callable[[str | None], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault("train.updated@2=kill9")  # in step 2, and of the next one in step 3
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # where a job has a process of its own
    result = launch.launch(job, SILENT)
    monkeypatch.undo()
    assert records(job) == [{"step": 1, "why": KILLED}, {"step": 2, "why": KILLED}]
    assert result == run_training(job_of(tmp_path / "here", tiny, pairs, max_steps=3, save_steps=1))
    for name in ("policy/model.safetensors", "train/steps.jsonl", "train/result.json", "reference.safetensors"):
        assert (Path(job.out) / name).read_bytes() == (tmp_path / "here/out" / name).read_bytes()


@pytest.mark.slow
def test_a_child_that_is_killed_twice_at_the_same_step_is_not_started_a_third_time(
    job: TrainJob, fault: Callable[[str | None], None]
) -> None:
    fault("train.update@1=kill9")
    with pytest.raises(TrainerError, match=r"ended by signal 9 \(SIGKILL\).*The same command goes on"):
        restarted(lambda: run_in_child(job, SILENT), job, SILENT)
    assert records(job) == [{"step": 0, "why": KILLED}]


def checkpoint(job: TrainJob, step: int) -> None:
    (Path(job.out) / "train" / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)


def test_what_is_killed_again_and_again_is_given_up_even_if_it_makes_progress(job: TrainJob) -> None:
    calls: list[int] = []

    def work() -> dict[str, Any]:
        calls.append(len(calls))
        checkpoint(job, len(calls))
        raise TrainerError("killed; and so on")

    with pytest.raises(TrainerError):
        restarted(work, job, SILENT)
    assert len(calls) == 3
    assert records(job) == [{"step": 1, "why": "killed"}, {"step": 2, "why": "killed"}]


def test_an_error_of_another_kind_is_not_answered_by_a_restart(job: TrainJob) -> None:
    calls: list[int] = []

    def work() -> dict[str, Any]:
        calls.append(1)
        raise SelfplayError("a process ended with code 1")

    with pytest.raises(SelfplayError, match="code 1"):
        restarted(work, job, SILENT)
    assert len(calls) == 1


def test_a_job_that_is_killed_after_its_policy_was_written_is_done(job: TrainJob) -> None:
    def work() -> dict[str, Any]:
        result = run_training(job)
        checkpoint(job, 3)  # killed before these went
        raise TrainerError(f"killed with {len(result)} figures")

    found = restarted(work, job, SILENT)
    assert found == store.read_json(Path(job.out) / "train" / "result.json")
    assert not (Path(job.out) / "train" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("code", "killed"),
    [(-signal.SIGKILL, True), (-signal.SIGSEGV, True), (-signal.SIGTERM, False), (-signal.SIGINT, False), (1, False)],
    ids=["kill", "segv", "term", "int", "error"],
)
def test_a_request_to_stop_and_an_error_are_no_kill(code: int, killed: bool) -> None:
    assert was_killed(code) == killed
