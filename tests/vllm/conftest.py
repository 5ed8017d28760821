"""Engines for the tests marked vllm: the tiny model, or the model that SELFPLAY_TEST_MODEL names."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import make_tiny_model

from selfplay.chat import Chat
from selfplay.generators.engine import EngineSettings
from selfplay.generators.generator import EngineGenerator


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("SELFPLAY_TEST_MODEL")
    return Path(named) if named else make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def chat(model: Path) -> Chat:
    return Chat.load(str(model))


@pytest.fixture(scope="session")
def settings(model: Path, chat: Chat) -> EngineSettings:
    return EngineSettings("vllm", str(model), dtype="float32", max_model_len=256, stop_token_ids=chat.stop_token_ids)


@pytest.fixture(scope="session")
def engine(settings: EngineSettings, chat: Chat) -> Iterator[EngineGenerator]:
    """vLLM in float32, so that it can be compared tightly."""
    with EngineGenerator(settings, chat) as generator:
        yield generator
