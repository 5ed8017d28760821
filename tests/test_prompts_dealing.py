"""Who gets which prompt is settled by content and seed, and what leaves the pool is counted."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from selfplay.chat import Chat
from selfplay.errors import DataError, RecipeError
from selfplay.prompts import PromptPool, load_pool
from selfplay.recipe import PromptsRecipe
from selfplay.types import Message, Prompt


def lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asking(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"question {n}"} for n in range(start, start + count)]


def recipe(source: Path, **changes: Any) -> PromptsRecipe:
    return PromptsRecipe.model_validate({"source": str(source), "deal": "same", **changes})


def pool_of(source: Path, *, seed: int = 0, **changes: Any) -> PromptPool:
    return load_pool(recipe(source, **changes), seed=seed)


def test_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [*asking(3), *asking(2), {"prompt": "question 0", "gold": "x"}]
    pool = pool_of(lines(tmp_path / "a.jsonl", rows))
    assert len(pool.train) == 3
    assert [drop.reason for drop in pool.drops] == ["duplicate"] * 2 + ["duplicate with another gold answer or checks"]
    assert len(rows) == len(pool.train) + len(pool.heldout) + len(pool.drops)


def test_ten_thousand_equal_prompts_are_one(tmp_path: Path) -> None:
    pool = pool_of(lines(tmp_path / "a.jsonl", [{"prompt": "one"}] * 10_000))
    assert (len(pool.train), len(pool.drops)) == (1, 9_999)


def test_disjoint_rounds_share_no_prompt_and_do_not_depend_on_the_rounds_after(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", asking(20))
    pool = pool_of(path, deal="disjoint", num_prompts=6)
    values = recipe(path, deal="disjoint", num_prompts=6)
    rounds = [pool.deal(values, r) for r in range(3)]
    assert [len(r) for r in rounds] == [6, 6, 6]
    assert len({p.id for r in rounds for p in r}) == 18
    # asked alone, in any order, or with other counts later, a round gets the same
    listed = recipe(path, deal="disjoint", num_prompts=[6, 6, 2])
    assert pool.deal(listed, 1) == rounds[1]
    assert pool.deal(listed, 2) == rounds[2][:2]
    assert pool.deal(listed, 3) == pool.train[14:16]
    with pytest.raises(RecipeError, match=r"round 3 needs prompts 19 to 24.*20 for training.*deal: same"):
        pool.deal(values, 3)


def test_the_same_deal_gives_every_round_the_same_prompts(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", asking(20))
    pool = pool_of(path)
    assert pool.deal(recipe(path), 7) == pool.train
    assert len(pool.train) == 20
    some = recipe(path, num_prompts=5)
    assert pool.deal(some, 0) == pool.deal(some, 9) == pool.train[:5]


def test_who_is_dealt_what_depends_on_seed_and_content_alone(tmp_path: Path) -> None:
    rows = asking(30)
    one = pool_of(lines(tmp_path / "a.jsonl", rows), heldout=0.2)
    two = pool_of(lines(tmp_path / "b.jsonl", reversed(rows)), heldout=0.2)
    assert [p.id for p in one.train] == [p.id for p in two.train]
    assert [p.id for p in one.heldout] == [p.id for p in two.heldout]
    other = pool_of(tmp_path / "a.jsonl", seed=1, heldout=0.2)
    assert [p.id for p in other.train] != [p.id for p in one.train]
    assert [p.messages[0].content for p in one.train] != sorted(p.messages[0].content for p in one.train)


@pytest.mark.parametrize(("share", "count"), [(0.2, 6), (0.5, 15), (0.001, 1)])
def test_a_held_out_share_is_apart(tmp_path: Path, share: float, count: int) -> None:
    pool = pool_of(lines(tmp_path / "a.jsonl", asking(30)), heldout=share)
    assert len(pool.heldout) == count
    assert len(pool.train) == 30 - count
    assert not {p.id for p in pool.train} & {p.id for p in pool.heldout}


def test_a_held_out_file_takes_its_prompts_out_of_training(tmp_path: Path) -> None:
    train = lines(tmp_path / "a.jsonl", asking(10))
    held = lines(tmp_path / "b.jsonl", [*asking(4, start=8), *asking(1, start=8)])
    pool = pool_of(train, heldout=str(held))
    assert sorted(p.text for p in pool.heldout) == ["question 10", "question 11", "question 8", "question 9"]
    assert len(pool.train) == 8
    assert not {p.id for p in pool.train} & {p.id for p in pool.heldout}
    assert sorted(drop.reason for drop in pool.drops) == ["also held out", "also held out", "duplicate"]


def test_long_prompts_are_dropped_and_never_cut(tmp_path: Path, chat: Chat) -> None:
    rows = [{"prompt": "x" * n} for n in (1, 20, 21, 100)]
    path = lines(tmp_path / "a.jsonl", rows)
    room = len(chat.encode_prompt(Prompt("", (Message("user", "x" * 20),))))
    pool = load_pool(recipe(path, max_prompt_length=room), seed=0, chat=chat)
    assert sorted(len(p.text) for p in pool.train) == [1, 20]
    assert [drop.reason for drop in pool.drops] == ["longer than max_prompt_length"] * 2
    with pytest.raises(DataError, match="longer than max_prompt_length"):
        load_pool(recipe(path, max_prompt_length=1), seed=0, chat=chat)


def test_the_digest_changes_with_any_prompt_gold_answer_or_check(tmp_path: Path) -> None:
    rows = asking(3)
    changed = [
        rows,
        [*rows[:2], {"prompt": "another"}],
        [*rows[:2], rows[2] | {"gold": "x"}],
        [*rows[:2], rows[2] | {"checks": [{"kind": "json"}]}],
        rows[:2],
    ]
    digests = [pool_of(lines(tmp_path / f"{n}.jsonl", r)).digest for n, r in enumerate(changed)]
    assert len(set(digests)) == len(changed)
    assert pool_of(lines(tmp_path / "again.jsonl", rows)).digest == digests[0]
