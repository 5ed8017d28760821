"""What was paid for is kept as it arrives: an append-only file of what an endpoint said, beside the judgements.

`replies.log` holds one JSON line per question that was asked: its digest, and the reply, or why there was none after all its
tries, each with the tokens that the server counted. A line is synced before the next question's reply is used, and half a
line, which a kill may leave, is cut off on opening. It is a log and no artifact: its order is that of arrival, it has no digest
beside it, and what trains is in the judgements.
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
    probable first tokens and their logps (nats); how many requests it took.
    """

    text: str
    cut: bool
    prompt_tokens: int = 0
    completion_tokens: int = 0
    top: tuple[tuple[str, float], ...] = ()
    tries: int = 1

    @property
    def counted(self) -> bool:
        """Whether the server told of tokens."""
        return self.prompt_tokens + self.completion_tokens > 0


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a question got no reply; the reason's first line is the same for the same kind of fault. `final` is a refusal: what
    the server said is about this question, so it would say it again. Else a reply may come another time. A server may have
    counted tokens nonetheless.
    """

    reason: str
    final: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tries: int = 1

    @property
    def counted(self) -> bool:
        """Whether the server told of tokens."""
        return self.prompt_tokens + self.completion_tokens > 0


@dataclass(frozen=True, slots=True)
class _Line:
    key: str
    reply: Reply | None
    failure: Failure | None = None


_LINE = TypeAdapter(_Line)


class Journal:
    """What was said in one stage, in a `with` block; `folder` is that of its judgements, None keeps it in memory alone.

    By question: `replies`; `refused`, final failures, and which of them no reply of another question came after
    (`refused_last`); `tried`, how often it was asked in vain. Over all of them: requests sent (`num_calls`), those beyond the
    first of a question, those whose tokens the server counted, and these tokens.
    """

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / NAME
        self.replies: dict[str, Reply] = {}
        self.refused: dict[str, Failure] = {}
        self.refused_last: set[str] = set()
        self.tried: Counter[str] = Counter()
        self.num_calls = self.num_retries = self.num_counted = 0
        self.prompt_tokens = self.completion_tokens = 0

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
            self._keep(found.key, found.reply or found.failure or Failure(""))
        return whole

    def _keep(self, key: str, found: Reply | Failure) -> None:
        if isinstance(found, Reply):
            self.replies[key] = found
            self.refused_last.clear()
        else:
            self.tried[key] += 1
            if found.final:
                self.refused[key] = found
                self.refused_last.add(key)
        self.num_calls += found.tries
        self.num_retries += found.tries - 1
        self.num_counted += found.counted
        self.prompt_tokens += found.prompt_tokens
        self.completion_tokens += found.completion_tokens

    def add(self, key: str, found: Reply | Failure) -> None:
        """Keeps what a question got; after this it is on the disk."""
        self._keep(key, found)
        if self.path is None:
            return
        line = _Line(key, found, None) if isinstance(found, Reply) else _Line(key, None, found)
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
