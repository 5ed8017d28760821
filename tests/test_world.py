"""Which processes train together, and what is said where the machine has too few devices for them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from selfplay.errors import RecipeError
from selfplay.train.rank import write_whole
from selfplay.train.world import join_world


def test_processes_that_were_to_have_a_gpu_each_do_not_train_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(RecipeError, match="asks for 2 GPUs of this machine, which has 1: lower num_processes"):
        join_world(use_cpu=False, sharding=None)


def test_a_result_that_a_process_was_ended_in_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "result.json.0", {"loss": 1.0})
    real = Path.write_text

    def half(path: Path, text: str) -> int:
        real(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "result.json.1", {"loss": 2.0})
    assert [json.loads(file.read_text()) for file in tmp_path.glob("result.json.*")] == [{"loss": 1.0}]


def test_an_error_that_nobody_caught_ends_a_process_with_its_traceback_and_code_1() -> None:
    program = (
        "import atexit, sys\nfrom selfplay.train.rank import end_at_once\nsys.excepthook = end_at_once\n"
        "atexit.register(print, 'an orderly end')\nraise ValueError('of the test')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 1
    assert "ValueError: of the test" in done.stderr
    assert not done.stdout
