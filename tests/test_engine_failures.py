"""What is raised for an engine's process that an exception ended. The process is real, and only its end is played."""

import sys
from pathlib import Path
from typing import Any

import pytest

from selfplay.errors import GeneratorError
from selfplay.generators import isolated
from selfplay.generators.engine import EngineSettings
from selfplay.generators.isolated import EngineDiedError, IsolatedEngine

PYTHON = sys.executable
# run in the place of Python, with the arguments that it would get: -P -m MODULE FD PARENT KIND
CHILD = """#!{python}
import sys
from multiprocessing.connection import Connection
from selfplay.generators.child import Channel

print({log!r}, flush=True)
Channel(Connection(int(sys.argv[4]))).send(**{message})
"""
CORE_TOOK_ALL = """\
(EngineCore pid=3) ERROR 11-23 19:28:18 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=3) ERROR 11-23 19:28:18 [core.py:1510]   File "gpu_worker.py", line 9, in load_model
(EngineCore pid=3) ERROR 11-23 19:28:18 [core.py:1510] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"""
OWN_DEAD = """\
Traceback (most recent call last):
  File "core_client.py", line 1, in get_output
vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue."""


def ended(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, engine: str, error: str, log: str = ""
) -> pytest.ExceptionInfo[GeneratorError]:
    kind = error.partition(":")[0]
    message: dict[str, Any] = {"error": error, "kind": kind, "fatal": True}
    python = folder / "python"
    python.write_text(CHILD.format(python=PYTHON, log=log, message=message))
    python.chmod(0o755)
    monkeypatch.setattr(isolated.sys, "executable", str(python))
    settings: Any = {"kind": engine, "model": "m"}
    with pytest.raises(GeneratorError) as raised:
        IsolatedEngine(EngineSettings(**settings))
    return raised


@pytest.mark.parametrize(
    ("engine", "error", "log", "advice"),
    [
        ("vllm", "RuntimeError: see above", CORE_TOOK_ALL, "generator.max_batch_size, max_model_len or"),
        ("transformers", "OutOfMemoryError: CUDA out of memory. Tried", "", "generator.max_batch_size;"),
        ("reward_model", "OutOfMemoryError: CUDA out of memory. Tried", "", "judge.max_batch_tokens or max_length"),
    ],
    ids=["vllm's core", "transformers", "a reward model"],
)
def test_where_a_gpu_ran_out_of_memory_it_says_what_to_lower(
    engine: str, error: str, log: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = str(ended(tmp_path, monkeypatch, engine=engine, error=error, log=log).value)
    assert f"the {engine} engine of m: {error}\nA GPU's memory ran out: lower {advice}" in said


def test_a_core_that_was_killed_may_be_started_again_and_one_that_failed_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = "EngineDeadError: EngineCore encountered an issue."
    killed = ended(tmp_path, monkeypatch, engine="vllm", error=dead, log=OWN_DEAD)
    assert killed.type is EngineDiedError
    failed = ended(tmp_path, monkeypatch, engine="vllm", error=dead, log=f"{CORE_TOOK_ALL}\n{OWN_DEAD}")
    assert failed.type is GeneratorError


def test_another_error_gives_no_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raised = ended(tmp_path, monkeypatch, engine="vllm", error="ValueError: no", log=OWN_DEAD)
    assert raised.type is GeneratorError
    assert "memory" not in str(raised.value)
