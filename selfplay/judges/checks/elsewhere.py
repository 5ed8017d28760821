"""The process that runs the checks of other packages. A text that takes too long, or that a package dies of, gets no verdict;
then another process goes on. That is a time limit that holds in any thread and for code that never looks up.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Any

from selfplay.errors import JudgeError
from selfplay.judges.checks.foreign import FOREIGN
from selfplay.judges.checks.verdict import NoVerdictError

# For looking at a check's arguments, which is done once and not for every text.
FAULT_SECONDS = 60.0


class Elsewhere:
    """Runs checks of `kinds`, one at a time, in a child process that starts with the first of them."""

    def __init__(self, kinds: Sequence[str]) -> None:
        self.kinds = [kind for kind in kinds if kind in FOREIGN]
        self.process: subprocess.Popen[str] | None = None
        self.log: IO[bytes] | None = None

    def __enter__(self) -> "Elsewhere":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def value(self, kind: str, args: Mapping[str, Any], text: str, gold: str | None) -> float:
        """What the check says of the text, in [0, 1]. NoVerdictError where it says nothing."""
        seconds = args.get("seconds", FOREIGN[kind].seconds)
        reply = self._ask({"kind": kind, "args": args, "text": text, "gold": gold, "seconds": seconds})
        if "none" in reply:
            raise NoVerdictError(reply["none"])
        return float(reply["value"])

    def fault(self, kind: str, args: Mapping[str, Any], gold: str | None) -> str:
        """What is wrong with a check's arguments or with the gold answer; empty where nothing is."""
        try:
            reply = self._ask({"kind": kind, "args": args, "gold": gold, "seconds": FAULT_SECONDS})
        except NoVerdictError as error:
            return str(error)
        return str(reply["fault"])

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        process = self.process or self._start()
        reply = _exchange(process, json.dumps(message))
        if reply is not None:
            return reply
        code = process.wait()
        said = self._end()
        if code == -signal.SIGALRM:
            raise NoVerdictError(f"{message['kind']}: no verdict within {message['seconds']:g} s")
        raise NoVerdictError(f"{message['kind']}: no verdict, its package failed ({said})")

    def _start(self) -> subprocess.Popen[str]:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "selfplay.judges.checks.child", *self.kinds],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for us; the child ends with its input, or by its own alarm
            # sets and so the steps of a simplification have one order; the packages use no accelerator and no network
            env=os.environ | {"PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        )
        if _exchange(self.process, "") is None:
            self.process.wait()
            raise JudgeError(f"the process for the checks {', '.join(self.kinds)} did not start: {self._end()}")
        return self.process

    def _end(self) -> str:
        """Ends the process; what it said last."""
        if self.process is None or self.log is None:
            return ""
        self.process.kill()
        self.process.communicate()
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        self.log.close()
        self.process = self.log = None
        return lines[-1][:300] if lines else "it said nothing"


def _exchange(process: subprocess.Popen[str], line: str) -> dict[str, Any] | None:
    """The next reply, after sending a line where there is one; None where the process is gone."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if line:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        reply: dict[str, Any] = json.loads(process.stdout.readline() or "null")
    except BrokenPipeError:
        return None
    return reply
