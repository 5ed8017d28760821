"""Ending an engine's process group, and an engine whose helper ended. All processes are real; none is a model's."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfplay.generators import process_group
from selfplay.generators.process_group import await_end, end_group

# a leader that says the id of a process below it, in its group
PARENT = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
# an engine that waits for ever, and whose helper is killed
ENGINE = """
import multiprocessing, os, signal, threading
from selfplay.generators.process_group import watch_helpers

if __name__ == "__main__":
    helper = multiprocessing.get_context("fork").Process(target=threading.Event().wait, name="core")
    helper.start()
    watch_helpers(multiprocessing.active_children(), grace=0.1)
    os.kill(helper.pid, signal.SIGKILL)
    threading.Event().wait()
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def family() -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """The leader of a group, and the process below it."""
    leader = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert leader.stdout is not None
    with leader.stdout:
        yield leader, int(leader.stdout.readline())
    os.killpg(leader.pid, signal.SIGKILL)
    leader.wait()


@linux
def test_a_group_has_ended_only_when_all_its_processes_have(family: tuple["subprocess.Popen[str]", int]) -> None:
    leader, below = family
    os.kill(leader.pid, signal.SIGKILL)
    assert not await_end(leader.pid, seconds=0.2)
    os.kill(below, signal.SIGKILL)
    assert await_end(leader.pid)
    os.kill(leader.pid, 0)  # not reaped, and yet it has ended


@linux
def test_a_killed_group_is_waited_for(
    family: tuple["subprocess.Popen[str]", int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that takes long to end, as one does whose GPU's memory the driver gives back, here because it is told late."""
    leader, below = family
    late = threading.Timer(0.3, os.kill, (below, signal.SIGKILL))

    def kill(group: int, number: int) -> None:
        os.kill(leader.pid, number)
        late.start()

    monkeypatch.setattr(process_group.os, "killpg", kill)
    end_group(leader.pid)
    monkeypatch.undo()
    assert late.finished.is_set()
    assert await_end(leader.pid, seconds=0)


@linux
def test_a_killed_group_leaves_no_shared_memory() -> None:
    program = (
        "from multiprocessing.shared_memory import SharedMemory; import time\n"
        "block = SharedMemory(create=True, size=4096); print(block.name, flush=True); time.sleep(600)"
    )
    leader = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert leader.stdout is not None
    with leader.stdout:
        block = Path("/dev/shm") / leader.stdout.readline().strip()
    assert block.exists()
    end_group(leader.pid)
    leader.wait()
    assert not block.exists()


def test_ending_a_group_that_is_gone_is_fine() -> None:
    leader = subprocess.Popen(["true"], start_new_session=True)
    leader.wait()
    end_group(leader.pid)
    assert await_end(leader.pid, 0.0)


def test_an_engine_whose_helper_was_killed_ends_and_says_so() -> None:
    engine = subprocess.run([sys.executable, "-c", ENGINE], capture_output=True, text=True, start_new_session=True)
    assert engine.returncode == -signal.SIGKILL
    assert engine.stdout == "core (exit code -9) ended, and the engine with it\n"
