"""What was paid for is kept as it arrives: an append-only file of replies beside the judgements.

`replies.log` holds one JSON line per reply: the digest of its question, the text, and the tokens that the server counted. A
line without a reply says that the question got none, after all its tries. A line is synced before the next question's reply
is used, and half a line, which a kill may leave, is cut off on opening. It is a log and no artifact: its order is that of
arrival, it has no digest beside it, and what trains is in the judgements.
"""

import contextlib
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import TypeAdapter, ValidationError

from selfplay.errors import StorageError

NAME = "replies.log"
USAGE = "usage.json"  # beside it, what the replies cost


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model wrote; whether max_tokens cut it; the tokens that the server counted; where they were asked for, the most
    probable first tokens and their logps (nats).
    """

    text: str
    cut: bool
    prompt_tokens: int = 0
    completion_tokens: int = 0
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class _Line:
    key: str
    reply: Reply | None


_LINE = TypeAdapter(_Line)


class Journal:
    """The replies of one stage, in a `with` block; `folder` is that of its judgements, None keeps them in memory alone.
    `without_reply` counts, by question, how often it was asked in vain.
    """

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / NAME
        self.replies: dict[str, Reply] = {}
        self.without_reply: Counter[str] = Counter()

    def __enter__(self) -> Self:
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                whole = self._read(self.path.read_bytes() if self.path.exists() else b"")
                self._file = self.path.open("ab")
                self._file.truncate(whole)
            except OSError as error:
                raise self._unwritable(error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.path is not None:
            with contextlib.suppress(OSError):  # of a line that could not be written; `add` has said so
                self._file.close()

    def _read(self, data: bytes) -> int:
        """The size of all whole lines."""
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                found = _LINE.validate_json(line)
            except ValidationError as error:
                raise StorageError(
                    f"{self.path}:{number}: damaged; delete this line to ask its question again"
                ) from error
            self._keep(found)
        return whole

    def _keep(self, line: _Line) -> None:
        if line.reply is None:
            self.without_reply[line.key] += 1
        else:
            self.replies[line.key] = line.reply

    def add(self, key: str, reply: Reply | None) -> None:
        """Keeps a reply, or that there was none; after this it is on the disk."""
        line = _Line(key, reply)
        self._keep(line)
        if self.path is None:
            return
        try:
            self._file.write(json.dumps(asdict(line)).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self.path}: can't be written ({error.strerror}). Free space or mend the permissions, then run the same command"
        )
