"""Records on disk that are read when they are asked for: a pass over a million of them holds one file at a time."""

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar, overload

from selfplay import store

R = TypeVar("R")


class Records(Sequence[R]):
    """The records of finished files of JSON lines, file after file, in order. What is held is where each one begins: 8 bytes.

    A file is checked against its digest when it is added and at every pass, for it is read again each time.
    """

    def __init__(self, kind: type[R], paths: Sequence[Path] = ()) -> None:
        self._kind = kind
        self._paths: list[Path] = []
        self._starts: list[array[int]] = []  # of the lines of each file, in bytes
        self._firsts: list[int] = []  # the place of each file's first record
        self._count = 0
        for path in paths:
            self.add(path)

    def add(self, path: Path) -> None:
        """Appends the records of one more file. StorageError where it is damaged."""
        starts, place = array("q"), 0
        for line in store.read_bytes(path).split(b"\n"):
            if line:
                starts.append(place)
            place += len(line) + 1
        self._paths.append(path)
        self._starts.append(starts)
        self._firsts.append(self._count)
        self._count += len(starts)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[R]:
        for path in self._paths:
            yield from store.read_records(path, self._kind)

    @overload
    def __getitem__(self, place: int) -> R: ...

    @overload
    def __getitem__(self, place: slice) -> list[R]: ...

    def __getitem__(self, place: int | slice) -> R | list[R]:
        if isinstance(place, slice):
            return self._some(range(self._count)[place])
        return self._some([range(self._count)[place]])[0]

    def _some(self, places: Sequence[int]) -> list[R]:
        found: list[R] = []
        rest = list(places)
        while rest:
            number = bisect_right(self._firsts, rest[0]) - 1
            first, starts = self._firsts[number], self._starts[number]
            mine = 0
            with self._paths[number].open("rb") as file:
                for place in rest:
                    if not first <= place < first + len(starts):
                        break
                    file.seek(starts[place - first])
                    found.append(
                        store.parse_record(file.readline(), self._kind, self._paths[number], place - first + 1)
                    )
                    mine += 1
            rest = rest[mine:]
        return found
