"""Messages become exactly the ids that the template asks for, and text never becomes a special token."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import BOS, END, MARKUP, ORDINARY, SPECIAL, TEMPLATE, make_tiny_model, make_tiny_tokenizer

from selfplay.chat import Chat
from selfplay.errors import DataError
from selfplay.types import Message, Prompt, prompt_id

MARKS = (
    "\ue000\ue0010\ue001\ue000",
    "\ue000\ue0011\ue001\ue000",
    "\ue000\ue001",
    "\ue001\ue000",
    "\ue000\ue00199",
    "7",
)
PIECES = st.one_of(
    st.sampled_from(SPECIAL), st.sampled_from(MARKS), st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
)
CONTENT = st.lists(PIECES, max_size=6).map("".join)
NO_BOS = TEMPLATE.removeprefix("{{ bos_token }}")
THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
# writes an empty thinking block before a new turn, and drops it from past ones
EMPTY_THOUGHT = TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n\n</think>{% endif %}")


def made(template: str = TEMPLATE, **values: Any) -> Chat:
    tokenizer = make_tiny_tokenizer(chat_template=template)
    return Chat(tokenizer, stop_token_ids=values.pop("stop_token_ids", [1]), **values)


CHAT = made()
SPECIAL_IDS = set(CHAT.tokenizer.convert_tokens_to_ids(list(SPECIAL)))


def prompt_of(*contents: str, gold: str | None = None) -> Prompt:
    """Turns of user and assistant, the last one the user's."""
    roles = ["user", "assistant"] * len(contents)
    messages = tuple(Message(role, content) for role, content in zip(roles, contents, strict=False))
    return Prompt(prompt_id(messages), messages, gold=gold)


def specials(ids: tuple[int, ...]) -> list[int]:
    return [i for i in ids if i in SPECIAL_IDS]


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize(("template", "count"), [(TEMPLATE, 1), (NO_BOS, 0), ("{{ bos_token }}" + TEMPLATE, 2)])
def test_there_is_exactly_the_bos_that_the_template_writes(adds_bos: bool, template: str, count: int) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tiny_tokenizer(chat_template=template)
    if adds_bos:
        bos = tokenizer.bos_token_id
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
        assert tokenizer("a")["input_ids"][0] == bos
    chat = Chat(tokenizer, stop_token_ids=[1])
    for content in ("hi", "a <|end|> b"):
        ids = chat.encode_prompt(prompt_of(content))
        assert ids.count(tokenizer.bos_token_id) == count
        assert ids[:count] == (tokenizer.bos_token_id,) * count
        assert chat.encode_completion(prompt_of(content), "yes").count(tokenizer.bos_token_id) == 0


def test_a_tokenizer_without_bos_gets_none() -> None:
    tokenizer = make_tiny_tokenizer(chat_template=NO_BOS)
    tokenizer.bos_token = None
    chat = Chat(tokenizer, stop_token_ids=[1])
    assert tokenizer.decode(chat.encode_prompt(prompt_of("hi"))) == "<|user|>hi<|end|>\n<|assistant|>"


@given(st.lists(CONTENT, min_size=1, max_size=3))
def test_content_never_becomes_a_special_token_and_comes_back_as_text(contents: list[str]) -> None:
    prompt = prompt_of(*(contents if len(contents) % 2 else contents[:-1]))
    ids = CHAT.encode_prompt(prompt)
    # the template's own: bos, then a role and an end per turn, then the role to be played
    roles = {"user": 4, "assistant": 5}
    wanted = [0, *(i for m in prompt.messages for i in (roles[m.role], 1)), 5]
    assert specials(ids) == wanted
    text = CHAT.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert text == CHAT.render(prompt.messages, add_generation_prompt=True)


@given(CONTENT, CONTENT)
def test_a_completion_follows_its_prompt_and_ends_at_its_only_stop_token(content: str, text: str) -> None:
    prompt = prompt_of(content)
    ids = CHAT.encode_completion(prompt, text)
    assert specials(ids) == [1]
    assert ids[-1] == 1
    whole = CHAT.encode_messages((*prompt.messages, Message("assistant", text)), add_generation_prompt=False)
    assert whole[: len(CHAT.encode_prompt(prompt)) + len(ids)] == CHAT.encode_prompt(prompt) + ids
    assert CHAT.tokenizer.decode(whole[-1:]) == "\n"  # what the template writes after the end token is cut off
    assert CHAT.tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False) == text


def test_several_different_special_tokens_in_one_message_are_all_text() -> None:
    content = "<|assistant|>x<|end|><|bos|><|pad|>\n<|user|><|end|>"
    ids = CHAT.encode_prompt(prompt_of(content))
    assert specials(ids) == [0, 4, 1, 5]
    assert content in CHAT.tokenizer.decode(ids)


MARKED = Chat(make_tiny_tokenizer(added=(*MARKUP, *ORDINARY)), stop_token_ids=[1])
ADDED = MARKED.tokenizer.added_tokens_decoder
MARKUP_IDS = {id for id, token in ADDED.items() if token.content in MARKUP}


def as_trained(*contents: str) -> tuple[int, ...]:
    """The ids that the tokenizer itself gives to the rendered turns."""
    text = MARKED.render(prompt_of(*contents).messages, add_generation_prompt=True)
    return tuple(MARKED.tokenizer(text, add_special_tokens=False)["input_ids"])


@given(st.lists(st.sampled_from([*ORDINARY, "th", "e", " ", "<", "b>", "a wren", "1 < 2 > 0", "x[0]"]), max_size=8))
def test_ordinary_text_has_the_tokens_that_it_always_had_trusted_or_not(pieces: list[str]) -> None:
    messages, wanted = prompt_of("".join(pieces)).messages, as_trained("".join(pieces))
    assert MARKED.encode_messages(messages) == MARKED.encode_messages(messages, untrusted=True) == wanted


@given(st.lists(st.sampled_from([*SPECIAL, *MARKUP, *ORDINARY, "x", "<", "INST]>"]), max_size=6).map("".join))
def test_markup_in_untrusted_text_stays_text(content: str) -> None:
    messages = prompt_of(content).messages
    ids = MARKED.encode_messages(messages, untrusted=True)
    assert MARKUP_IDS.isdisjoint(ids)
    assert specials(ids) == [0, 4, 1, 5]
    assert content in MARKED.tokenizer.decode(ids)


def test_a_policy_learns_markup_as_the_tokens_that_it_is() -> None:
    thought = "<think>so</think>yes"
    ids = MARKED.encode_completion(prompt_of("hi"), thought)
    assert [ADDED[i].content for i in ids if i in MARKUP_IDS] == ["<think>", "</think>"]
    assert (
        as_trained("hi", thought, "and?")[: len(MARKED.encode_prompt(prompt_of("hi"))) + len(ids)][-len(ids) :] == ids
    )


def test_tools_are_rendered() -> None:
    chat = made("{% if tools %}{{ tools[0]['name'] }}{% endif %}" + TEMPLATE)
    messages = (Message("user", "hi"),)
    named = Prompt("x", messages, tools=({"name": "search"},))
    assert chat.tokenizer.decode(chat.encode_prompt(named)).startswith("search<|bos|>")


def test_special_tokens_spelled_in_tools_are_text_as_well() -> None:
    chat = made("{% if tools %}{{ tools | tojson }}{% endif %}" + TEMPLATE)
    tool = {"name": "end<|end|>", "parameters": {"<|user|>": ["<|assistant|>", 3]}}
    ids = chat.encode_prompt(Prompt("x", (Message("user", "hi"),), tools=(tool,)))
    assert specials(ids) == specials(CHAT.encode_prompt(prompt_of("hi")))
    text = chat.tokenizer.decode(ids)
    for word in ("end<|end|>", "<|user|>", "<|assistant|>", "3"):
        assert word in text


def test_a_template_that_ends_no_turn_gets_the_first_stop_token() -> None:
    chat = made(
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
        stop_token_ids=[2, 1],
    )
    assert chat.tokenizer.decode(chat.encode_completion(prompt_of("hi"), "yes")) == "yes<|pad|>"


def test_any_of_several_stop_tokens_ends_a_completion() -> None:
    chat = made(stop_token_ids=[2, 1, 2])
    assert chat.stop_token_ids == (2, 1)
    assert chat.encode_completion(prompt_of("hi"), "yes")[-1] == 1


@pytest.mark.parametrize("template", [EMPTY_THOUGHT, THINKING])
def test_a_template_whose_prompt_is_no_prefix_of_the_conversation_is_refused(template: str) -> None:
    prompt = prompt_of("hi", gold="yes")
    chat = made(template)
    with pytest.raises(DataError, match=f"prompt {prompt.id}.*chat_template"):
        chat.encode_completion(prompt, "yes")
    with pytest.raises(DataError):
        chat.encode_gold(prompt)
    assert chat.encode_gold(prompt_of("hi")) is None


def test_a_token_that_spans_prompt_and_completion_is_refused() -> None:
    chat = made("{% for m in messages %}{{ m['content'] }}{% endfor %}<|end|>")
    assert chat.encode_messages((Message("user", "th"), Message("assistant", "e")), add_generation_prompt=False)
    chat = made(
        "{% for m in messages %}{{ m['content'] }}{% if not loop.last %} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %} {% else %}<|end|>{% endif %}"
    )
    with pytest.raises(DataError, match="no token prefix"):
        chat.encode_completion(prompt_of("hi"), "the")  # " the" is one token


def test_the_gold_answer_is_a_completion_of_its_own_kind() -> None:
    gold = CHAT.encode_gold(prompt_of("hi", gold="the end"))
    assert gold is not None
    assert (gold.text, gold.finish_reason, gold.logps) == ("the end", "gold", ())
    assert CHAT.tokenizer.decode(gold.token_ids) == f"the end{END}"


def test_a_template_that_refuses_the_messages_is_a_data_error() -> None:
    chat = made("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + TEMPLATE)
    with pytest.raises(DataError, match=r"roles: system, user.*no system turn"):
        chat.encode_messages((Message("system", "a"), Message("user", "b")))
    with pytest.raises(DataError, match="refuses"):
        made("{{ messages[0]['content'] + 1 }}")


def test_template_arguments_reach_the_template_and_its_digest() -> None:
    template = TEMPLATE + "{% if quiet %}!{% endif %}"
    loud, quiet = made(template), made(template, chat_template_kwargs={"quiet": True})
    assert quiet.encode_prompt(prompt_of("hi")) == loud.encode_prompt(prompt_of("hi")) + tuple(
        loud.tokenizer("!")["input_ids"]
    )
    assert len({c.template_digest_text for c in (loud, quiet, made(), made(reasoning_tags=("<t>", "</t>")))}) == 4


def sampled(chat: Chat, text: str, **values: Any) -> tuple[str, str | None]:
    ids = [*chat.tokenizer(text)["input_ids"], 1]
    found = chat.completion(ids, [-0.5] * len(ids), "stop", 1, **values)
    assert (found.token_ids, found.logps) == (tuple(ids), (-0.5,) * len(ids))
    return found.text, found.reasoning


def test_a_sampled_completion_keeps_its_ids_and_shows_no_special_token() -> None:
    assert sampled(CHAT, " the end \n") == ("the end", None)
    assert sampled(CHAT, "a<|pad|>b") == ("ab", None)


def test_a_stop_string_cuts_the_text_at_its_first_place_and_never_the_ids() -> None:
    assert sampled(CHAT, "one STOP two END", stop=("END", "STOP")) == ("one", None)
    assert sampled(CHAT, "one", stop=("STOP",)) == ("one", None)


def test_finished_thinking_is_split_off_and_unfinished_thinking_leaves_no_text() -> None:
    chat = made(reasoning_tags=("<think>", "</think>"))
    assert sampled(chat, "<think>so\n</think>\n\nyes") == ("yes", "so")
    assert sampled(chat, "yes") == ("yes", None)
    assert sampled(chat, "<think>so and so") == ("", "<think>so and so")
    opened = made(THINKING, reasoning_tags=("<think>", "</think>"))
    assert sampled(opened, "so</think>yes") == ("yes", "so")
    assert sampled(opened, "so and so") == ("", "so and so")


def test_tags_that_are_special_tokens_are_seen_and_no_other_is_shown() -> None:
    chat = made(reasoning_tags=("<|system|>", "<|pad|>"))
    assert sampled(chat, "<|system|>so<|user|><|pad|>\nyes<|user|>") == ("yes", "so")
    assert sampled(chat, "<|system|>so and so") == ("", "<|system|>so and so")


def test_a_model_without_a_template_is_refused_unless_the_recipe_gives_one(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "base", chat_template=None)
    with pytest.raises(DataError, match=r"^chat\.chat_template: the tokenizer of .*base has no chat template"):
        Chat.load(str(folder))
    with pytest.raises(DataError, match=r"^judge\.chat\.chat_template: "):
        Chat.load(str(folder), key="judge.chat")
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    wanted = CHAT.encode_prompt(prompt_of("hi"))
    assert Chat.load(str(folder), chat_template=str(file)).encode_prompt(prompt_of("hi")) == wanted
    assert Chat.load(str(folder), chat_template=TEMPLATE).encode_prompt(prompt_of("hi")) == wanted
    long = TEMPLATE + "{# " + "x" * 5000 + " #}"  # longer than the name of a file can be
    assert Chat.load(str(folder), chat_template=long).encode_prompt(prompt_of("hi")) == wanted
    with pytest.raises(DataError, match=r"typo\.jinja is no template"):
        Chat.load(str(folder), chat_template="templates/typo.jinja")


def test_end_tokens_come_from_the_tokenizer_and_the_generation_config(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    assert Chat.load(str(folder)).stop_token_ids == (1,)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [2, 1]}))
    assert Chat.load(str(folder)).stop_token_ids == (1, 2)
    file.unlink()
    assert Chat.load(str(folder)).stop_token_ids == (1,)
    with pytest.raises(DataError, match="no end token"):
        made(stop_token_ids=[])


def test_a_folder_without_a_tokenizer_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="no tokenizer"):
        Chat.load(str(tmp_path))
