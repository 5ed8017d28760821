"""vLLM's default layout, which a GPU gets: its core and its worker in processes of their own below our child. And a context
that is longer than the cache.
"""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from processes import processes_of
from tiny import make_tiny_model

from selfplay.errors import GeneratorError
from selfplay.generators.engine import EngineSettings, Request
from selfplay.generators.isolated import EngineDiedError, IsolatedEngine
from selfplay.types import Sampling

pytestmark = pytest.mark.vllm


def test_what_stopped_the_core_is_told_first(settings: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The core writes it to the log, and vLLM raises that it is "above", where forty lines of stack hide it."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    nothing = replace(settings, engine_args={"kv_cache_memory_bytes": 1000})
    with pytest.raises(
        GeneratorError, match=r"root cause above.*\nerrors in its log.*\n  \| ValueError: No available memory"
    ):
        IsolatedEngine(nothing)


def test_a_core_that_is_killed_ends_the_engine(settings: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM would wait for it for ever."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    engine = IsolatedEngine(settings)
    try:
        (child,) = engine.process_ids
        below = processes_of(child) - {child}
        assert below
        requests = [Request(str(n), (0, 70 + n), n, Sampling(max_tokens=200)) for n in range(64)]
        results = engine.run([Request("first", (0, 70), 1, Sampling(max_tokens=2)), *requests])
        next(results)
        for process in below:
            os.kill(process, signal.SIGKILL)
        with pytest.raises(EngineDiedError, match="ended"):
            list(results)
    finally:
        engine.close()
    assert processes_of(child) <= {child}


def test_a_context_that_the_cache_can_not_hold_is_cut_to_what_it_holds(
    settings: EngineSettings, tmp_path: Path
) -> None:
    """As that of 131,072 tokens of an 8B model on 24 GB; an engine that is told nothing must start."""
    model = make_tiny_model(tmp_path / "long", max_position_embeddings=65536)
    long = replace(settings, model=str(model), max_model_len=None, engine_args={"kv_cache_memory_bytes": 2**20})
    engine = IsolatedEngine(long)
    try:
        assert 256 <= engine.max_model_len < 65536
        (result,) = engine.run([Request("a", (0, 70), 1, Sampling(max_tokens=4))])
        assert result.token_ids
    finally:
        engine.close()
