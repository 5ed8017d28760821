"""Rows of a file are read when they are asked for, and are those that the file had when it was opened."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfplay.data_rows import BLOCK, open_rows
from selfplay.errors import DataError

LINES = st.lists(
    st.tuples(
        st.sampled_from(['{"a": "é\\u2028"}', '{"a": 1}', "", "  \t", "\u3000"]), st.sampled_from(["\n", "\r\n", "\r"])
    ),
    max_size=5 * BLOCK,
)


@given(lines=LINES, mark=st.booleans(), ended=st.booleans())
def test_rows_by_number_and_in_a_pass_are_those_of_the_whole_text(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str, str]], mark: bool, ended: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    text = "".join(line + end for line, end in lines)
    path.write_bytes(b"\xef\xbb\xbf" * mark + (text if ended else text.rstrip("\r\n")).encode())
    wanted = [json.loads(line) for line in path.read_text("utf-8-sig").split("\n") if line.strip()]
    rows = open_rows(str(path))
    assert list(rows) == wanted
    assert [rows[n] for n in range(len(rows))] == wanted
    assert list(rows) == wanted, "a second pass"


def numbered(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(count)))
    return path


def test_rows_stay_what_they_were_where_the_file_is_replaced_or_grows(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.jsonl", 40)
    rows = open_rows(str(path))
    with path.open("a") as file:
        file.write('{"n": 40}\n')
    assert [row["n"] for row in rows] == list(range(40))
    numbered(tmp_path / "b.jsonl", 3).replace(path)
    assert [rows[n]["n"] for n in range(40)] == list(range(40))


def test_a_file_that_is_written_over_while_it_is_in_use_is_an_error(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.jsonl", 40)
    rows = open_rows(str(path))
    path.write_text(path.read_text().replace('"n": 39', '"n": 38'))
    assert rows[0] == {"n": 0}
    with pytest.raises(DataError, match=r"a\.jsonl: written over while it was in use"):
        rows[39]
    path.write_text("")
    with pytest.raises(DataError, match="written over"):
        list(rows)


@pytest.mark.parametrize("before", [0, 1, BLOCK, 3 * BLOCK + 1])
def test_a_line_that_is_no_json_is_named_by_its_number_in_the_file(tmp_path: Path, before: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + '{"n": 1}\n\n' * before + "{never\n" + '{"n": 1}\n' * 3)
    rows = open_rows(str(path))
    for read in (list, lambda rows: rows[before]):
        with pytest.raises(DataError, match=rf"a\.jsonl:{2 * before + 2}: not a JSON line"):
            read(rows)


def test_rows_that_are_no_objects_and_files_that_are_no_text_are_errors(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", "1\n"), ("a.json", "[1]"), ("b.json", "{}")):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match="objects with named fields"):
            list(open_rows(str(tmp_path / name)))
    (tmp_path / "c.jsonl").write_bytes(b'{"n": 1}\n\xff\n')
    for place in (tmp_path / "c.jsonl", tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError, match="can't be read"):
            open_rows(str(place.with_suffix(".jsonl")))
