"""The figures of the experiments' tables, against what is worked out by hand or by a plain forward pass."""

import math
from pathlib import Path

import pytest
import rounds
import spin_table
from figures import trained_on
from judges import sorted_out
from lab import Item, Lab, read_plan
from spin import HeldoutRow

from selfplay import store
from selfplay.errors import DataError
from selfplay.types import Completion, Demonstration, Group, Judgement, Message, PreferencePair, Prompt, prompt_id


def row(name: str, gold: tuple[int, ...], fresh: tuple[int, ...]) -> HeldoutRow:
    messages = (Message("user", name),)
    prompt = Prompt(prompt_id(messages), messages)
    said = (Message("assistant", "gold"),)
    group = Group(prompt, (1, 2), (Completion("fresh", fresh),))
    return HeldoutRow(group, Demonstration(prompt.id, messages, said, (1, 2), gold))


ROWS = [row("a", (3, 4), (5,)), row("b", (3,), (5, 6)), row("c", (3,), (6,)), row("d", (3, 4), (3, 4))]
START = {"gold": [-4.0, -2.0, -1.0, -3.0], "fresh": [-2.0, -2.0, -5.0, -3.0]}


def test_gold_is_told_apart_where_its_log_ratio_is_the_higher_one() -> None:
    # log-ratios of gold and fresh: 1 > 0; -1 < 1; 0.5 = 0.5; and the same tokens, whose sums differ in last bits
    policy = {"gold": [-3.0, -3.0, -0.5, -2.0], "fresh": [-2.0, -1.0, -4.5, -2.0001]}
    assert spin_table.told_apart(ROWS, policy, START) == {"a": 1.0, "b": 0.0, "c": 0.5, "d": 0.5}


def test_length_alone_tells_nothing_where_both_are_as_long() -> None:
    assert spin_table.by_length(ROWS, shorter=True) == {"a": 0.0, "b": 1.0, "c": 0.5, "d": 0.5}
    assert spin_table.by_length(ROWS, shorter=False) == {"a": 1.0, "b": 0.0, "c": 0.5, "d": 0.5}


def pair(chosen: int, rejected: int) -> PreferencePair:
    said = (Message("assistant", "x"),)
    return PreferencePair("p", (Message("user", "q"),), said, said, (1,), (3,) * chosen, (4,) * rejected)


def test_pairs_of_equal_length_do_not_say_which_length_gold_has() -> None:
    ties = [pair(3, 3)] * 5
    assert not spin_table.mostly_shorter([*ties, pair(4, 3), pair(4, 2), pair(1, 2)])
    assert spin_table.mostly_shorter([*ties, pair(4, 3), pair(1, 3), pair(1, 2)])


def test_rows_and_steps_are_those_of_all_trainings_at_the_rate_that_was_taken(tmp_path: Path) -> None:
    for place, pairs, steps in (("run/round-000", 10, 2), ("run/round-001", 9, 2)):
        path = tmp_path / "rate-2e-05" / place / "train" / "result.json"
        path.parent.mkdir(parents=True)
        store.write_json(path, {"num_pairs": pairs, "num_steps": steps})
    other = tmp_path / "rate-5e-06" / "train" / "result.json"
    other.parent.mkdir(parents=True)
    store.write_json(other, {"num_pairs": 99, "num_steps": 99})
    assert trained_on(tmp_path, 2e-5) == (19, 4)
    assert trained_on(tmp_path, None) == (None, None)


def test_only_finished_completions_become_pairs_or_questions() -> None:
    texts = (("one two", "stop", 1.0), ("cut", "length", 1.0), ("no", "stop", 0.0), ("no verdict", "stop", None))
    group = Group(
        ROWS[0].group.prompt, (1,), tuple(Completion(text, (9,), finish_reason=why) for text, why, _ in texts)
    )
    judgement = Judgement(group.prompt.id, tuple(score for *_, score in texts))
    passing, failing = sorted_out(group, judgement)
    assert [c.text for c in passing] == ["one two"]
    assert [c.text for c in failing] == ["no"]


def played(lab: Lab, arm: str, entropy: float) -> Path:
    place = lab.folder(Item(arm, 0, lab.first_point(arm)))
    (place / "test").mkdir(parents=True)
    store.write_json(place / "done.json", {})
    store.write_json(place / "test" / "eval.json", {"entropy": entropy})
    return place


def test_the_matched_temperature_lies_between_the_two_whose_entropies_are_around_it(tmp_path: Path) -> None:
    lab = Lab("C", read_plan("C"), tmp_path, "model", {})
    base, prior = played(lab, "base", 3.0), played(lab, "prior", 2.55)
    store.write_json(base / "entropies.json", [1.5 + 0.2 * n for n in range(len(rounds.TEMPERATURES))])
    assert rounds.matched_temperature(lab, 0) == {"evaluate.temperature": 0.725}
    store.write_json(prior / "test" / "eval.json", {"entropy": 1.4})
    with pytest.raises(DataError, match=r"no temperature from 0.2 to 1.2 has an entropy of 1.400 nats"):
        rounds.matched_temperature(lab, 0)


def test_entropies_and_logps_are_those_of_a_plain_forward_pass(tiny: Path) -> None:
    import torch
    from scoring import entropies, logp_per_token, logps_of

    from selfplay.train.model import load_model

    groups = [one.group for one in ROWS]
    model = load_model(str(tiny)).float()
    sums, golds, tokens = 0.0, [], 0
    with torch.no_grad():
        for one in ROWS:
            ids = one.fresh_token_ids
            logp_NV = torch.log_softmax(model(input_ids=torch.tensor([[1, 2, *ids]])).logits[0, 1:-1].float(), -1)
            sums -= float((logp_NV.exp() * logp_NV).sum())
            tokens += len(ids)
            gold = one.gold.completion_token_ids
            logp_NV = torch.log_softmax(model(input_ids=torch.tensor([[1, 2, *gold]])).logits[0, 1:-1].float(), -1)
            golds.append(float(logp_NV.gather(1, torch.tensor(gold)[:, None]).sum()))
    cold, one, hot = entropies(tiny, groups, [0.2, 1.0, 1e6])
    assert one == pytest.approx(sums / tokens, rel=0.01)
    assert cold < one < hot
    assert hot == pytest.approx(math.log(logp_NV.shape[1]), rel=1e-4)
    found = logps_of(tiny, [row.gold for row in ROWS])
    assert found == pytest.approx(golds, rel=0.01)
    assert logp_per_token(found, [row.gold for row in ROWS]) == pytest.approx(sum(found) / 6)
