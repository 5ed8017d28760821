"""Who gets which prompt is settled by content and seed, and what leaves the pool is counted."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from selfplay import store
from selfplay.chat import Chat
from selfplay.errors import DataError, RecipeError
from selfplay.prompts import PromptPool, load_pool
from selfplay.recipe_prompts import PromptsRecipe
from selfplay.sources import record_pools
from selfplay.types import Drop, Message, Prompt, prompt_id


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
    assert len(rows) == len(pool.train) + len(pool.heldout) + len(pool.drops) == pool.num_rows


def test_rows_that_contradict_each_other_are_dropped_under_a_reason_of_their_own_and_named(tmp_path: Path) -> None:
    rows = [{"prompt": "one", "gold": str(n)} for n in range(6)] + [{"prompt": "one", "gold": "0"}]
    path = lines(tmp_path / "a.jsonl", rows)
    pool = pool_of(path)
    assert [p.gold for p in pool.train] == ["0"]
    assert pool.dropped == {"duplicate with another gold answer or checks": 5, "duplicate": 1}
    contradicting, equal = pool.drop_lines
    assert f"dropped: {path}:2, {path}:3, {path}:4, ...)" in contradicting
    assert equal == "1 dropped: duplicate"


def test_what_was_dropped_when_the_prompts_were_read_is_kept_with_id_reason_and_place(tmp_path: Path) -> None:
    rows = [*asking(3), *asking(1), {"prompt": ""}]
    path = lines(tmp_path / "a.jsonl", rows)
    pool = pool_of(path, heldout=0.3)
    record_pools({"": pool}, tmp_path / "run")
    kept = store.read_records(tmp_path / "run" / "drops.jsonl", Drop)
    assert sorted(kept, key=lambda drop: drop.source) == [
        Drop(prompt_id((Message("user", "question 0"),)), "duplicate", f"{path}:4"),
        Drop(f"{path}:5", "empty prompt", f"{path}:5"),
    ]
    counts = store.read_json(tmp_path / "run" / "prompts.json")
    assert counts == {"num_rows": 5, "num_train": 2, "num_heldout": 1, "dropped": {"duplicate": 1, "empty prompt": 1}}


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


def test_the_digest_is_that_of_one_json_text_of_all_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "gold": "\u2028"}, {"prompt": "b", "checks": [{"min": 1, "kind": "words"}]}, *asking(4)]
    pool = pool_of(lines(tmp_path / "a.jsonl", rows), heldout=0.3)
    parts = [[[p.id, p.gold, list(p.checks)] for p in part] for part in (pool.train, pool.heldout)]
    text = json.dumps(parts, sort_keys=True)
    assert pool.digest == hashlib.sha256(text.encode()).hexdigest()


def test_what_is_too_long_is_dropped_in_dealing_order(tmp_path: Path, chat: Chat) -> None:
    rows = [{"prompt": "x" * n} for n in range(1, 40)]
    path = lines(tmp_path / "a.jsonl", rows)
    order = [prompt.id for prompt in pool_of(path).train]
    pool = load_pool(recipe(path, max_prompt_length=30), seed=0, chat=chat, room=20)
    assert len(pool.dropped) == 2
    dropped = [drop.id for drop in pool.drops]
    assert dropped == [id for id in order if id in dropped]
    assert [prompt.id for prompt in pool.train] == [id for id in order if id not in dropped]


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


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of two splits, as `datasets` reads it from a folder; one prompt stands in both."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    lines(folder / "train.jsonl", asking(6))
    lines(folder / "test.jsonl", asking(4, start=5))
    return folder


def test_a_data_set_holds_out_its_own_split(data_set: Path) -> None:
    pool = pool_of(data_set, heldout={"split": "test"})
    assert sorted(p.text for p in pool.heldout) == [f"question {n}" for n in range(5, 9)]
    assert sorted(p.text for p in pool.train) == [f"question {n}" for n in range(5)]
    assert pool.dropped == {"also held out": 1}


def test_the_split_of_another_data_set_is_held_out_of_a_file(tmp_path: Path, data_set: Path) -> None:
    pool = pool_of(lines(tmp_path / "a.jsonl", asking(3)), heldout={"source": str(data_set), "split": "test"})
    assert (len(pool.train), len(pool.heldout)) == (3, 4)


def test_a_file_is_held_out_of_a_split_of_a_data_set(tmp_path: Path, data_set: Path) -> None:
    held = lines(tmp_path / "held.jsonl", asking(2, start=20))
    pool = pool_of(data_set, split="test", heldout=str(held))
    assert (len(pool.train), len(pool.heldout)) == (4, 2)


def test_the_split_that_is_trained_on_and_a_split_of_a_file_are_refused(tmp_path: Path, data_set: Path) -> None:
    with pytest.raises(ValueError, match="the split 'test' that is trained on"):
        recipe(data_set, split="test", heldout={"split": "test"})
    path = lines(tmp_path / "a.jsonl", asking(3))
    with pytest.raises(RecipeError, match=r"prompts\.heldout, are of data set ids; .*a\.jsonl is a file"):
        pool_of(path, heldout={"split": "test"})


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
