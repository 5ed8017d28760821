"""Runs a training job: in this process on a CPU, in a process of its own where there is a GPU, whose memory must be given
back whole to the engine of the next round.

    python -m selfplay.train.launch JOB.json RESULT.json PARENT_PID
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from selfplay import errors, store
from selfplay.generators.child import WATCH_SECONDS, die_with
from selfplay.progress import Reporter
from selfplay.train.devices import Devices
from selfplay.train.kl import KLJob, run_kl
from selfplay.train.loop import run_training
from selfplay.train.settings import TrainJob, TrainSettings
from selfplay.train.stop import handled
from selfplay.train.world import Sharding, join_world, leave_world

STOP = "stop"
UNITS = {"reference": "pairs", "train": "steps", "kl": "prompts"}


def launch(job: TrainJob | KLJob, report: Reporter, devices: Devices | None = None) -> dict[str, Any]:
    """The job's result; the job's own errors are raised here. `devices` say on which processes a training job runs."""
    if devices is not None:
        return run_on(devices, job, report)
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


def run_on(devices: Devices, job: TrainJob | KLJob, report: Reporter) -> dict[str, Any]:
    """The same on several processes, started by accelerate. All of them are gone when this returns."""
    assert isinstance(job, TrainJob)
    if job.settings.optim == "adamw_bnb_8bit" and devices.sharded:
        raise errors.RecipeError("train.optim adamw_bnb_8bit can't be cut over processes (FSDP2): take adamw_torch")
    # in the run, which other machines see as well; swept away with what else is unfinished
    folder = (Path(job.out) / ("processes" + store.TEMPORARY)).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    described = asdict(devices) | {"config": str(devices.config)}
    task = {"kind": type(job).__name__, "quiet": report.quiet, "devices": described, **asdict(job)}
    (folder / "job.json").write_text(json.dumps(task))
    report.note(f"training on {devices.line}")
    names = [str(folder / "job.json"), str(folder / "result.json"), "0"]
    process = subprocess.Popen(devices.command("selfplay.train.launch", names), start_new_session=True)
    asked = folder / STOP
    try:
        code = wait_for(process, ask=asked.touch)
        time.sleep(0 if code == 0 else 2 * WATCH_SECONDS)  # they look that often whether their launcher lives
        if code != 0:
            for file in sorted(folder.glob("result.json*")):
                found = json.loads(file.read_text())
                if "error" in found:
                    raise getattr(errors, found["error"])(found["message"])
            if asked.exists():  # they were asked to stop, and had nothing to save yet
                raise KeyboardInterrupt
            raise errors.SelfplayError(
                f"the training processes ended with code {code}; the message of the one that failed is above"
            )
        result: dict[str, Any] = json.loads((folder / "result.json.0").read_text())
        return result
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
    if "devices" in data:
        return _main_of_several(data, result_file)
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


def _main_of_several(data: dict[str, Any], result_file: str) -> int:
    devices, quiet, _ = data.pop("devices"), data.pop("quiet"), data.pop("kind")
    settings, groups = TrainSettings(**data.pop("settings")), tuple(data.pop("groups"))
    sharding = Sharding(devices["reshard_after_forward"], devices["layers"]) if devices["sharded"] else None
    world = join_world(use_cpu=devices["use_cpu"], sharding=sharding)
    if world.is_first:
        threading.Thread(target=_watch_for_stop, args=(Path(result_file).with_name(STOP),), daemon=True).start()
    own = Path(f"{result_file}.{world.rank}")
    progress = _Stages(Reporter(quiet=quiet or not world.is_first))
    try:
        result = run_training(TrainJob(**data, settings=settings, groups=groups), progress, world)
    except errors.SelfplayError as error:
        own.write_text(json.dumps({"error": type(error).__name__, "message": str(error)}))
        return error.exit_code
    finally:
        progress.close()
    own.write_text(json.dumps(result))
    leave_world(world)
    return 0


def _watch_for_stop(request: Path) -> None:
    """Asks this process to stop, once, when the parent has: the launcher would give a signal's step 30 seconds."""
    while not request.exists():
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    # 0 under a launcher, which watches the process that trains: a rank watches the launcher
    threading.Thread(target=die_with, args=(int(sys.argv[3]) or os.getppid(),), daemon=True).start()
    sys.exit(_main(sys.argv[1], sys.argv[2]))
