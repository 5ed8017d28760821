"""Whole runs whose rounds mix in earlier pairs, or filter theirs: counts, references, resume, the doors for own filters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_rounds import AnyPair, KilledError, changed, commits, digests, length
from test_rounds import rig as rig  # the fixture

import selfplay
from selfplay import store
from selfplay.errors import DataError, NoPairsError, RecipeError, SecurityError
from selfplay.protocols import FilterContext
from selfplay.rounds import iterate
from selfplay.types import PreferencePair, Prompt

MIX = [{"kind": "mix_previous", "weights": [0.5]}, {"kind": "exact_duplicates"}, {"kind": "contradictions"}]


def mixing(rig: dict[str, Any], **sections: Any) -> Any:
    """Both rounds get the same prompts, so that earlier pairs are of prompts that the round knows."""
    prompts = {"deal": "same", "num_prompts": 8}
    return changed({**rig, "pairs": {}, "rounds": 3}, prompts=prompts, pairs={"filters": MIX}, **sections)


def play(recipe: Any, out: Path, **own: Any) -> dict[str, Any]:
    return iterate(recipe, out, judge=length, selector=AnyPair(), **own)


@pytest.fixture(scope="module")
def mixed(rig: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mixed") / "run"
    play(mixing(rig), out)
    return out


def pairs_of(run: Path, round: int) -> list[PreferencePair]:
    return store.read_records(run / f"round-{round:03d}" / "pairs.jsonl", PreferencePair)


def test_the_second_round_trains_on_the_first_ones_pairs_too(mixed: Path) -> None:
    first, second = pairs_of(mixed, 0), pairs_of(mixed, 1)
    assert {p.origin_round for p in first} == {0}
    old = [p for p in second if p.origin_round == 0]
    assert old
    assert {p.weight for p in old} == {0.5}
    kept = {(p.prompt_id, p.chosen_token_ids, p.rejected_token_ids) for p in first}
    assert {(p.prompt_id, p.chosen_token_ids, p.rejected_token_ids) for p in old} <= kept
    result = store.read_json(mixed / "round-001" / "train" / "result.json")
    assert result["num_pairs"] == len(second) > len(first)


def test_a_window_of_one_round_reaches_no_further_through_that_rounds_own_mix(mixed: Path) -> None:
    assert {p.origin_round for p in pairs_of(mixed, 1)} == {0, 1}
    third = pairs_of(mixed, 2)
    assert {p.origin_round for p in third} == {1, 2}
    assert {p.weight for p in third if p.origin_round == 1} == {0.5}


def test_old_pairs_get_their_logps_from_the_new_reference(mixed: Path) -> None:
    # the policy has left the one that the old pairs were sampled from; against its own start every log-ratio is 0
    first = store.read_json_lines(mixed / "round-001" / "train" / "steps.jsonl")[0]
    assert first["audit/zero_logratio"] == 0.0
    assert first["rewards/margins"] == 0.0


def test_the_counts_of_a_mixed_round_add_up(mixed: Path) -> None:
    for r in (0, 1, 2):
        counts = store.read_json(mixed / f"round-00{r}" / "round.json")["counts"]
        pairs = pairs_of(mixed, r)
        own = {p.prompt_id for p in pairs if p.origin_round == r}
        assert counts["num_prompts"] == 8 == len(own) + sum(counts["num_prompts_without_pair"].values())
        assert counts["num_pairs"] == len(pairs)
        assert counts["num_pairs_of_earlier_rounds"] == sum(p.origin_round < r for p in pairs)
        before = counts["num_pairs_selected"]
        assert [one["filter"] for one in counts["filters"]] == [one["kind"] for one in MIX]
        for one in counts["filters"]:
            assert one["num_in"] == before
            assert one["num_in"] + one["num_added"] == one["num_out"] + one["num_dropped"]
            before = one["num_out"]
        assert before == len(pairs)
    assert counts["filters"][0]["num_added"] > 0


def test_status_shows_what_the_filters_did(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from selfplay.cli import main

    assert main(["status", str(mixed)]) == 0
    text = capsys.readouterr().out
    assert "round 0, filter mix_previous: " in text
    added = selfplay.status(mixed)["rounds"][1]["counts"]["filters"][0]["num_added"]
    assert f"+ {added} of earlier rounds" in text


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("point", ["filters.json", "pairs.jsonl"])
def test_a_mixed_run_killed_while_pairing_ends_as_an_undisturbed_one(
    rig: dict[str, Any], mixed: Path, tmp_path: Path, point: str, before: bool
) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        commits(monkeypatch, lambda path: path == out / "round-001" / point, before=before)
        with pytest.raises(KilledError):
            play(mixing(rig), out)
    play(mixing(rig), out)
    assert digests(out) == digests(mixed)


def test_other_filters_are_refused_on_a_run(rig: dict[str, Any], mixed: Path) -> None:
    other = changed({**rig, "pairs": {}, "rounds": 3}, prompts={"deal": "same", "num_prompts": 8})
    with pytest.raises(RecipeError, match=r"pairs\.filters"):
        play(other, mixed)
    with pytest.raises(RecipeError, match="filters: None ->"):
        play(mixing(rig), mixed, filters=[half])


def half(pairs: Sequence[PreferencePair], context: FilterContext) -> Sequence[PreferencePair]:
    return pairs[: len(pairs) // 2]


def test_a_function_stands_in_for_the_filters_of_a_recipe(rig: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    play(changed(rig, rounds=1), out, filters=[half])
    counts = store.read_json(out / "round-000" / "round.json")["counts"]
    (one,) = counts["filters"]
    assert one["filter"].startswith("function:test_rounds_filters.half@")
    assert one["num_out"] == counts["num_pairs"] == counts["num_pairs_selected"] // 2
    assert (
        counts["num_prompts_without_pair"][f"filter {one['filter']}"] == counts["num_pairs_selected"] - one["num_out"]
    )


def test_a_filter_file_of_the_recipe_needs_allow_code_and_is_part_of_the_run(
    rig: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def last(pairs, context):\n    return pairs[-3:]\n")
    data = {**rig, "rounds": 1, "pairs": {"filters": [{"kind": "python", "target": f"{file}:last"}]}}
    with pytest.raises(SecurityError, match="allow-code"):
        play(changed(data), tmp_path / "run")
    play(changed(data), tmp_path / "run", allow_code=True)
    assert len(pairs_of(tmp_path / "run", 0)) == 3
    file.write_text("def last(pairs, context):\n    return pairs[-4:]\n")
    with pytest.raises(RecipeError, match=r"filters: .*mine\.py:last"):
        play(changed(data), tmp_path / "run", allow_code=True)


def test_a_round_whose_own_pairs_are_all_filtered_out_stops(rig: dict[str, Any], tmp_path: Path) -> None:
    def only_old(pairs: Sequence[PreferencePair], context: FilterContext) -> list[PreferencePair]:
        return list(pairs) if context.round == 0 else list(context.previous(0))

    with pytest.raises(NoPairsError, match=r"round 1: none of 8 prompts.*filter function:test_rounds_filters"):
        play(changed(rig), tmp_path / "run", filters=[only_old])
    assert not (tmp_path / "run" / "round-001" / "pairs.jsonl").exists()


def test_a_prompt_without_a_gold_answer_is_found_before_the_first_round(rig: dict[str, Any], tmp_path: Path) -> None:
    data = {**rig, "judge": None, "pairs": {"kind": "gold_vs_completion"}, "evaluate": {"judge": {"kind": "coin"}}}
    with pytest.raises(DataError, match=r"8 of 8 have none.*prompts\.gold_column"):
        iterate(changed(data), tmp_path / "run")
    assert not (tmp_path / "run" / "initial").exists()


def test_the_rig_deals_the_same_prompts_twice(mixed: Path) -> None:
    dealt = [{p.id for p in store.read_records(mixed / f"round-00{r}/prompts.jsonl", Prompt)} for r in (0, 1)]
    assert dealt[0] == dealt[1]
