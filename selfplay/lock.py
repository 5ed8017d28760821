"""One process works on a run at a time."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from selfplay.errors import LockedError


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Holds the run for this process. LockedError names the process that has it."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise LockedError(
                f"{run}: process {file.read().strip()} works on this run; wait for it or stop it"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
