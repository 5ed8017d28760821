"""Records on disk that are read when they are asked for: a pass over a million of them holds one."""

from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar, overload

from selfplay import store

R = TypeVar("R")
STRIDE = 8  # records between two places that are held: to read one is to read the bytes of so many


class Lazy(Sequence[R]):
    """A sequence whose items are made by `_item` when they are asked for; equal to any sequence of the same."""

    @overload
    def __getitem__(self, place: int) -> R: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[R]: ...

    def __getitem__(self, place: int | slice) -> R | Sequence[R]:
        if isinstance(place, slice):
            return self._items(range(len(self))[place])
        return self._item(range(len(self))[place])

    @abstractmethod
    def _item(self, place: int) -> R: ...

    def _items(self, places: range) -> Sequence[R]:
        return [self._item(place) for place in places]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class Records(Lazy[R]):
    """The records of finished files of JSON lines, file after file, in order. What is held is where every STRIDE-th begins: a
    byte for each record.

    A file is checked against its digest when it is added and at every pass, for it is read again each time.
    """

    def __init__(self, kind: type[R], paths: Sequence[Path] = ()) -> None:
        self._kind = kind
        self._paths: list[Path] = []
        self._starts: list[array[int]] = []  # of every STRIDE-th record of each file, in bytes, and the file's end
        self._firsts: list[int] = []  # the place of each file's first record
        self._count = 0
        for path in paths:
            self.add(path)

    def add(self, path: Path) -> None:
        """Appends the records of one more file. StorageError where it is damaged."""
        starts, place, count = array("q"), 0, 0
        for line in store.each_line(path):
            if line != b"\n":
                if count % STRIDE == 0:
                    starts.append(place)
                count += 1
            place += len(line)
        starts.append(place)
        self._paths.append(path)
        self._starts.append(starts)
        self._firsts.append(self._count)
        self._count += count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[R]:
        for path in self._paths:
            yield from store.each_record(path, self._kind)

    def _item(self, place: int) -> R:
        return self._items(range(place, place + 1))[0]

    def _items(self, places: range) -> list[R]:
        found: list[R] = []
        held, lines = (-1, -1), [b""]
        for place in places:
            number = bisect_right(self._firsts, place) - 1
            block, rest = divmod(place - self._firsts[number], STRIDE)
            if (number, block) != held:
                held, lines = (number, block), self._lines(number, block)
            found.append(store.parse_record(lines[rest], self._kind, self._paths[number], block * STRIDE + rest + 1))
        return found

    def _lines(self, number: int, block: int) -> list[bytes]:
        start, end = self._starts[number][block : block + 2]
        with self._paths[number].open("rb") as file:
            file.seek(start)
            return [line for line in file.read(end - start).split(b"\n") if line]


class Part(Lazy[R]):
    """Some neighbouring records of several, from `first` on and before `end`."""

    def __init__(self, records: Records[R], first: int, end: int) -> None:
        self._records, self._places = records, range(first, end)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[R]:
        for first in self._places[::STRIDE]:
            yield from self._records[first : min(first + STRIDE, self._places.stop)]

    def _item(self, place: int) -> R:
        return self._records[self._places[place]]
