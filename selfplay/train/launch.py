"""Runs a training job: in this process on a CPU, in a process of its own where there is a GPU, whose memory must be given
back whole to the engine of the next round.

    python -m selfplay.train.launch JOB.json RESULT.json PARENT_PID
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from selfplay import errors
from selfplay.generators.child import die_with
from selfplay.progress import Reporter
from selfplay.train.kl import KLJob, run_kl
from selfplay.train.loop import run_training
from selfplay.train.settings import TrainJob, TrainSettings
from selfplay.train.stop import handled

UNITS = {"reference": "pairs", "train": "steps", "kl": "prompts"}


def launch(job: TrainJob | KLJob, report: Reporter) -> dict[str, Any]:
    """The job's result; the job's own errors are raised here."""
    return run_in_child(job, report) if torch.cuda.is_available() else _run(job, report)


def run_in_child(job: TrainJob | KLJob, report: Reporter) -> dict[str, Any]:
    """The same in a process of its own, which is gone when this returns."""
    with tempfile.TemporaryDirectory() as folder:
        job_file, result_file = Path(folder) / "job.json", Path(folder) / "result.json"
        job_file.write_text(json.dumps({"kind": type(job).__name__, "quiet": report.quiet, **asdict(job)}))
        module = [sys.executable, "-P", "-m", "selfplay.train.launch"]
        # a session of its own: the terminal's Ctrl-C reaches us alone, and we pass it on once
        process = subprocess.Popen([*module, job_file, result_file, str(os.getpid())], start_new_session=True)
        code = wait_for(process)
        result: dict[str, Any] = json.loads(result_file.read_text()) if result_file.exists() else {}
    if "error" in result:
        raise getattr(errors, result["error"])(result["message"])
    if code == -signal.SIGTERM:  # it was asked to stop, and had nothing to save yet
        raise KeyboardInterrupt
    if code != 0:
        raise errors.SelfplayError(f"the training process ended with code {code}; its own message is above")
    return result


def wait_for(process: "subprocess.Popen[bytes]") -> int:
    """The exit code of a child that leads a session. The first SIGINT or SIGTERM is passed on to it as SIGTERM, and it may
    finish its step; the second one raises KeyboardInterrupt. However this ends, the child's processes have ended too.
    """
    asked = False

    def pass_on() -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        process.terminate()

    try:
        with handled(pass_on):
            return process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _run(job: TrainJob | KLJob, report: Reporter) -> dict[str, Any]:
    progress = _Stages(report)
    try:
        return run_training(job, progress) if isinstance(job, TrainJob) else run_kl(job, progress)
    finally:
        progress.close()


class _Stages:
    """Turns (what, done, total) calls into the reporter's stages."""

    def __init__(self, report: Reporter) -> None:
        self.report = report
        self.name = ""
        self.stage: Any = None
        self.advance: Any = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self.name:
            self.close()
            self.name = what
            self.stage = self.report.stage(what, total, UNITS[what])
            self.advance = self.stage.__enter__()
        self.advance(done)

    def note(self, text: str) -> None:
        self.report.note(text)

    def close(self) -> None:
        if self.stage is not None:
            self.stage.__exit__(None, None, None)
            self.stage = None


def _main(job_file: str, result_file: str) -> int:
    data = json.loads(Path(job_file).read_text())
    kind, quiet = data.pop("kind"), data.pop("quiet")
    data["groups"] = tuple(data["groups"])
    job: TrainJob | KLJob = (
        KLJob(**data) if kind == "KLJob" else TrainJob(**{**data, "settings": TrainSettings(**data["settings"])})
    )
    try:
        result = _run(job, Reporter(quiet=quiet))
    except errors.SelfplayError as error:
        Path(result_file).write_text(json.dumps({"error": type(error).__name__, "message": str(error)}))
        return error.exit_code
    Path(result_file).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    threading.Thread(target=die_with, args=(int(sys.argv[3]),), daemon=True).start()
    sys.exit(_main(sys.argv[1], sys.argv[2]))
