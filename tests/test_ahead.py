"""An engine's process that is started before its settings are known."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted_run import write_recipe

from selfplay.chat import Chat
from selfplay.generators import isolated
from selfplay.generators.engine import EngineSettings
from selfplay.generators.generator import EngineGenerator
from selfplay.generators.isolated import started_ahead
from selfplay.models import engine_ahead
from selfplay.recipe_file import load_recipe
from selfplay.types import Message, Prompt, Sampling, prompt_id

MESSAGES = (Message("user", "hello"),)
PROMPT = Prompt(prompt_id(MESSAGES), MESSAGES)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The ids of the processes that are started."""
    ids: list[int] = []

    class Counted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[call-overload]
            ids.append(self.pid)

    monkeypatch.setattr(isolated.subprocess, "Popen", Counted)
    yield ids
    assert not isolated._ahead


def settings_of(model: Path) -> EngineSettings:
    return EngineSettings("transformers", str(model), dtype="float32")


def test_the_first_engine_takes_the_process_that_is_there_and_draws_the_same(
    tiny: Path, started: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat.load(str(tiny))
    sampling = Sampling(max_tokens=8, seed=1)
    with started_ahead(EngineSettings("transformers", "")):
        monkeypatch.setenv("SET_BY_A_PACKAGE", "1")
        with EngineGenerator(settings_of(tiny), chat) as generator:
            found = generator.generate([PROMPT], sampling)
    assert len(started) == 1
    with EngineGenerator(settings_of(tiny), chat, isolate=False) as generator:
        assert generator.generate([PROMPT], sampling) == found


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "VLLM_CPU_KVCACHE_SPACE"])
def test_an_engine_of_another_environment_does_not_take_it(
    variable: str, started: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with started_ahead(EngineSettings("transformers", "")):
        (child,) = isolated._ahead
        assert isolated._serves(child.environment, {**child.environment, "SET_BY_A_PACKAGE": "1"})
        assert not isolated._serves(child.environment, {**child.environment, variable: "9"})


def test_a_process_that_nobody_took_is_gone_after_the_block(started: list[int]) -> None:
    with pytest.raises(KeyboardInterrupt), started_ahead(EngineSettings("transformers", "")):
        raise KeyboardInterrupt
    (id,) = started
    with pytest.raises(ProcessLookupError):
        os.kill(id, 0)


def test_other_engines_and_runs_that_are_continued_start_nothing(
    tiny: Path, tmp_path: Path, started: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = load_recipe(write_recipe(tmp_path, tiny)).generator
    vllm = generator.model_copy(update={"kind": "vllm"})
    for recipe, wanted in ((generator, True), (vllm, False), (vllm.model_copy(update={"data_parallel_size": 2}), True)):
        with engine_ahead(recipe, wanted=wanted):
            assert not started
