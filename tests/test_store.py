"""Files are whole or absent, damage is found, and one process works on a run."""

import errno
import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from selfplay import faults, store
from selfplay.errors import StorageError
from selfplay.types import Completion, Drop, Group, Judgement, Message, PreferencePair, Prompt

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
MESSAGES = st.lists(st.builds(Message, st.sampled_from(["user", "assistant", "system"]), TEXT), max_size=3).map(tuple)
IDS = st.lists(st.integers(0, 200_000), max_size=4).map(tuple)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.dictionaries(TEXT, st.one_of(TEXT, st.integers(-(2**53), 2**53), st.booleans(), st.none()), max_size=2)
PROMPTS = st.builds(
    Prompt,
    TEXT,
    MESSAGES,
    st.none() | st.tuples(JSON),
    st.none() | TEXT,
    st.lists(JSON, max_size=2).map(tuple),
    TEXT,
    JSON,
)
COMPLETIONS = st.builds(
    Completion,
    TEXT,
    IDS,
    st.lists(NUMBER, max_size=3).map(tuple),
    st.sampled_from(["stop", "length", "gold"]),
    st.none() | TEXT | st.integers(0, 9),
    st.none() | TEXT,
)
RECORDS: dict[type[Any], st.SearchStrategy[Any]] = {
    Prompt: PROMPTS,
    Group: st.builds(Group, PROMPTS, IDS, st.lists(COMPLETIONS, max_size=2).map(tuple), st.none() | COMPLETIONS),
    Judgement: st.builds(
        Judgement, TEXT, st.lists(st.none() | NUMBER, max_size=3).map(tuple), st.lists(TEXT, max_size=2).map(tuple)
    ),
    PreferencePair: st.builds(
        PreferencePair,
        TEXT,
        MESSAGES,
        MESSAGES,
        MESSAGES,
        IDS,
        IDS,
        IDS,
        st.none() | st.integers(0, 9),
        st.none() | st.integers(0, 9),
        st.none() | NUMBER,
        st.none() | NUMBER,
    ),
    Drop: st.builds(Drop, TEXT, TEXT),
}
WEIRD = "line\u2028para\u2029\x00nul \u202eright to left\r\n\ufeff {{x}} \U0001f600"
DROP = Drop("a", WEIRD)


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


@given(st.data(), st.sampled_from(sorted(RECORDS, key=str)))
def test_records_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, data: Any, kind: type[Any]) -> None:
    records = data.draw(st.lists(RECORDS[kind], max_size=3))
    path = tmp_path_factory.getbasetemp() / "records.jsonl"
    store.write_records(path, records, kind)
    assert store.read_records(path, kind) == records
    assert path.read_bytes().count(b"\n") == len(records)


def test_a_digest_stands_beside_each_file_in_the_form_of_sha256sum(tmp_path: Path) -> None:
    store.write_json(tmp_path / "x.json", {"a": WEIRD})
    done = subprocess.run(["sha256sum", "-c", "x.json.sha256"], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0
    assert store.read_json(tmp_path / "x.json") == {"a": WEIRD}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json", "x.json.sha256"]


def write_tensors(path: Path) -> None:
    import torch

    from selfplay.train.reference import ReferenceLogps

    ReferenceLogps(torch.arange(3.0), torch.arange(3.0)).save(path, {"weights": "w"})


def read_tensors(path: Path) -> object:
    from selfplay.train.reference import ReferenceLogps

    return ReferenceLogps.load(path, {"weights": "w"})


KINDS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    "records": (lambda p: store.write_records(p, [DROP], Drop), lambda p: store.read_records(p, Drop)),
    "json": (lambda p: store.write_json(p, {"a": 1}), store.read_json),
    "json lines": (lambda p: store.write_json_lines(p, [{"a": 1}]), store.read_json_lines),
    "bytes": (lambda p: store.write_bytes(p, b"abc"), store.read_bytes),
    "tensors": (write_tensors, read_tensors),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_anywhere_is_found(kind: str, tmp_path: Path) -> None:
    write, read = KINDS[kind]
    path = tmp_path / "file"
    write(path)
    read(path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        with pytest.raises(StorageError, match="damaged"):
            read(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_at_any_byte_is_found(kind: str, tmp_path: Path) -> None:
    write, read = KINDS[kind]
    path = tmp_path / "file"
    write(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(StorageError, match="damaged"):
            read(path)


def test_a_folder_is_checked_file_by_file(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "b").write_bytes(b"22")
        (folder / "a").write_bytes(b"1")

    store.write_folder(tmp_path / "policy", write)
    store.check_folder(tmp_path / "policy")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["policy"]
    (tmp_path / "policy" / "deep" / "b").write_bytes(b"23")
    with pytest.raises(StorageError, match=r"deep/b: damaged or missing"):
        store.check_folder(tmp_path / "policy")
    (tmp_path / "policy" / "deep" / "b").unlink()
    with pytest.raises(StorageError, match="deep/b"):
        store.check_folder(tmp_path / "policy")


def test_a_folder_holds_what_others_say_they_have_added_seen_or_not(tmp_path: Path) -> None:
    path, added = tmp_path / "checkpoint", {"hidden": hashlib.sha256(b"3").hexdigest()}

    def part(folder: Path) -> list[str]:
        (folder / "theirs").write_bytes(b"2")
        return ["theirs"]

    def others() -> dict[str, str]:
        return store.write_part(path, part) | added

    store.write_folder(path, lambda folder: (folder / "own").write_bytes(b"1"), others=others)
    with pytest.raises(StorageError, match="hidden: damaged or missing"):
        store.check_folder(path)
    (path / "hidden").write_bytes(b"3")  # as the disk of another machine shows it later
    store.check_folder(path)
    assert [line.split()[1] for line in (path / "SHA256SUMS").read_text().splitlines()] == ["hidden", "own", "theirs"]


def test_a_part_of_a_folder_is_on_disk_before_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"folder{store.TEMPORARY}").mkdir()
    synced: list[str] = []
    monkeypatch.setattr(store, "_sync", lambda path: synced.append(path.name))
    store.write_part(tmp_path / "folder", lambda folder: [(folder / "a").write_bytes(b"1") and "a"])
    assert synced == ["a"]
    with pytest.raises(StorageError, match="gone: can't be written"):
        store.write_part(tmp_path / "gone", lambda folder: [(folder / "a").write_bytes(b"1") and "a"])


def test_a_folder_whose_writing_stops_is_not_there_and_its_remains_do_not_stay(tmp_path: Path) -> None:
    def half(folder: Path) -> None:
        (folder / "a").write_bytes(b"1")
        raise Killed

    with pytest.raises(Killed):
        store.write_folder(tmp_path / "policy", half)
    assert not (tmp_path / "policy").exists()
    store.write_folder(tmp_path / "policy", lambda folder: (folder / "b").write_bytes(b"2"))
    assert sorted(p.name for p in (tmp_path / "policy").iterdir()) == ["SHA256SUMS", "b"]


def test_a_folder_with_a_shortened_list_of_digests_is_damaged(tmp_path: Path) -> None:
    store.write_folder(tmp_path / "policy", lambda folder: [(folder / n).write_bytes(b"1") for n in "ab"])
    sums = tmp_path / "policy" / "SHA256SUMS"
    sums.write_text(sums.read_text().splitlines(keepends=True)[0])
    with pytest.raises(StorageError, match="names no b"):
        store.check_folder(tmp_path / "policy")
    sums.unlink()
    with pytest.raises(StorageError, match="SHA256SUMS: damaged or missing"):
        store.check_folder(tmp_path / "policy")


def test_a_sweep_removes_what_was_left_unfinished_and_touches_nothing_else(tmp_path: Path) -> None:
    store.write_json(tmp_path / "run" / "a.json", 1)
    (tmp_path / "run" / "mine.tmp").write_text("mine")
    (tmp_path / "run" / f"b.json{store.TEMPORARY}").write_text("half")
    (tmp_path / "run" / f"policy{store.TEMPORARY}" / "deep").mkdir(parents=True)
    (tmp_path / "run" / f"policy{store.TEMPORARY}" / f"c{store.TEMPORARY}").write_text("half")
    kept = {"a.json", "a.json.sha256", "mine.tmp"}
    removed = store.sweep(tmp_path)
    assert [path.name for path in removed] == [f"b.json{store.TEMPORARY}", f"policy{store.TEMPORARY}"]
    assert {path.name for path in (tmp_path / "run").iterdir()} == kept
    assert store.sweep(tmp_path) == []
    assert store.sweep(tmp_path / "none") == []


def test_a_sweep_finishes_a_file_whose_digest_is_in_place_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write_json(tmp_path / "a.json", "old")
    monkeypatch.setenv(faults.VARIABLE, "store.file.digest@1=raise")
    faults.forget()
    with pytest.raises(faults.InjectedError):
        store.write_json(tmp_path / "a.json", "new")
    assert store.sweep(tmp_path) == []
    assert store.read_json(tmp_path / "a.json") == "new"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_is_removed_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_folder(tmp_path / "policy", lambda folder: (folder / "a").write_bytes(b"1"))
    monkeypatch.setenv(faults.VARIABLE, "store.remove.renamed@1=raise")
    faults.forget()
    with pytest.raises(faults.InjectedError):
        store.remove_folder(tmp_path / "policy")
    assert not (tmp_path / "policy").exists()
    store.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []
    store.remove_folder(tmp_path / "policy")


def test_a_file_that_grows_can_be_read_at_any_time(tmp_path: Path) -> None:
    path = tmp_path / "train" / "steps.jsonl"
    store.rewrite(path, store.json_lines([{"a": WEIRD}]))
    store.append_json_line(path, {"a": 1})
    assert store.read_json_lines(path) == [{"a": WEIRD}, {"a": 1}]
    with pytest.raises(StorageError, match="can't be written"):
        store.append_json_line(tmp_path / "none" / "steps.jsonl", {})


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "drops.jsonl"
    path.write_text('{"id": "a", "reason": "b"}\n{"id": "a"}\n')
    with pytest.raises(StorageError, match=r"drops\.jsonl:2: not a Drop: reason"):
        store.read_records(path, Drop)
    path.write_text("{nonsense\n")
    with pytest.raises(StorageError, match=r"drops\.jsonl:1: not a Drop"):
        store.read_records(path, Drop)


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match=r"No space left.*same command"):
        store.write_file(tmp_path / "file", full)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match=r"No space left.*same command"):
        store.write_folder(tmp_path / "folder", lambda folder: full(folder / "a"))
    assert not (tmp_path / "folder").exists()
    store.write_bytes(tmp_path / "file", b"new")
    assert store.read_bytes(tmp_path / "file") == b"new"


def test_a_disk_that_fills_up_while_weights_are_written_is_a_storage_error(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(StorageError, match=r"No space left.*same command"):
        store.write_file(tmp_path / "file", full)
    with pytest.raises(StorageError, match=r"No space left.*same command"):
        store.write_folder(tmp_path / "folder", lambda folder: full(folder / "a"))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_can_not_be_written_or_read_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="can't be written"):
        store.write_bytes(tmp_path / "file" / "below", b"")
    with pytest.raises(StorageError, match="can't be written"):
        store.write_folder(tmp_path / "file" / "below", lambda folder: None)
    with pytest.raises(StorageError, match="can't be read"):
        store.read_bytes(tmp_path / "none")


@pytest.mark.parametrize("before", [None, b"old"])
@pytest.mark.parametrize("last", [1, 2])
def test_a_kill_at_any_rename_leaves_a_whole_file_or_none(
    before: bytes | None, last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "seconds.json"
    if before is not None:
        store.write_bytes(path, before)
    replace, calls = Path.replace, 0

    def killed(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == last:
            raise Killed
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(Killed):
            store.write_bytes(path, b"new")
    assert path.exists() == (before is not None)
    if before is not None:
        assert store.read_bytes(path) in (b"old", b"new")
    store.write_bytes(path, b"newer")
    assert store.read_bytes(path) == b"newer"
    assert len(list(tmp_path.iterdir())) == 2


def test_weights_are_known_by_their_bytes_not_by_their_place(tmp_path: Path) -> None:
    for name, data in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(data)
    one, same, other = (store.weights_digest(tmp_path / name) for name in "abc")
    assert one == same != other
    with pytest.raises(StorageError, match=r"no \.safetensors"):
        store.weights_digest(tmp_path)
