"""Starts a training job again whose process was killed: by somebody, by the system where memory is short, or by a fault. And
one whose processes hold parts of the weights (FSDP2), where one ran out of its device's memory: with smaller packs.

It goes on from its last checkpoint, so after a kill on CPUs its policy has the bytes of one that was never disturbed; on CUDA
two runs differ by rounding anyway (checkpoint.py). A job that trains inside the command's own process, as on a CPU without
`--accelerate-config`, ends with that.
"""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.errors import TrainerError
from selfplay.progress import Reporter
from selfplay.train.checkpoint import finished_checkpoints
from selfplay.train.kl import KLJob
from selfplay.train.settings import TrainJob
from selfplay.train.smaller import left_cap

RESTARTS = 2  # of one job; what is killed oftener wants a person
REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # who sends these wants it to stop


def was_killed(code: int) -> bool:
    """Whether an exit code, minus the signal where one ended the process, is that of a process which nobody asked to stop."""
    return code < 0 and -code not in REQUESTS


def restarted(work: Callable[[], dict[str, Any]], job: TrainJob | KLJob, report: Reporter) -> dict[str, Any]:
    """What `work` returns, which does the job and is called again where it raises TrainerError: after the first time, and
    after the second one if there is a newer checkpoint by then, or a smaller cap of packs. Each is told, and stands in
    train/restarts.jsonl of the job's folder, a line with the step that it goes on from and what happened.
    """
    before = _place(job)
    for number in range(1, RESTARTS + 1):
        try:
            return work()
        except TrainerError as error:
            done = _finished(job)
            if done is not None:
                return done
            place = _place(job)
            if number > 1 and place == before:
                raise
            before = place
            _tell(job, place[0], str(error).partition(";")[0], f"restart {number} of at most {RESTARTS}", report)
    return work()


def _place(job: TrainJob | KLJob) -> tuple[int, int | None]:
    """The step of the newest checkpoint, 0 where there is none, and the cap of packs that the next start keeps to."""
    if isinstance(job, KLJob):
        return 0, None
    found = finished_checkpoints(Path(job.out) / "train" / "checkpoints")
    return found[-1][0] if found else 0, left_cap(Path(job.out))


def _finished(job: TrainJob | KLJob) -> dict[str, Any] | None:
    """The result of a job that was killed after its policy was written."""
    if isinstance(job, KLJob) or not (Path(job.out) / "policy").exists():
        return None
    store.remove_folder(Path(job.out) / "train" / "checkpoints")
    found: dict[str, Any] = store.read_json(Path(job.out) / "train" / "result.json")
    return found


def _tell(job: TrainJob | KLJob, step: int, why: str, which: str, report: Reporter) -> None:
    if isinstance(job, KLJob):
        report.note(f"KL: {why}; once more from the start ({which})")
        return
    where = f"the checkpoint of step {step}" if step else "the start"
    report.note(f"training: {why}; going on from {where} ({which})")
    path = Path(job.out) / "train" / "restarts.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    store.append_json_line(path, {"step": step, "why": why})
