"""The process group of an engine: ending all of it, and seeing that a helper of it ended.

On a GPU vLLM's core and its workers are processes below our child, and it is they who hold the GPU's memory.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

PROC = Path("/proc")
SHARED_MEMORY = "/dev/shm/psm_"  # how the names of multiprocessing's blocks begin
GONE_SECONDS = 30.0  # a driver takes some for 80 GB; a process that hangs in it longer is not waited for
POLL_SECONDS = 0.02
GRACE_SECONDS = 15.0  # for an engine to say itself why a process of it ended


def end_group(group: int) -> None:
    """Kills the processes of a group, and returns when they hold nothing any more, shared memory among it. Its leader is not
    reaped here, so that its id can't become somebody else's.
    """
    shared = _shared_memory(group)
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
    await_end(group)
    for path in shared:
        path.unlink(missing_ok=True)


def _shared_memory(group: int) -> set[Path]:
    """The blocks of multiprocessing's shared memory that a group has mapped. They are files, which the process that would
    remove them leaves behind when it is killed: vLLM's workers have 400 MB of them, as far as they are written.
    """
    found = set()
    for process in _members(group):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            names = (line.split(maxsplit=5)[5:] for line in (process / "maps").read_text(errors="replace").splitlines())
            found |= {Path(name[0]) for name in names if name and name[0].startswith(SHARED_MEMORY)}
    return {path for path in found if path.exists()}


def await_end(group: int, seconds: float = GONE_SECONDS) -> bool:
    """Whether the processes of a group have ended, within `seconds`. One that is only not reaped yet has: its memory, on a GPU
    too, was freed before. Without /proc there is no CUDA either, and nothing is waited for.
    """
    deadline = time.monotonic() + seconds
    while any(_alive(process) for process in _members(group)):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _members(group: int) -> Iterator[Path]:
    for process in PROC.glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if int(_fields(process / "stat")[2]) == group:
                yield process


def _alive(process: Path) -> bool:
    """Whether any thread of it runs: a process whose first thread has ended looks ended, and keeps all it holds."""
    for thread in process.glob("task/[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if _fields(thread)[0] not in ("Z", "X"):
                return True
    return False


def _fields(stat: Path) -> list[str]:
    """State, parent, group, ...: what follows the name, in which spaces and brackets may stand."""
    return stat.read_text(errors="replace").rpartition(")")[2].split()


def watch_helpers(helpers: Sequence[BaseProcess], *, grace: float = GRACE_SECONDS) -> None:
    """Kills this process's group `grace` seconds after one of its helpers has ended, unless the process itself ends before.
    vLLM 0.32 waits for ever for a core that was killed: its monitor stops the thread that would have told it.
    """

    def watch() -> None:
        wait([helper.sentinel for helper in helpers])
        time.sleep(grace)
        ended = [f"{helper.name} (exit code {helper.exitcode})" for helper in helpers if helper.exitcode is not None]
        print(f"{', '.join(ended)} ended, and the engine with it", flush=True)
        os.killpg(0, signal.SIGKILL)

    if helpers:
        threading.Thread(target=watch, daemon=True, name="helpers").start()
