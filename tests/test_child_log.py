"""What the log of an engine's child says of its end."""

import pytest

from selfplay.generators.child_log import MAX_ERRORS, TAIL_LINES, errors_in, quote

# as vLLM 0.32 writes it with its core in a process of its own, shortened
LOG = """\
(MainProcess pid=16) INFO 11-23 19:27:13 [model.py:2152] Using max model len 512
(Worker_TP0 pid=48) ERROR 11-23 19:28:18 [multiproc_executor.py:870] Traceback (most recent call last):
(Worker_TP1 pid=49) ERROR 11-23 19:28:18 [multiproc_executor.py:870] Traceback (most recent call last):
(Worker_TP0 pid=48) ERROR 11-23 19:28:18 [multiproc_executor.py:870]   File "gpu_worker.py", line 9, in init_device
(Worker_TP1 pid=49) ERROR 11-23 19:28:18 [multiproc_executor.py:870]     raise ValueError(
(Worker_TP0 pid=48) ERROR 11-23 19:28:18 [multiproc_executor.py:870] torch.OutOfMemoryError: CUDA out of memory.
(Worker_TP1 pid=49) ERROR 11-23 19:28:18 [multiproc_executor.py:870] ValueError: Free memory on device (3/79 GiB)
(EngineCore pid=33) ERROR 11-23 19:28:18 [core.py:1510] EngineCore failed to start.
Process EngineCore:
Traceback (most recent call last):
  File "core.py", line 1514, in run_engine_core
    raise e
ValueError: Free memory on device (3/79 GiB)
""".splitlines()
OWN = ["Traceback (most recent call last):", *['  File "llm.py", line 1'] * 2 * TAIL_LINES, "RuntimeError: See above"]


def test_errors_of_several_processes_are_told_apart_and_named_once() -> None:
    assert errors_in(LOG) == [
        "torch.OutOfMemoryError: CUDA out of memory.",
        "ValueError: Free memory on device (3/79 GiB)",
    ]


def test_an_error_above_the_end_of_a_log_is_quoted_first() -> None:
    said = quote([*LOG, *OWN], " (engine.log)").splitlines()
    assert said[:3] == [
        "errors in its log, the first one first:",
        "  | torch.OutOfMemoryError: CUDA out of memory.",
        "  | ValueError: Free memory on device (3/79 GiB)",
    ]
    assert said[3] == "the end of its log (engine.log):"
    assert said[4:] == [f"  | {line}" for line in OWN[-TAIL_LINES:]]


@pytest.mark.parametrize("lines", [[], LOG[:1], OWN], ids=["nothing", "no error", "its own alone"])
def test_what_the_end_of_a_log_shows_is_not_told_twice(lines: list[str]) -> None:
    assert quote(lines, "").startswith("the end of its log:")


def test_a_log_of_many_errors_is_cut() -> None:
    many = [line for n in range(2 * MAX_ERRORS) for line in ("Traceback (most recent call last):", f"OSError: {n}")]
    said = quote([*many, *OWN], "").splitlines()
    assert said[1 : MAX_ERRORS + 1] == [f"  | OSError: {n}" for n in range(MAX_ERRORS)]
    assert said[MAX_ERRORS + 1] == "the end of its log:"
