from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import settings
from tiny import make_tiny_model

from selfplay import faults
from selfplay.chat import Chat
from selfplay.types import Completion, Group, Judgement, Message, PreferencePair, Prompt, prompt_id

settings.register_profile("selfplay", deadline=None)  # a busy machine is no failure
settings.load_profile("selfplay")

QUESTIONS = ("Name a bird.", "What is the sea and the sand?", "Sing!", "And then?")
TEXTS = ("the thing", "I sing in the rain, and then again.", "no", "and the end")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small random Llama with a tokenizer and a template."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def chat(tiny: Path) -> Chat:
    return Chat.load(str(tiny))


@pytest.fixture(scope="session")
def pairs(chat: Chat) -> Sequence[PreferencePair]:
    """12 pairs over 4 prompts, as text of the chat: each prompt's best completion against its three others."""
    from selfplay.pairs import make_pair

    made = []
    for question in QUESTIONS:
        messages = (Message("user", question),)
        prompt = Prompt(prompt_id(messages), messages)
        completions = tuple(Completion(text, chat.encode_completion(prompt, text)) for text in TEXTS)
        group = Group(prompt, chat.encode_prompt(prompt), completions)
        judgement = Judgement(prompt.id, (0.0, 3.0, 1.0, 2.0))
        made += [make_pair(group, chosen=1, rejected=worse, judgement=judgement) for worse in (0, 2, 3)]
    return made


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Sets the fault of what follows, counted from here on; None for no fault."""

    def set_fault(text: str | None) -> None:
        faults.forget()
        if text is None:
            monkeypatch.delenv(faults.VARIABLE, raising=False)
        else:
            monkeypatch.setenv(faults.VARIABLE, text)

    return set_fault
