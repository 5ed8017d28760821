"""Who is told how far a training job is."""

from typing import Protocol


class Progress(Protocol):
    """Called with what is counted ("train", "reference", "kl"), how many are done, and of how many."""

    def __call__(self, what: str, done: int, total: int) -> None: ...

    def note(self, text: str) -> None:
        """One line for the user."""


class _Silent:
    def __call__(self, what: str, done: int, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


SILENT = _Silent()
