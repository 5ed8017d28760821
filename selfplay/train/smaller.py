"""The caps of packs that processes with sharded weights have left to those that start after them, since memory ran out.

train/smaller-packs-00001.json   {"max_pack_tokens": ...}, by process 1
"""

import json
from pathlib import Path

from selfplay import store


def leave_cap(out: Path, rank: int, max_pack_tokens: int) -> None:
    """A file for each process: several may run out of memory at once."""
    data = json.dumps({"max_pack_tokens": max_pack_tokens}) + "\n"
    store.rewrite(out / "train" / f"smaller-packs-{rank:05d}.json", data.encode())


def left_cap(out: Path) -> int | None:
    """The smallest of them; None where there is none."""
    found = (out / "train").glob("smaller-packs-*.json")
    return min((json.loads(file.read_text())["max_pack_tokens"] for file in found), default=None)
