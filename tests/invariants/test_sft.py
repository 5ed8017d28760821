"""Jobs whose loss reads one completion a row: SFT, and rejection-sampling fine-tuning on pairs. And SPPO's win rates."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
from jobs import job_of, random_pairs, steps, train, weights

from selfplay import store
from selfplay.errors import DataError, NoPairsError
from selfplay.train.loop import run_training
from selfplay.train.pack import build_packs
from selfplay.train.rows import demonstration_of, read_rows
from selfplay.types import Demonstration, PreferencePair


def test_a_pack_of_demonstrations_holds_their_prompts_and_completions_only() -> None:
    pairs = random_pairs(num_prompts=3, num_completions=3)
    rows = [demonstration_of(pair) for pair in pairs]
    (pack,) = build_packs(rows, range(len(rows)), max_pack_tokens=10_000, shared=True)
    prompts = {row.prompt_token_ids for row in rows}
    completions = {(row.prompt_token_ids, row.completion_token_ids) for row in rows}
    assert pack.num_tokens == sum(map(len, prompts)) + sum(len(completion) for _, completion in completions)
    assert pack.num_sequences == len(completions) < len(rows)
    assert pack.rejected_B is None
    taught = [tuple(pack.target_N[pack.sequence_N == sequence].tolist()) for sequence in pack.chosen_B]
    assert taught == [rows[i].completion_token_ids for i in pack.pair_B]


def test_sft_on_pairs_is_sft_on_their_chosen_completions_once_for_each_pair(tiny: Path, tmp_path: Path) -> None:
    pairs = random_pairs(num_prompts=3, num_completions=3)
    by_pairs = train(tmp_path / "pairs", tiny, pairs, loss_type="sft", num_train_epochs=2)
    job = job_of(tmp_path / "rows", tiny, [], loss_type="sft", num_train_epochs=2)
    rows = [demonstration_of(pair) for pair in pairs]
    assert len(set(rows)) < len(rows)  # the best of three is chosen twice
    store.write_records(tmp_path / "rows" / "pairs.jsonl", rows, Demonstration)
    run_training(job)
    assert steps(tmp_path / "rows") == by_pairs
    one, other = (weights(tmp_path / name / "out" / "policy") for name in ("pairs", "rows"))
    assert all((one[name] == other[name]).all() for name in one)
    assert by_pairs[-1]["loss"] < by_pairs[0]["loss"]


def test_sft_forwards_no_rejected_completion_and_has_no_rewards(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    alone = run_training(job_of(tmp_path / "alone", tiny, pairs, loss_type="sft", max_steps=1, batch_size=12))
    beside = run_training(job_of(tmp_path / "beside", tiny, pairs, max_steps=1, batch_size=12))
    rejected = {(p.prompt_token_ids, p.rejected_token_ids) for p in pairs}
    assert beside["num_tokens"] - alone["num_tokens"] == sum(len(completion) for _, completion in rejected)
    assert alone["rewards/accuracies"] is None
    assert alone["rewards/margins"] is None
    assert [name for name in steps(tmp_path / "alone")[0] if "rejected" in name or "reward" in name] == []


def test_the_length_of_a_demonstration_is_its_own(tiny: Path, tmp_path: Path) -> None:
    pairs = random_pairs()
    longest = max(len(p.prompt_token_ids) + len(p.chosen_token_ids) for p in pairs)
    rows, too_long = read_rows(job_of(tmp_path, tiny, pairs, loss_type="sft", max_length=longest - 1))
    assert too_long == sum(len(p.prompt_token_ids) + len(p.chosen_token_ids) == longest for p in pairs) > 0
    assert len(rows) + too_long == len(pairs)
    with pytest.raises(NoPairsError, match="max_length 3"):
        read_rows(job_of(tmp_path / "none", tiny, pairs, loss_type="sft", max_length=3))


def test_demonstrations_are_no_food_for_a_loss_of_pairs(tiny: Path, tmp_path: Path) -> None:
    job = job_of(tmp_path, tiny, [])
    rows = [demonstration_of(pair) for pair in random_pairs()]
    store.write_records(tmp_path / "pairs.jsonl", rows, Demonstration)
    with pytest.raises(DataError, match="Say loss_type: sft"):
        run_training(job)


def test_sppo_follows_the_win_rates_of_its_pairs(tiny: Path, tmp_path: Path) -> None:
    rated = [
        dataclasses.replace(pair, chosen_win_rate=0.5 + n / 20, rejected_win_rate=n / 20)
        for n, pair in enumerate(random_pairs())
    ]
    row = train(tmp_path / "soft", tiny, rated, loss_type="sppo", beta=0.1, batch_size=99, max_steps=1)[0]
    # at policy = reference: the mean of ((p - 1/2) / beta)^2 + ((q - 1/2) / beta)^2
    wanted = sum((n / 2) ** 2 + (n / 2 - 5) ** 2 for n in range(len(rated))) / len(rated)
    assert row["loss"] == pytest.approx(wanted, rel=1e-5)
    unrated = [rated[0], dataclasses.replace(rated[1], rejected_win_rate=None)]
    with pytest.raises(DataError, match=f"prompt {rated[1].prompt_id} has no win rates.*sppo_hard"):
        train(tmp_path / "hard", tiny, unrated, loss_type="sppo")
