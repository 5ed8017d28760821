"""One of the processes that train together, as accelerate's launcher starts it:

    python -m selfplay.train.rank JOB.json RESULT.json

It ends as soon as its launcher (ranks.py) is gone. Its own result, or the error of ours that ended it, is RESULT.json.RANK.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from selfplay import errors
from selfplay.generators.child import WATCH_SECONDS, die_with
from selfplay.train.ranks import LAUNCHER

STOP = "stop"  # a file beside the job that asks all of them to stop


def main(job_file: str, result_file: str) -> int:
    """The exit code."""
    # before torch is loaded, which takes seconds: the launcher may be gone by then
    threading.Thread(target=die_with, args=(int(os.environ[LAUNCHER]),), daemon=True).start()
    from selfplay.progress import Reporter
    from selfplay.train.launch import Stages
    from selfplay.train.loop import run_training
    from selfplay.train.settings import TrainJob, TrainSettings
    from selfplay.train.world import Sharding, join_world, leave_world

    data: dict[str, Any] = json.loads(Path(job_file).read_text())
    devices, quiet = data.pop("devices"), data.pop("quiet")
    settings, groups = TrainSettings(**data.pop("settings")), tuple(data.pop("groups"))
    sharding = Sharding(devices["reshard_after_forward"], devices["layers"]) if devices["sharded"] else None
    rank = int(os.environ.get("RANK", "0"))
    own = Path(f"{result_file}.{rank}")
    progress = Stages(Reporter(quiet=quiet or rank > 0))
    try:
        world = join_world(use_cpu=devices["use_cpu"], sharding=sharding)
        if world.is_first:
            threading.Thread(target=_watch_for_stop, args=(Path(result_file).with_name(STOP),), daemon=True).start()
        result = run_training(TrainJob(**data, settings=settings, groups=groups), progress, world)
    except errors.SelfplayError as error:
        write_whole(own, {"error": type(error).__name__, "message": str(error)})
        return error.exit_code
    finally:
        progress.close()
    write_whole(own, result)
    leave_world(world)
    return 0


def write_whole(path: Path, value: Any) -> None:
    """JSON, whole or not at all: where one process has failed, the others may be ended while they write."""
    temporary = path.with_name(f"writing-{path.name}")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def end_at_once(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Of an error that nobody caught: its traceback, and the end. The group's threads, which an orderly end would meet, would
    now and then abort the process, and then a signal would seem to have ended it.
    """
    sys.__excepthook__(kind, error, trace)
    sys.stderr.flush()
    os._exit(1)


def _watch_for_stop(request: Path) -> None:
    """Asks this process to stop, once, when the parent has: the launcher would give a signal's step 30 seconds."""
    while not request.exists():
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.excepthook = end_at_once
    code = main(sys.argv[1], sys.argv[2])
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written, and a thread of the group that outlives the interpreter would now and then abort a process that is done.
    os._exit(code)
