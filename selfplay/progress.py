"""What a run says while it works: a bar with rate and remaining time in a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[int], None]  # rows done so far
LINE_SECONDS = 15.0


@dataclass(slots=True)
class Reporter:
    """Prints stages and notes. `quiet` says nothing at all: for tests and for use as a library."""

    quiet: bool = False
    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))

    def note(self, text: str) -> None:
        """One line."""
        if not self.quiet:
            self.console.print(text, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str, *, done: int = 0) -> Iterator[Advance]:
        """Yields a function that takes the number of rows done so far. `done` were there before: they count for no rate."""
        started = time.monotonic()
        if self.quiet:
            yield lambda done: None
            return
        if self.console.is_terminal:
            yield from self._bar(name, total, unit, done)
        else:
            yield from self._lines(name, total, unit, done, started)
        self.note(f"{name}: {total - done} {unit} in {time.monotonic() - started:.1f} s")

    def _bar(self, name: str, total: int, unit: str, before: int) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} {task.fields[unit]}, {task.fields[rate]:.1f}/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(name, total=total, completed=before, unit=unit, rate=0.0)

            def advance(done: int) -> None:
                bar.update(task, completed=done, rate=bar.tasks[0].speed or 0.0)

            yield advance

    def _lines(self, name: str, total: int, unit: str, before: int, started: float) -> Iterator[Advance]:
        last = started

        def advance(done: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= LINE_SECONDS and done > before:
                last = now
                rate = (done - before) / (now - started)
                self.note(f"{name}: {done}/{total} {unit}, {rate:.1f}/s, {max(0, total - done) / rate:.0f} s left")

        yield advance


SILENT = Reporter(quiet=True)
