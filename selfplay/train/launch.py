"""Runs a training job: in this process on a CPU, in a process of its own where there is a GPU, whose memory must be given
back whole to the engine of the next round.

    python -m selfplay.train.launch JOB.json RESULT.json PARENT_PID
"""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch

from selfplay import errors, store
from selfplay.generators.child import die_with
from selfplay.progress import Reporter
from selfplay.train.devices import Devices
from selfplay.train.kl import KLJob, run_kl
from selfplay.train.loop import run_training
from selfplay.train.rank import STOP, write_whole
from selfplay.train.restart import restarted, was_killed
from selfplay.train.settings import TrainJob, TrainSettings
from selfplay.train.stop import handled

RANK = "selfplay.train.rank"
GONE_SECONDS = 30  # more than any of them needs, unless its disk hangs
UNITS = {"reference": "pairs", "train": "steps", "kl": "prompts"}


def launch(job: TrainJob | KLJob, report: Reporter, devices: Devices | None = None) -> dict[str, Any]:
    """The job's result; the job's own errors are raised here. `devices` say on which processes a training job runs. Where it
    runs in processes of its own and one of them is killed, it is started again.
    """
    if devices is not None:
        return restarted(lambda: run_on(devices, job, report), job, report)
    if torch.cuda.is_available():
        return restarted(lambda: run_in_child(job, report), job, report)
    return _run(job, report)


def run_in_child(job: TrainJob | KLJob, report: Reporter) -> dict[str, Any]:
    """The same in a process of its own, which is gone when this returns."""
    with tempfile.TemporaryDirectory() as folder:
        job_file, result_file = Path(folder) / "job.json", Path(folder) / "result.json"
        job_file.write_text(json.dumps({"kind": type(job).__name__, "quiet": report.quiet, **asdict(job)}))
        module = [sys.executable, "-P", "-m", "selfplay.train.launch"]
        # a session of its own: the terminal's Ctrl-C reaches us alone, and we pass it on once
        process = subprocess.Popen([*module, job_file, result_file, str(os.getpid())], start_new_session=True)
        asked = threading.Event()

        def ask() -> None:
            asked.set()
            process.terminate()

        code = wait_for(process, ask=ask)
        result: dict[str, Any] = json.loads(result_file.read_text()) if result_file.exists() else {}
    if "error" in result:
        raise getattr(errors, result["error"])(result["message"])
    if code == -signal.SIGTERM or (code < 0 and asked.is_set()):  # asked to stop, it had nothing to save yet
        raise KeyboardInterrupt
    if code != 0:
        kind = errors.TrainerError if was_killed(code) else errors.SelfplayError
        raise kind(f"the training process {_ending(code)}; its own message is above. The same command goes on")
    return result


def run_on(devices: Devices, job: TrainJob | KLJob, report: Reporter) -> dict[str, Any]:
    """The same on several processes, started by accelerate. All of them are gone when this returns."""
    assert isinstance(job, TrainJob)
    # in the run, which other machines see as well; swept away with what else is unfinished
    folder = (Path(job.out) / ("processes" + store.TEMPORARY)).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "accelerate.json").write_text(json.dumps(devices.launched))
    described = asdict(devices) | {"config": str(devices.config)}
    (folder / "job.json").write_text(json.dumps({"quiet": report.quiet, "devices": described, **asdict(job)}))
    for line in devices.lines:
        report.note(line)
    names = [str(folder / "job.json"), str(folder / "result.json")]
    launched, failed = folder / "accelerate.json", folder / "failed.json"
    command = devices.command(RANK, names, launched=launched, failed=failed)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        try:
            code = wait_for(process, ask=(folder / STOP).touch)
        finally:
            _wait_until_gone(process)
        if code != 0:
            _raise_failure(folder, devices, code)
        result: dict[str, Any] = json.loads((folder / "result.json.0").read_text())
        return result
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_gone(process: "subprocess.Popen[bytes]") -> None:
    """Returns when the processes that a launcher started have ended, which watch it: each has its standard input."""
    assert process.stdin is not None
    with process.stdin as pipe:
        watch = select.poll()
        watch.register(pipe, 0)  # that nobody is left to read is told unasked
        watch.poll(GONE_SECONDS * 1000)


def _raise_failure(folder: Path, devices: Devices, code: int) -> NoReturn:
    """Raises what ended the processes that train: an error of ours, a request to stop, or what befell one of them. `code` is
    how their launcher ended.
    """
    for file in sorted(folder.glob("result.json.*")):
        found = json.loads(file.read_text())
        if "error" in found:
            raise getattr(errors, found["error"])(found["message"])
    if (folder / STOP).exists():  # they were asked to stop, and had nothing to save yet
        raise KeyboardInterrupt
    who = "the launcher of the training processes"
    if (folder / "failed.json").exists():
        failed = json.loads((folder / "failed.json").read_text())
        who, code = f"process {failed['rank']} of the {devices.num_processes} that train", failed["code"]
    kind = errors.TrainerError if was_killed(code) else errors.SelfplayError
    raise kind(
        f"{who} {_ending(code)}, and the others with it; messages of their own are above. The same command goes on from the "
        "last checkpoint"
    )


def _ending(code: int) -> str:
    """What an exit code says, which is minus the signal where one ended the process."""
    return f"was ended by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"


def wait_for(process: "subprocess.Popen[bytes]", *, ask: Callable[[], None] | None = None) -> int:
    """The exit code of a child that leads a session. The first SIGINT or SIGTERM is passed on by `ask`, else as SIGTERM, and
    it may finish its step; the second one raises KeyboardInterrupt. However this ends, the child's processes have ended too.
    """
    asked = False

    def pass_on() -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        (ask or process.terminate)()

    try:
        with handled(pass_on):
            return process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _run(job: TrainJob | KLJob, report: Reporter) -> dict[str, Any]:
    progress = Stages(report)
    try:
        return run_training(job, progress) if isinstance(job, TrainJob) else run_kl(job, progress)
    finally:
        progress.close()


class Stages:
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
        write_whole(Path(result_file), {"error": type(error).__name__, "message": str(error)})
        return error.exit_code
    write_whole(Path(result_file), result)
    return 0


if __name__ == "__main__":
    threading.Thread(target=die_with, args=(int(sys.argv[3]),), daemon=True).start()
    sys.exit(_main(sys.argv[1], sys.argv[2]))
