"""A limit on how long a judge of the user may say nothing.

Python can't stop a thread from outside, and a process of its own would take the judge away from what it closes over. So the
judge works in a daemon thread while the caller waits. After the limit the caller goes on without it: the thread runs until
it ends by itself or the process does, which doesn't wait for it, and what it still returns reaches nobody.
"""

import contextvars
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from selfplay.errors import JudgeError
from selfplay.judges.contract import PROMPTS_SHOWN, named
from selfplay.judges.python import LoadedJudge
from selfplay.protocols import JudgeContext
from selfplay.types import Group, Judgement


@dataclass(frozen=True, slots=True)
class _Returned:
    judgements: Sequence[Judgement]


_Said = queue.SimpleQueue[int | BaseException | _Returned]


class _Sent:
    """A `with` block in the judge's thread: whatever it raises is sent to who waits."""

    def __init__(self, said: _Said) -> None:
        self.said = said

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> bool:
        if error is not None:
            self.said.put(error)
        return True


class TimedJudge:
    """`inner`, with at most `seconds` between two verdicts. A judge that says nothing on the way has them for each call. The
    limit is no part of the identity: verdicts that came in time are the same under any.
    """

    def __init__(self, inner: LoadedJudge, seconds: float) -> None:
        self.inner = inner
        self.seconds = seconds
        self.identity = inner.identity

    @property
    def compares(self) -> bool:
        return self.inner.compares

    def count_verdicts(self, groups: Sequence[Group]) -> int | None:
        return self.inner.count_verdicts(groups)

    def stage(self, folder: Path, note: Callable[[str], None]) -> AbstractContextManager[object]:
        """The judge's own block around a stage, where it has one; it has no limit."""
        return self.inner.stage(folder, note)

    def judge(self, groups: Sequence[Group], context: JudgeContext) -> Sequence[Judgement]:
        """What the judge returns or raises. JudgeError, naming the prompts: it said nothing for too long."""
        said: _Said = queue.SimpleQueue()

        def work() -> None:
            with _Sent(said):
                said.put(_Returned(self.inner.judge(groups, replace(context, progress=said.put))))

        threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True).start()
        while True:
            try:
                found = said.get(timeout=self.seconds)
            except queue.Empty:
                raise self._silent(groups) from None
            if isinstance(found, _Returned):
                return found.judgements
            if isinstance(found, BaseException):
                raise found
            context.progress(found)

    def _silent(self, groups: Sequence[Group]) -> JudgeError:
        calls = [where.partition(", ")[2] for where in self.inner.running()]  # without the judge's name before each
        more = f"; and {len(calls) - PROMPTS_SHOWN} more" if len(calls) > PROMPTS_SHOWN else ""
        what = "; ".join(calls[:PROMPTS_SHOWN]) + more if calls else f"{len(groups)} groups at once: {named(groups)}"
        return JudgeError(
            f"judge {self.identity}: no verdict for {self.seconds:g} s (judge.timeout). It was judging {what}.\n"
            "Finished shards of judgements are kept. Raise judge.timeout, and the same command goes on from them; a judge "
            "whose source has changed is another one and needs a new --out. The call can't be stopped from outside: it runs "
            "until this process ends, and what it still returns is not used"
        )
