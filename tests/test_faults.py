"""Faults on purpose: what they do, where they are, and that nothing happens without them."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from selfplay import faults, store
from selfplay.errors import RecipeError, StorageError


@pytest.fixture(autouse=True)
def fresh_counts() -> None:
    faults.forget()


def test_without_the_variable_a_point_does_nothing() -> None:
    assert faults.VARIABLE not in os.environ
    assert not faults.hit("train.step")


def test_a_fault_happens_at_the_nth_pass_of_its_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, "train.step@2=raise")
    faults.hit("train.step")
    faults.hit("train.update")
    with pytest.raises(faults.InjectedError, match=r"train\.step"):
        faults.hit("train.step")
    faults.hit("train.step")


def test_actions_are_what_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    for action, error in (("oom", torch.OutOfMemoryError), ("enospc", OSError)):
        monkeypatch.setenv(faults.VARIABLE, f"a.{action}@1={action}")
        with pytest.raises(error):
            faults.hit(f"a.{action}")
    monkeypatch.setenv(faults.VARIABLE, "a.nan@1=nan")
    assert faults.hit("a.nan")
    assert not faults.hit("a.nan")


@pytest.mark.parametrize(("action", "code"), [("kill9", -9), ("term", -15)])
def test_signals_end_the_process(action: str, code: int) -> None:
    script = "from selfplay import faults; faults.hit('a'); faults.hit('a'); print('on')"
    environment = {**os.environ, faults.VARIABLE: f"a@2={action}"}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == code


def test_points_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, f"list={tmp_path / 'points'}")
    store.write_bytes(tmp_path / "file", b"x")
    assert (tmp_path / "points").read_text().split() == [
        "store.file",
        "store.file.temporary",
        "store.replace",
        "store.file.digest",
        "store.file.done",
    ]


@pytest.mark.parametrize("text", ["train.step", "train.step@x=raise", "train.step@1=explode", "@1=raise"])
def test_a_fault_that_means_nothing_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, text)
    with pytest.raises(RecipeError, match=faults.VARIABLE):
        faults.hit("train.step")


WRITES: dict[str, Callable[[Path], object]] = {
    "store.file": lambda path: store.write_bytes(path, b"x"),
    "store.file.temporary": lambda path: store.write_bytes(path, b"x"),
    "store.folder": lambda path: store.write_folder(path, lambda folder: (folder / "a").write_bytes(b"1")),
    "store.folder.digest": lambda path: store.write_folder(path, lambda folder: (folder / "a").write_bytes(b"1")),
}


@pytest.mark.parametrize("point", WRITES)
def test_a_full_disk_while_writing_leaves_nothing_behind(
    point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(faults.VARIABLE, f"{point}@1=enospc")
    with pytest.raises(StorageError, match=os.strerror(errno.ENOSPC)):
        WRITES[point](tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []
