"""Records that are read when they are asked for."""

from pathlib import Path

import pytest

from selfplay import store
from selfplay.errors import StorageError
from selfplay.records import Part, Records
from selfplay.types import Judgement


def written(folder: Path, *counts: int) -> tuple[list[Path], list[Judgement]]:
    """Shards of so many judgements, and all of them in order."""
    paths, whole = [], []
    for number, count in enumerate(counts):
        # a line separator that is no end of a line
        rows = [Judgement(f"p{number}-{n}", (float(n), None), ("\u2028\r\n", "")) for n in range(count)]
        paths.append(folder / f"{number:05d}.jsonl")
        store.write_records(paths[-1], rows, Judgement)
        whole += rows
    return paths, whole


def test_they_are_the_records_of_all_files_in_order(tmp_path: Path) -> None:
    paths, whole = written(tmp_path, 3, 1, 0, 4)
    records = Records(Judgement, paths)
    assert list(records) == whole
    assert [records[n] for n in range(len(records))] == whole
    assert records[-1] == whole[-1]
    with pytest.raises(IndexError):
        records[len(whole)]


def test_of_many_records_those_asked_for_are_read_and_blank_lines_are_none(tmp_path: Path) -> None:
    paths, whole = written(tmp_path, 21, 2, 40)
    text = paths[2].read_bytes().split(b"\n")
    store.write_bytes(paths[2], b"\n".join([b"", *text[:9], b"", *text[9:]]))
    records = Records(Judgement, paths)
    assert [records[n] for n in range(len(records))] == whole == list(records)
    assert records[::-3] == whole[::-3]
    part = Part(records, 15, 50)
    assert list(part) == [part[n] for n in range(len(part))] == whole[15:50]
    assert part[3:9] == whole[18:24]
    assert part == whole[15:50]
    assert part != whole[15:49]


@pytest.mark.parametrize("cut", [slice(0, 3), slice(2, 5), slice(None, None, -2), slice(3, 3), slice(5, 99)], ids=str)
def test_a_slice_is_that_of_the_list(tmp_path: Path, cut: slice) -> None:
    paths, whole = written(tmp_path, 3, 1, 4)
    assert Records(Judgement, paths)[cut] == whole[cut]


def test_a_damaged_file_is_refused_when_it_is_added_and_at_every_pass(tmp_path: Path) -> None:
    paths, _ = written(tmp_path, 2, 2)
    records = Records(Judgement, paths)
    paths[1].write_bytes(paths[1].read_bytes().replace(b"p1-1", b"p9-9"))
    with pytest.raises(StorageError, match="damaged"):
        list(records)
    with pytest.raises(StorageError, match="damaged"):
        Records(Judgement, paths)


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "00000.jsonl"
    store.write_json_lines(path, [{"prompt_id": "p", "scores": [1.0]}, {"prompt_id": "q"}])
    with pytest.raises(StorageError, match=r"00000\.jsonl:2: not a Judgement: scores"):
        Records(Judgement, [path])[1]
