"""The data of the experiments, cut by hashes of its rows: the same rows always lie in the same part."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.errors import DataError
from selfplay.prompt_rows import read_rows

Row = dict[str, Any]


def place(text: str) -> str:
    return hashlib.sha256(f"science {text}".encode()).hexdigest()


def by_rows(rows: Sequence[Row], parts: Mapping[str, int]) -> dict[str, list[Row]]:
    """Instruction rows in parts of these relative sizes. The first of rows with one prompt counts, so that no prompt lies in
    two parts.
    """
    unique: dict[str, Row] = {}
    for row in rows:
        unique.setdefault(json.dumps([row["instruction"], row.get("input", "")]), row)
    ordered = [unique[key] for key in sorted(unique, key=place)]
    total, found, start = sum(parts.values()), {}, 0
    for name, part in parts.items():
        end = start + round(len(ordered) * part / total)
        found[name], start = ordered[start:end], end
    found[name] += ordered[start:]
    return found


def by_subject(rows: Sequence[Row], parts: Mapping[str, int]) -> dict[str, list[Row]]:
    """Quickstart's rows, whole subjects, that many for each part. A subject is the first word of a row's first check."""
    subject = [row["checks"][0]["words"][0] for row in rows]
    ordered = sorted(set(subject), key=place)
    if sum(parts.values()) != len(ordered):
        raise DataError(f"the parts {dict(parts)} are not the {len(ordered)} subjects of the prompts")
    found, start = {}, 0
    for name, count in parts.items():
        own = set(ordered[start : start + count])
        found[name], start = [row for row, one in zip(rows, subject, strict=True) if one in own], start + count
    return found


def write_split(source: Path, data: Mapping[str, Mapping[str, int]], out: Path) -> None:
    """The parts of a file as JSON lines in `out`. DataError where other rows lie there already."""
    rows = list(read_rows(str(source)))
    parts = by_rows(rows, data["parts"]) if "parts" in data else by_subject(rows, data["subjects"])
    for name, part in parts.items():
        path = out / f"{name}.jsonl"
        if not path.exists():
            store.write_json_lines(path, part)
        elif store.read_json_lines(path) != part:
            raise DataError(f"{path} holds another split than {source} gives: take another --out")
