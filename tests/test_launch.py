"""Training in a process of its own: results and errors come back, requests to stop go there, and nothing stays behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from jobs import job_of

from selfplay.errors import Stopped
from selfplay.progress import SILENT
from selfplay.train.launch import run_in_child, wait_for
from selfplay.train.loop import run_training
from selfplay.types import PreferencePair

RIG: dict[str, Any] = {"max_steps": 3}


@pytest.mark.slow
def test_a_child_that_is_asked_to_stop_leaves_a_checkpoint_and_the_next_one_goes_on(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path, fault: Callable[[str | None], None]
) -> None:
    job = job_of(tmp_path / "child", tiny, pairs, **RIG)
    fault("train.updated@2=term")
    with pytest.raises(Stopped, match="after training step 2 of 3"):
        run_in_child(job, SILENT)
    fault(None)
    assert [f.name for f in (tmp_path / "child/out/train/checkpoints").iterdir()] == ["step-000002"]
    result = run_in_child(job, SILENT)
    assert result == run_training(job_of(tmp_path / "here", tiny, pairs, **RIG))
    for name in ("policy/model.safetensors", "train/steps.jsonl", "train/result.json"):
        assert (tmp_path / "child/out" / name).read_bytes() == (tmp_path / "here/out" / name).read_bytes()


# Each asks us, its parent, to stop as Ctrl-C would, once it can be stopped itself.
POLITE = "import os, signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
STUBBORN = "import os, signal\nsignal.signal(signal.SIGTERM, lambda *_: os.kill(os.getppid(), signal.SIGINT))\n"
ASK = "os.kill(os.getppid(), signal.SIGINT)\nwhile True: signal.pause()\n"


def start(script: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", script], start_new_session=True)


def test_the_first_ctrl_c_is_passed_on_and_the_child_may_end_by_itself() -> None:
    handler = signal.getsignal(signal.SIGINT)
    assert wait_for(start(POLITE + ASK)) == 75
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_ends_the_child_at_once() -> None:
    process = start(STUBBORN + ASK)
    with pytest.raises(KeyboardInterrupt):
        wait_for(process)
    assert process.returncode == -signal.SIGKILL


def test_a_training_process_ends_with_its_parent() -> None:
    read, write = os.pipe()
    code = (
        "import os, signal, threading\nfrom selfplay.generators.child import die_with\n"
        "import sys\nthreading.Thread(target=die_with, args=(int(sys.argv[1]),), daemon=True).start()\n"
        "signal.pause()\n"
    )
    parent = (
        "import os, signal, subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', {code!r}, str(os.getpid())], start_new_session=True, pass_fds=[{write}])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", parent], pass_fds=[write], check=False)
    os.close(write)
    with os.fdopen(read) as pipe:
        assert pipe.read() == ""  # ends when the last process that holds the other end is gone
