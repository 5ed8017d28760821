"""Every row of a data set is a prompt or a counted drop."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfplay.errors import DataError
from selfplay.prompt_rows import read_prompts, split_turns
from selfplay.prompts import PromptPool, load_pool
from selfplay.recipe_prompts import PromptsRecipe
from selfplay.store import read_records, write_records
from selfplay.types import Drop, Message, Prompt, prompt_id

TURNS = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]
SHARED = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]
WEIRD = "a\u2028b\u2029c\x00d \u202eright to left\u202c e\r\nf\rg\x85h \ufeffi \U0001f600 \u0301 <|end|>"


def lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asking(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"question {n}"} for n in range(start, start + count)]


def recipe(source: Path, **changes: Any) -> PromptsRecipe:
    return PromptsRecipe.model_validate({"source": str(source), "deal": "same", **changes})


def pool_of(source: Path, *, seed: int = 0, **changes: Any) -> PromptPool:
    return load_pool(recipe(source, **changes), seed=seed)


def only(source: Path, **changes: Any) -> tuple[Prompt, str]:
    """The one prompt of a file of one row, and the form that was found."""
    (row,), form = read_prompts(recipe(source, **changes), str(source))
    assert isinstance(row, Prompt)
    return row, form


def shown(prompt: Prompt) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in prompt.messages]


@pytest.mark.parametrize(
    ("row", "changes", "form", "messages", "gold"),
    [
        ({"prompt": "one"}, {}, "prompt", [("user", "one")], None),
        ({"prompt": "one", "completion": "two"}, {}, "prompt", [("user", "one")], "two"),
        ({"prompt": "one", "gold": 42}, {}, "prompt", [("user", "one")], "42"),
        (
            {"prompt": TURNS[:3], "completion": TURNS[3:]},
            {},
            "messages",
            [("user", "one"), ("assistant", "two"), ("user", "three")],
            "four",
        ),
        ({"prompt": TURNS[:1], "completion": "two"}, {}, "messages", [("user", "one")], "two"),
        ({"prompt": "one", "gold": "two"}, {}, "prompt", [("user", "one")], "two"),
        ({"prompt": TURNS[:1]}, {}, "messages", [("user", "one")], None),
        ({"messages": TURNS}, {}, "messages", [("user", "one")], "two"),
        (
            {"messages": TURNS},
            {"turns": "last"},
            "messages",
            [("user", "one"), ("assistant", "two"), ("user", "three")],
            "four",
        ),
        (
            {"messages": TURNS[:3]},
            {"turns": "last"},
            "messages",
            [("user", "one"), ("assistant", "two"), ("user", "three")],
            None,
        ),
        ({"instruction": "one", "input": "", "output": "two"}, {}, "instruction", [("user", "one")], "two"),
        ({"instruction": "one", "input": "it", "output": "two"}, {}, "instruction", [("user", "one\n\nit")], "two"),
        ({"instruction": "one"}, {}, "instruction", [("user", "one")], None),
        ({"conversations": SHARED}, {}, "conversations", [("user", "one")], "two"),
        (
            {"conversations": [{"from": "system", "value": "s"}, *SHARED]},
            {},
            "conversations",
            [("system", "s"), ("user", "one")],
            "two",
        ),
        ({"question": "one", "answer": "two"}, {"prompt_column": "question"}, "prompt", [("user", "one")], None),
        (
            {"question": "one", "answer": "two"},
            {"prompt_column": "question", "gold_column": "answer"},
            "prompt",
            [("user", "one")],
            "two",
        ),
        ({"talk": TURNS}, {"prompt_column": "talk"}, "messages", [("user", "one")], "two"),
        ({"prompt": "one"}, {"system_prompt": "s"}, "prompt", [("system", "s"), ("user", "one")], None),
        (
            {"messages": [{"role": "system", "content": "own"}, *TURNS]},
            {"system_prompt": "s"},
            "messages",
            [("system", "own"), ("user", "one")],
            "two",
        ),
    ],
)
def test_every_form_of_row_is_read(
    tmp_path: Path, row: Any, changes: dict[str, Any], form: str, messages: list[tuple[str, str]], gold: str | None
) -> None:
    for name in ("rows.jsonl", "rows.json"):
        path = tmp_path / name
        path.write_text(json.dumps(row if name.endswith("l") else [row]))
        prompt, found = only(path, **changes)
        assert found == form
        assert shown(prompt) == messages
        assert prompt.gold == gold
        assert prompt.id == prompt_id(prompt.messages)
        assert prompt.source == f"{path}:1"


def test_checks_and_other_columns_are_kept(tmp_path: Path) -> None:
    checks = [{"kind": "words", "min": 3}]
    row = {"prompt": "one", "checks": checks, "kind": "short", "n": 3, "deep": {"a": 1}}
    prompt, _ = only(lines(tmp_path / "a.jsonl", [row]))
    assert prompt.checks == tuple(checks)
    assert prompt.meta == {"kind": "short", "n": 3}
    text, _ = only(lines(tmp_path / "b.jsonl", [row | {"checks": json.dumps(checks)}]))
    assert text.checks == tuple(checks)
    other, _ = only(lines(tmp_path / "c.jsonl", [{"prompt": "one", "rules": checks}]), checks_column="rules")
    assert other.checks == tuple(checks)


def test_an_id_is_a_hash_of_what_the_model_is_shown_alone(tmp_path: Path) -> None:
    rows = [
        {"prompt": "one"},
        {"prompt": "one", "gold": "x", "checks": [{"kind": "json"}], "n": 2},
        {"prompt": "two"},
        {"prompt": "one", "tools": [{"name": "f"}]},
    ]
    found, _ = read_prompts(recipe(lines(tmp_path / "a.jsonl", rows)), str(tmp_path / "a.jsonl"))
    ids = [row.id for row in found]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3
    assert all(len(id) == 16 for id in ids)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_are_read_like_lines(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas as pd

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")  # else rows stay in the home folder

    rows = [
        {"prompt": 'one, "two"\nthree', "gold": "x", "checks": json.dumps([{"kind": "json"}])},
        {"prompt": "four", "gold": None, "checks": None},
    ]
    path = tmp_path / f"rows.{kind}"
    frame = pd.DataFrame(rows)
    if kind == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    found, form = read_prompts(recipe(path), str(path))
    wanted, _ = read_prompts(recipe(lines(tmp_path / "rows.jsonl", rows)), str(tmp_path / "rows.jsonl"))
    assert form == "prompt"
    assert len(found) == 2
    for own, other in zip(found, wanted, strict=True):
        assert isinstance(own, Prompt)
        assert isinstance(other, Prompt)
        assert (own.id, own.messages, own.gold, own.checks) == (other.id, other.messages, other.gold, other.checks)


def test_weird_text_comes_back_to_the_byte(tmp_path: Path) -> None:
    for number, ensure_ascii in enumerate((True, False)):
        path = tmp_path / f"{number}.jsonl"
        rows = [{"prompt": WEIRD, "gold": WEIRD}, {"prompt": "next"}]
        text = "\r\n".join(json.dumps(row, ensure_ascii=ensure_ascii) for row in rows)
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())  # with a byte order mark and CRLF
        found, _ = read_prompts(recipe(path), str(path))
        assert len(found) == 2
        assert isinstance(found[0], Prompt)
        assert found[0].messages[0].content == WEIRD
        assert found[0].gold == WEIRD
        write_records(tmp_path / "out.jsonl", found, Prompt)
        assert read_records(tmp_path / "out.jsonl", Prompt) == found


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5))
def test_any_text_is_a_prompt_or_an_empty_one(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes("\n".join(json.dumps({"prompt": t}, ensure_ascii=False) for t in texts).encode())
    found, _ = read_prompts(recipe(path), str(path))
    assert len(found) == len(texts)
    for row, text in zip(found, texts, strict=True):
        if isinstance(row, Drop):
            assert not text.strip()
        else:
            assert row.messages == (Message("user", text),)


@pytest.mark.parametrize("column", ["prompt", "gold", "system"])
def test_half_a_character_is_dropped_with_its_reason(tmp_path: Path, column: str) -> None:
    broken = {"prompt": "one \ud83d", "gold": "x"} if column == "prompt" else {"prompt": "one", "gold": "x \ud83d"}
    if column == "system":
        broken = {"messages": [{"role": "system", "content": "\udc00"}, {"role": "user", "content": "hi"}]}
    other = {"messages": TURNS[:1]} if column == "system" else {"prompt": "two", "gold": "y"}
    pool = pool_of(lines(tmp_path / "a.jsonl", [broken, other]))
    assert [drop.reason for drop in pool.drops] == ["lone surrogate in the text"]
    assert len(pool.train) == 1
    write_records(tmp_path / "out.jsonl", pool.train, Prompt)


def test_rows_without_a_prompt_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "one"}, {"prompt": ""}, {"prompt": " \n\t"}, {"prompt": None}]
    pool = pool_of(lines(tmp_path / "a.jsonl", rows))
    assert [drop.reason for drop in pool.drops] == ["empty prompt"] * 3
    talks = [{"messages": TURNS}, {"messages": TURNS[1:2]}, {"messages": []}]
    pool = pool_of(lines(tmp_path / "b.jsonl", talks))
    assert [drop.reason for drop in pool.drops] == ["empty prompt"] * 2
    assert [shown(p) for p in pool.train] == [[("user", "one")]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', ":2: not a JSON line"),
        ('{"prompt": "a"}\n[1]\n', "objects with named fields"),
        ('{"text": "a"}\n', "prompts.prompt_column"),
        ("", "no rows"),
        ('{"prompt": "a"}\n{"messages": []}\n', ":2: this row does not fit the form 'prompt'"),
        ('{"messages": [{"role": "user"}]}\n', ":1: this row does not fit"),
        ('{"messages": [{"role": "user", "content": 5}]}\n', ":1: this row does not fit"),
        ('{"messages": "hi"}\n', ":1: this row does not fit"),
        ('{"prompt": 5}\n', ":1: this row does not fit"),
        ('{"conversations": [{"from": "alien", "value": "x"}]}\n', ":1: this row does not fit"),
        ('{"prompt": "a", "checks": "nonsense"}\n', ":1: .*checks"),
        ('{"prompt": "a", "checks": [3]}\n', ":1: .*checks"),
        ('{"prompt": "a", "checks": {"kind": "json"}}\n', ":1: .*checks"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        read_prompts(recipe(path), str(path))


def test_a_column_or_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", asking(2))
    with pytest.raises(DataError, match="no column 'text'; there are prompt"):
        pool_of(path, prompt_column="text")
    with pytest.raises(DataError, match=r":1: no column 'gold' \(prompts\.gold_column\)"):
        pool_of(path, gold_column="gold")
    for name in ("none.jsonl", "none.json", "none.csv", "none.parquet"):
        with pytest.raises(DataError, match=name):
            pool_of(tmp_path / name)
    (tmp_path / "bad.json").write_text('[\n{"prompt": }]')
    with pytest.raises(DataError, match=r"bad\.json:2: not JSON"):
        pool_of(tmp_path / "bad.json")
    (tmp_path / "bad.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(DataError, match=r"bad\.jsonl: can't be read"):
        pool_of(tmp_path / "bad.jsonl")


def test_tools_may_be_json_text_as_tables_have_them(tmp_path: Path) -> None:
    tool = {"name": "search", "parameters": {}}
    as_list, _ = only(lines(tmp_path / "a.jsonl", [{"prompt": "one", "tools": [tool]}]))
    as_text, _ = only(lines(tmp_path / "b.jsonl", [{"prompt": "one", "tools": json.dumps([tool])}]))
    assert as_text.tools == as_list.tools == (tool,)
    assert as_text.id == as_list.id
    for bad in ("search", '"search"', '["search"]'):
        with pytest.raises(DataError, match="tools"):
            only(lines(tmp_path / "c.jsonl", [{"prompt": "one", "tools": bad}]))


def test_the_digest_of_a_pool_changes_when_a_prompt_becomes_a_held_out_one(tmp_path: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", asking(20))
    assert pool_of(source, heldout=0.1).digest != pool_of(source, heldout=0.5).digest
    assert pool_of(source, heldout=0.1).digest == pool_of(source, heldout=0.1).digest


def test_a_gold_answer_that_is_a_number_is_text(tmp_path: Path) -> None:
    prompt, _ = only(lines(tmp_path / "a.jsonl", [{"prompt": "2+2?", "answer": 4}]), gold_column="answer")
    assert prompt.gold == "4"


def test_turns_are_split_at_the_first_or_the_last_user_turn() -> None:
    turns = [Message(t["role"], t["content"]) for t in TURNS]
    assert split_turns(turns, "first") == (tuple(turns[:1]), "two")
    assert split_turns(turns, "last") == (tuple(turns[:3]), "four")
    assert split_turns(turns[:3], "last") == (tuple(turns[:3]), None)
    assert split_turns(turns[1:2], "first") == ((), None)


def test_a_prompt_that_repeats_the_opening_of_messages_leaves_the_gold_answer_there(tmp_path: Path) -> None:
    row = {"prompt": "one", "prompt_id": "x", "messages": TURNS}
    for source, gold in ((row, "two"), (row | {"completion": "beside"}, "beside"), (row | {"gold": "7"}, "7")):
        (prompt,), _ = read_prompts(recipe(lines(tmp_path / "p.jsonl", [source])), str(tmp_path / "p.jsonl"))
        assert isinstance(prompt, Prompt)
        assert prompt.messages == (Message("user", "one"),)
        assert prompt.gold == gold
