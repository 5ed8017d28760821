"""Prompts that are made from the rows of their data set whenever they are asked for. Of each are held 13 bytes."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from selfplay.prompt_rows import PromptRows
from selfplay.records import Lazy
from selfplay.types import Drop, Prompt

# `id` is a prompt's 16 hex digits as a number, `row` the number of its row, `marks` any of those below
INDEX = np.dtype([("id", "<u8"), ("row", "<u4"), ("marks", "u1")])
GOLD, CHECKS, TOO_LONG, NO_ROOM = 1, 2, 4, 8
Index = npt.NDArray[Any]


class Prompts(Lazy[Prompt]):
    """Prompts of one data set, in the order of `index`; a slice is such a sequence too. `name` is that of the source, where a
    recipe has several: it stands before the `source` of each prompt.
    """

    def __init__(self, rows: PromptRows, index: Index, name: str = "") -> None:
        self._rows, self._index, self._name = rows, index, name

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, place: int) -> Prompt: ...

    @overload
    def __getitem__(self, place: slice) -> "Prompts": ...

    def __getitem__(self, place: int | slice) -> "Prompt | Prompts":
        return self.only(place) if isinstance(place, slice) else self._item(place)

    def _item(self, place: int) -> Prompt:
        return self._made(int(self._index["row"][place]))

    def __iter__(self) -> Iterator[Prompt]:
        return (self._made(int(row)) for row in self._index["row"])

    def _made(self, row: int) -> Prompt:
        prompt = self._rows[row]
        assert isinstance(prompt, Prompt)
        return replace(prompt, source=f"{self._name}:{prompt.source}") if self._name else prompt

    @property
    def ids(self) -> Index:
        """Their ids as numbers."""
        ids: Index = self._index["id"]
        return ids

    @property
    def marks(self) -> Index:
        """What is known of each: GOLD, CHECKS, ... added up."""
        marks: Index = self._index["marks"]
        return marks

    def only(self, places: Any) -> "Prompts":
        """Those at some places: a slice, or what NumPy takes as an index."""
        return Prompts(self._rows, self._index[places], self._name)

    def named(self, name: str) -> "Prompts":
        """The same as prompts of a source."""
        return Prompts(self._rows, self._index, name)

    @property
    def without_gold(self) -> "Prompts":
        """Those that have no gold answer."""
        return self.only(self.marks & GOLD == 0)

    @property
    def with_checks(self) -> "Prompts":
        """Those that have checks of their own."""
        return self.only(self.marks & CHECKS != 0)

    @property
    def facts(self) -> Iterator[list[Any]]:
        """Of each its id, gold answer and checks; rows that have neither are not read."""
        for id, row, marks in self._index:
            if marks & (GOLD | CHECKS):
                prompt = self._made(int(row))
                yield [prompt.id, prompt.gold, list(prompt.checks)]
            else:
                yield [f"{int(id):016x}", None, []]

    def drops(self, why: Callable[[int], str]) -> Iterator[Drop]:
        """A drop for each of them; `why` gets its marks. Its source is the row's place, without a name before it."""
        return (Drop(f"{int(id):016x}", why(int(marks)), self._rows.where(int(row))) for id, row, marks in self._index)


def json_list(values: Iterable[Any], *, sort_keys: bool = False) -> Iterator[bytes]:
    """json.dumps of a list of some values, piece by piece."""
    yield b"["
    for number, value in enumerate(values):
        yield (", " * (number > 0) + json.dumps(value, sort_keys=sort_keys)).encode()
    yield b"]"
