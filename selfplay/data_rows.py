"""The rows of a file or data set, each read when it is asked for, so that a million of them are not held."""

import json
import os
import weakref
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from selfplay.errors import DataError

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
BLOCK = 16  # rows of a .jsonl file between two places that are held: to read one row is to read those of its block
MARK = b"\xef\xbb\xbf"  # a byte order mark
Row = dict[str, Any]


class Rows(Protocol):
    """Rows by number, from 0; several passes give the same."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Row]: ...

    def __getitem__(self, number: int, /) -> Row: ...


def open_rows(source: str, *, name: str | None = None, split: str = "train") -> Rows:
    """The rows of a local .jsonl, .json, .csv or .parquet file, or of a data set id through `datasets`, which maps its tables
    into memory. A .json file is one text, and its rows are held. DataError where there is nothing to read.
    """
    path = Path(source)
    if path.suffix == ".jsonl":
        return JsonLines(path)
    if path.suffix == ".json":
        return _json_rows(path)
    from datasets import load_dataset

    try:
        if path.suffix in FILE_SUFFIXES:
            if not path.is_file():
                raise DataError(f"{source}: no such file")
            found: Any = load_dataset(path.suffix[1:], data_files=str(path), split="train")
        else:
            found = load_dataset(source, name, split=split)
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: can't be read as a file or a data set id ({error})") from error
    rows: Rows = found
    return rows


def _json_rows(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read ({error})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
    if not isinstance(rows, list):
        raise DataError(_no_objects(path))
    return [_mapping(row, path) for row in rows]


def _mapping(row: Any, path: Path) -> Row:
    if not isinstance(row, dict):
        raise DataError(_no_objects(path))
    return row


def _no_objects(path: Path) -> str:
    return f"{path}: expected rows that are objects with named fields"


class JsonLines:
    """The rows of a .jsonl file; blank lines are none. Held are the place and the checksum of every BLOCK-th.

    The file stays open: another may take its name, and lines may be added, while it is in use. DataError where what was there
    is written over.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts, self._sums, self._count = array("Q"), array("I"), 0
        try:
            self._file = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
            self._scan()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: can't be read ({error})") from error

    def _scan(self) -> None:
        place = 0
        with open(self._file, "rb", closefd=False) as file:
            for piece in file:
                # "\r" alone ends a line as well; U+2028 and others don't, for they may stand inside a string
                for line in piece.splitlines(keepends=True):
                    if place == 0 and line.startswith(MARK):
                        place, line = len(MARK), line[len(MARK) :]
                    full = bool(line.decode().strip())
                    if not self._starts or (full and self._count % BLOCK == 0 and self._count):
                        self._starts.append(place)
                        self._sums.append(0)
                    self._sums[-1] = zlib.crc32(line, self._sums[-1])
                    self._count += full
                    place += len(line)
        self._starts.append(place)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Row]:
        for block in range(len(self._sums)):
            for n, line in enumerate(self._block(block)):
                if line.strip():
                    yield self._row(line, block, n)

    def __getitem__(self, number: int) -> Row:
        block, rest = divmod(range(self._count)[number], BLOCK)
        full = [(n, line) for n, line in enumerate(self._block(block)) if line.strip()]
        n, line = full[rest]
        return self._row(line, block, n)

    def _block(self, block: int) -> list[str]:
        """Its lines, blank ones too."""
        start, end = self._starts[block], self._starts[block + 1]
        try:
            data = os.pread(self._file, end - start, start)
        except OSError as error:  # a pipe, for one, gives its bytes once
            raise DataError(f"{self._path}: can't be read ({error})") from error
        if zlib.crc32(data) != self._sums[block]:
            raise DataError(f"{self._path}: written over while it was in use. Bring it back, then run the same command")
        return [line.decode() for line in data.splitlines()]

    def _row(self, line: str, block: int, n: int) -> Row:
        try:
            return _mapping(json.loads(line), self._path)
        except json.JSONDecodeError as error:
            number = sum(len(self._block(before)) for before in range(block)) + n + 1
            raise DataError(f"{self._path}:{number}: not a JSON line ({error.msg})") from error
