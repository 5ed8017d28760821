"""Faults on purpose, for tests: SELFPLAY_FAULT="POINT@N=ACTION" does ACTION the N-th time that a process passes POINT.

    SELFPLAY_FAULT="train.step@3=kill9" selfplay iterate ...

With ACTION/RANK only the process of that RANK does it, of those that train together. kill9 and term send this process a
signal, hang makes it wait for ever; raise, enospc (disk full) and oom (the device's memory) raise; nan is left to the
point to apply. SELFPLAY_FAULT="list=FILE" does nothing but write the name of every point passed to FILE, a line each.
Where the variable isn't set a point costs one look into the environment.
"""

import errno
import functools
import os
import re
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from selfplay.errors import RecipeError

VARIABLE = "SELFPLAY_FAULT"
ACTIONS = ("kill9", "term", "hang", "raise", "enospc", "oom", "nan")


class InjectedError(RuntimeError):
    """What the action `raise` raises."""


@dataclass(slots=True)
class _Plan:
    point: str = ""
    at: int = 0
    action: str = ""
    listed: Path | None = None
    passed: Counter[str] = field(default_factory=Counter)

    def hit(self, point: str) -> bool:
        if self.listed is not None:
            with self.listed.open("a") as file:
                file.write(point + "\n")
            return False
        self.passed[point] += 1
        if point != self.point or self.passed[point] != self.at:
            return False
        _act(self.action, point)
        return self.action == "nan"


def hit(point: str) -> bool:
    """Passes a point: does what the environment asks for here. True where the caller is to make its numbers NaN."""
    text = os.environ.get(VARIABLE)
    return text is not None and _plan(text).hit(point)


def forget() -> None:
    """Counts from the start again: for tests that inject several faults in one process."""
    _plan.cache_clear()


@functools.cache
def _plan(text: str) -> _Plan:
    if text.startswith("list="):
        return _Plan(listed=Path(text.removeprefix("list=")))
    found = re.fullmatch(r"([\w.]+)@(\d+)=(\w+)(?:/(\d+))?", text)
    if found is None or found[3] not in ACTIONS:
        raise RecipeError(f'{VARIABLE}="{text}" is neither POINT@N={"|".join(ACTIONS)}[/RANK] nor list=FILE: unset it')
    if found[4] not in (None, os.environ.get("RANK")):
        return _Plan()
    return _Plan(found[1], int(found[2]), found[3])


def _act(action: str, point: str) -> None:
    match action:
        case "kill9":
            os.kill(os.getpid(), signal.SIGKILL)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "hang":
            while True:
                signal.pause()
        case "raise":
            raise InjectedError(f"injected at {point}")
        case "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "oom":
            import torch

            raise torch.OutOfMemoryError(f"injected at {point}")
