"""Rows of other people's preference data sets: what becomes a pair, what is dropped, and why."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import END

from selfplay.chat import Chat
from selfplay.errors import DataError
from selfplay.preferences import (
    Preferences,
    holds_preferences,
    our_records,
    read_demonstrations,
    read_labelled,
    read_preferences,
)
from selfplay.recipe_prompts import PromptsRecipe
from selfplay.types import Demonstration, Message, PreferencePair, Prompt, prompt_id

HI = {"role": "user", "content": "Say hi."}
GOOD = {"role": "assistant", "content": "Hi there!"}
BAD = {"role": "assistant", "content": "No."}


def read(folder: Path, chat: Chat, *rows: dict[str, Any], **options: Any) -> Preferences:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_preferences(str(path), chat, **options)
    assert len(found.pairs) + len(found.drops) == len(rows)
    return found


def only(folder: Path, chat: Chat, row: dict[str, Any], **options: Any) -> PreferencePair:
    (pair,) = read(folder, chat, row, **options).pairs
    return pair


SAME = [
    pytest.param({"prompt": "Say hi.", "chosen": "Hi there!", "rejected": "No."}, id="explicit text"),
    pytest.param({"prompt": [HI], "chosen": [GOOD], "rejected": [BAD]}, id="explicit messages"),
    pytest.param({"prompt": [HI], "chosen": GOOD, "rejected": BAD}, id="one message, not a list"),
    pytest.param({"chosen": [HI, GOOD], "rejected": [HI, BAD]}, id="implicit messages"),
    pytest.param(
        {"prompt": "Say hi.", "chosen": [HI, GOOD], "rejected": [HI, BAD]}, id="conversations beside a prompt"
    ),
    pytest.param(
        {
            "conversations": [{"from": "human", "value": "Say hi."}],
            "chosen": {"from": "gpt", "value": "Hi there!"},
            "rejected": {"from": "gpt", "value": "No."},
        },
        id="sharegpt",
    ),
    pytest.param({"instruction": "Say hi.", "input": "", "chosen": "Hi there!", "rejected": "No."}, id="alpaca"),
    pytest.param(
        {"chosen": "\n\nHuman: Say hi.\n\nAssistant: Hi there!", "rejected": "\n\nHuman: Say hi.\n\nAssistant: No."},
        id="implicit text in turns",
    ),
    pytest.param({"chosen": "Say hi. Hi there!", "rejected": "Say hi. No."}, id="implicit text"),
]


@pytest.mark.parametrize("row", SAME)
def test_every_form_gives_the_same_pair(row: dict[str, Any], chat: Chat, tmp_path: Path) -> None:
    pair = only(tmp_path, chat, row)
    assert pair.prompt == (Message("user", "Say hi."),)
    assert pair.chosen == (Message("assistant", "Hi there!"),)
    assert pair.rejected == (Message("assistant", "No."),)
    assert pair.prompt_id == prompt_id(pair.prompt)


def test_tokens_are_the_chat_s_and_end_at_the_stop_token(chat: Chat, tmp_path: Path) -> None:
    pair = only(tmp_path, chat, {"prompt": "Say hi.", "chosen": "Hi there!", "rejected": "No."})
    prompt = Prompt(pair.prompt_id, pair.prompt)
    assert pair.prompt_token_ids == chat.encode_prompt(prompt)
    assert pair.chosen_token_ids == chat.encode_completion(prompt, "Hi there!")
    end = chat.tokenizer.convert_tokens_to_ids(END)
    assert [ids.count(end) for ids in (pair.chosen_token_ids, pair.rejected_token_ids)] == [1, 1]
    assert pair.chosen_token_ids[-1] == pair.rejected_token_ids[-1] == end


def test_earlier_turns_belong_to_the_prompt(chat: Chat, tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, HI, BAD, {"role": "user", "content": "Again, kindly."}]
    pair = only(tmp_path, chat, {"chosen": [*turns, GOOD], "rejected": [*turns, BAD]})
    assert [message.role for message in pair.prompt] == ["system", "user", "assistant", "user"]


def test_the_input_of_an_instruction_is_part_of_the_prompt(chat: Chat, tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "chosen": "3", "rejected": "4"}
    assert only(tmp_path, chat, row).prompt == (Message("user", "Add.\n\n1 and 2"),)


def test_a_word_that_both_completions_begin_is_not_cut(chat: Chat, tmp_path: Path) -> None:
    pair = only(tmp_path, chat, {"chosen": "Name a bird. Sparrow", "rejected": "Name a bird. Spoon"})
    assert (pair.chosen[0].content, pair.rejected[0].content) == ("Sparrow", "Spoon")


def test_a_system_prompt_is_added_where_there_is_none(chat: Chat, tmp_path: Path) -> None:
    row = {"prompt": [HI], "chosen": [GOOD], "rejected": [BAD]}
    assert only(tmp_path, chat, row, system_prompt="Be kind.").prompt[0] == Message("system", "Be kind.")
    own = {"prompt": [{"role": "system", "content": "Mine."}, HI], "chosen": [GOOD], "rejected": [BAD]}
    assert only(tmp_path, chat, own, system_prompt="Be kind.").prompt[0] == Message("system", "Mine.")


USUAL = {"prompt": "Say hi.", "chosen": "Hi there!", "rejected": "No."}
OTHER_TURN = {"role": "user", "content": "Say ho."}
DROPPED = [
    ({"prompt": "Say hi.", "chosen": "Hi.", "rejected": "Hi."}, "chosen equals rejected"),
    ({"prompt": "Say hi.", "chosen": " \n", "rejected": "Hi."}, "empty chosen"),
    ({"prompt": "Say hi.", "chosen": "Hi.", "rejected": ""}, "empty rejected"),
    ({"prompt": " ", "chosen": "Hi.", "rejected": "No."}, "empty prompt"),
    ({"prompt": "x" * 300, "chosen": "Hi.", "rejected": "No."}, "prompt longer than max_prompt_length"),
    ({"prompt": "Say hi.", "chosen": "\ud800", "rejected": "No."}, "lone surrogate in the text"),
    ({"prompt": "Say hi.", "chosen": [HI, GOOD], "rejected": [HI]}, "empty rejected"),
    ({"prompt": "Say hi.", "chosen": [HI, GOOD], "rejected": [HI, GOOD]}, "chosen equals rejected"),
    (
        {"prompt": "Say hi.", "chosen": [HI, GOOD, OTHER_TURN, GOOD], "rejected": [HI, BAD]},
        "chosen and rejected differ in more than the last turn",
    ),
    ({"prompt": "Say hi.", "chosen": [HI, GOOD], "rejected": [OTHER_TURN, BAD]}, "chosen and rejected share no prompt"),
    (
        {"prompt": "Say ho.", "chosen": [HI, GOOD], "rejected": [HI, BAD]},
        "the prompt in 'prompt' differs from that of the conversations",
    ),
]


@pytest.mark.parametrize(("row", "reason"), DROPPED, ids=[reason for _, reason in DROPPED])
def test_a_row_without_a_pair_is_dropped_with_its_place_and_reason(
    row: dict[str, Any], reason: str, chat: Chat, tmp_path: Path
) -> None:
    found = read(tmp_path, chat, USUAL, row, max_prompt_length=200)
    assert len(found.pairs) == 1
    assert [drop.reason for drop in found.drops] == [reason]
    assert found.drops[0].id.endswith("rows.jsonl:2")


def test_implicit_texts_that_share_nothing_are_dropped(chat: Chat, tmp_path: Path) -> None:
    rows = ({"chosen": "Say hi. Hi!", "rejected": "Say hi. No."}, {"chosen": "One", "rejected": "Two"})
    assert [drop.reason for drop in read(tmp_path, chat, *rows).drops] == ["chosen and rejected share no prompt"]


def test_rows_of_no_known_form_are_an_error_that_lists_the_columns(chat: Chat, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'rejected'; there are prompt, chosen, score"):
        read(tmp_path, chat, {"prompt": "a", "chosen": "b", "score": 1})


def test_a_row_that_does_not_fit_the_first_is_an_error_with_its_line(chat: Chat, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:2: this row does not fit"):
        read(tmp_path, chat, USUAL, {"prompt": "a", "chosen": 3, "rejected": "b"})


def test_no_pair_at_all_is_an_error_that_names_a_reason(chat: Chat, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of 1 rows gives a pair.*:1: empty chosen"):
        read(tmp_path, chat, {"prompt": "a", "chosen": "", "rejected": "b"})


def test_our_own_records_are_told_from_others_by_their_token_ids(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "pairs.jsonl", tmp_path / "theirs.jsonl"
    ours.write_text(json.dumps({"prompt_token_ids": [1], "chosen_token_ids": [2], "rejected_token_ids": [3]}) + "\n")
    theirs.write_text(json.dumps(USUAL) + "\n")
    single = tmp_path / "demonstrations.jsonl"
    single.write_text(json.dumps({"prompt_token_ids": [1], "completion_token_ids": [2]}) + "\n")
    assert our_records(str(ours)) is PreferencePair
    assert our_records(str(single)) is Demonstration
    assert our_records(str(theirs)) is None
    assert our_records("some/dataset") is None


# --- demonstrations ---------------------------------------------------------------------------------------------


def prompts_of(**changes: Any) -> PromptsRecipe:
    return PromptsRecipe.model_validate({"source": "-", "deal": "same", **changes})


def write(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


SINGLE = [
    pytest.param({"messages": [HI, GOOD]}, id="messages"),
    pytest.param({"prompt": "Say hi.", "completion": "Hi there!"}, id="prompt and completion"),
    pytest.param({"prompt": [HI], "completion": [GOOD]}, id="prompt and completion as messages"),
    pytest.param(
        {"conversations": [{"from": "human", "value": "Say hi."}, {"from": "gpt", "value": "Hi there!"}]}, id="sharegpt"
    ),
    pytest.param({"instruction": "Say hi.", "input": "", "output": "Hi there!"}, id="alpaca"),
]


@pytest.mark.parametrize("row", SINGLE)
def test_every_form_with_one_completion_gives_the_same_demonstration(
    row: dict[str, Any], chat: Chat, tmp_path: Path
) -> None:
    source = write(tmp_path, row)
    assert not holds_preferences(source)
    found = read_demonstrations(source, chat, prompts_of())
    pair = only(tmp_path, chat, {"prompt": "Say hi.", "chosen": "Hi there!", "rejected": "No."})
    assert found.rows == (
        Demonstration(pair.prompt_id, pair.prompt, pair.chosen, pair.prompt_token_ids, pair.chosen_token_ids),
    )


def test_rows_without_a_completion_or_with_a_long_prompt_are_dropped_and_equal_rows_are_kept(
    chat: Chat, tmp_path: Path
) -> None:
    rows = (
        {"messages": [HI, GOOD]},
        {"messages": [HI]},
        {"messages": [HI, {"role": "assistant", "content": " "}]},
        {"messages": [{"role": "user", "content": "x" * 300}, GOOD]},
        {"messages": [HI, GOOD]},
    )
    found = read_demonstrations(write(tmp_path, *rows), chat, prompts_of(max_prompt_length=200))
    assert len(found.rows) == 2
    assert [drop.reason for drop in found.drops] == [
        "no completion to imitate",
        "no completion to imitate",
        "prompt longer than max_prompt_length",
    ]
    assert [drop.id[-1] for drop in found.drops] == ["2", "3", "4"]
    with pytest.raises(DataError, match="none of 1 rows gives a demonstration"):
        read_demonstrations(write(tmp_path, {"messages": [HI]}), chat, prompts_of())


def test_the_recipe_says_which_turn_is_trained_on_and_its_columns_may_be_missing(chat: Chat, tmp_path: Path) -> None:
    second = {"role": "user", "content": "Again."}
    source = write(tmp_path, {"messages": [HI, GOOD, second, BAD]})
    first = read_demonstrations(source, chat, prompts_of(turns="first", prompt_column="question")).rows[0]
    last = read_demonstrations(source, chat, prompts_of(turns="last", system_prompt="Be kind.")).rows[0]
    assert (first.prompt, first.completion[0].content) == ((Message("user", "Say hi."),), "Hi there!")
    assert [message.role for message in last.prompt] == ["system", "user", "assistant", "user"]
    assert last.completion[0].content == "No."


def test_a_demonstration_that_the_template_can_t_carry_is_an_error_with_its_line(tiny: Path, tmp_path: Path) -> None:
    thinking = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>think{% endif %}"
    )
    chat = Chat.load(str(tiny), chat_template=thinking)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*no token prefix"):
        read_demonstrations(write(tmp_path, {"messages": [HI, GOOD]}), chat, prompts_of())


def test_gold_answers_and_checks_of_labelled_rows_are_read_as_those_of_prompts(tmp_path: Path) -> None:
    row = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "value": 4, "checks": '[{"kind": "numeric"}]'}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (found,), _ = read_labelled(str(path), gold_column="value")
    assert found.prompt.gold == "4"
    assert found.prompt.checks == ({"kind": "numeric"},)
    path.write_text(json.dumps(row | {"checks": "numeric"}) + "\n")
    with pytest.raises(DataError, match="checks: not JSON"):
        read_labelled(str(path))
    path.write_text(json.dumps(row | {"value": {"is": 4}}) + "\n")
    with pytest.raises(DataError, match="does not fit"):
        read_labelled(str(path), gold_column="value")
