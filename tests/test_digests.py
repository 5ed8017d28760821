"""Digests that are remembered while a file stays as it is."""

import os
from pathlib import Path

import pytest

from selfplay import digests, store


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of weights that counts as settled at once."""
    monkeypatch.setattr(digests, "SETTLED_NS", -1)
    monkeypatch.setattr(digests, "_known", {})
    (tmp_path / "model.safetensors").write_bytes(b"some weights")
    return tmp_path


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    read: list[Path] = []
    real = store.file_digest
    monkeypatch.setattr(store, "file_digest", lambda path: read.append(path) or real(path))
    return read


def test_weights_that_nobody_wrote_to_are_read_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = count_reads(monkeypatch)
    assert len({store.weights_digest(model) for _ in range(4)}) == 1
    assert read == [model / "model.safetensors"]


def test_weights_of_the_same_size_and_time_of_writing_are_read_again(model: Path) -> None:
    file = model / "model.safetensors"
    before, times = store.weights_digest(model), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    (model / "other").write_bytes(b"SOME WEIGHTS")
    (model / "other").replace(file)
    os.utime(file, ns=times)
    assert store.weights_digest(model) != before


def test_weights_written_just_now_are_not_remembered(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "SETTLED_NS", 3600 * 10**9)
    read = count_reads(monkeypatch)
    store.weights_digest(model)
    store.weights_digest(model)
    assert len(read) == 2


def test_a_folder_is_checked_byte_by_byte_whatever_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_NS", -1)
    folder = tmp_path / "policy"
    store.write_folder(folder, lambda path: (path / "model.safetensors").write_bytes(b"some weights"))
    store.weights_digest(folder)
    read = count_reads(monkeypatch)
    store.check_folder(folder)
    assert read == [folder / "model.safetensors"]
