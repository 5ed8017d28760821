"""Files of a stage that are gone after it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from selfplay import store
from selfplay.errors import StorageError
from selfplay.records import Records
from selfplay.scratch import scratch, write_scratch
from selfplay.types import Drop, Judgement

ROWS = [Drop("a", "why"), Judgement("b", (1.0, None)), Drop("c", "why", "x:1")]


def test_records_of_two_kinds_are_in_the_file_of_their_kind_until_the_stage_ends(tmp_path: Path) -> None:
    with scratch(tmp_path / "work") as room:
        files = {Drop: room / "n" / "drops.jsonl", Judgement: room / "n" / "judgements.jsonl"}
        write_scratch(ROWS, files)
        assert Records(Drop, [files[Drop]]) == [ROWS[0], ROWS[2]]
        assert Records(Judgement, [files[Judgement]]) == [ROWS[1]]
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_after_an_error_and_what_a_kill_leaves_is_swept(tmp_path: Path) -> None:

    def failing() -> None:
        with scratch(tmp_path / "work") as room:
            write_scratch(ROWS[:1], {Drop: room / "drops.jsonl"})
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert list(tmp_path.iterdir()) == []
    with scratch(tmp_path / "work") as room:
        write_scratch(ROWS[:1], {Drop: room / "drops.jsonl"})
        assert store.sweep(tmp_path) == [room]
        assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_disk_is_told_from_one_of_what_makes_the_records(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match="can't be written"):
        write_scratch(ROWS[:1], {Drop: tmp_path / "file" / "drops.jsonl"})

    def made() -> Iterator[Drop]:
        yield Drop("a", "why")
        raise FileNotFoundError("a file of the selector")

    with pytest.raises(FileNotFoundError, match="of the selector"):
        write_scratch(made(), {Drop: tmp_path / "drops.jsonl"})
