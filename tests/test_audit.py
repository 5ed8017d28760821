"""The audit of a round's judging: each way for a judge to rot shows in its figure."""

import numpy as np
import pytest
from jobs import pair_of

from selfplay.audit import MIN_COUNT, Evidence, audit, histogram
from selfplay.judges.lift import pairwise, pointwise
from selfplay.protocols import JudgeContext
from selfplay.types import Completion, Group, Judgement, Prompt


def group_of(number, lengths):
    completions = tuple(Completion(f"{n} " * n, tuple(range(n))) for n in lengths)
    return Group(Prompt(f"p{number}", ()), (1,), completions)


GROUPS = [group_of(n, (3, 5, 8)) for n in range(10)]


def audited(judge, pairs=()):
    return audit(GROUPS, judge.judge(GROUPS, JudgeContext()), pairs)


def pairs_of(longer, count):
    return [pair_of([n], [1] * (9 if n < longer else 1), [2] * 3) for n in range(count)]


def test_a_judge_of_length_is_seen_and_rings_the_alarm():
    figures = audited(pointwise(lambda prompt, c: len(c.token_ids)), pairs_of(15, 20))
    assert figures["length_correlation"] == 1.0
    assert figures["chosen_longer"] == 0.75
    assert [alarm[:51] for alarm in figures["alarms"]] == ["the chosen completion is the longer one in 75% of t"]
    assert audited(pointwise(lambda prompt, c: -len(c.token_ids)))["length_correlation"] == -1.0
    assert audited(pointwise(lambda prompt, c: 0.0), pairs_of(14, 20))["alarms"] != figures["alarms"]


def test_a_judge_that_always_says_five_is_seen_and_rings_the_alarm():
    figures = audited(pointwise(lambda prompt, c: 5))
    assert figures["tie_rate"] == figures["ceiling_share"] == 1.0
    assert figures["length_correlation"] is None
    assert figures["histogram"] == [[5.0, 5.0, 30]]
    assert len(figures["alarms"]) == 1
    assert "100% of the scores are the highest one, 5 " in figures["alarms"][0]


def test_a_judge_of_places_has_swap_consistency_zero_and_rings_the_alarm():
    figures = audited(pairwise(lambda prompt, a, b: 1.0))
    assert figures["num_compared"] == 30
    assert figures["swap_consistency"] == 0.0
    assert figures["tie_rate"] == 1.0
    assert any("0% of the comparisons agree with their swap" in alarm for alarm in figures["alarms"])
    assert audited(pairwise(lambda prompt, a, b: float(len(a.text) > len(b.text))))["swap_consistency"] == 1.0


def test_missing_verdicts_lower_the_parse_rate_and_nothing_else():
    figures = audited(pointwise(lambda prompt, c: None if len(c.token_ids) == 5 else len(c.token_ids) % 7))
    assert figures["parse_rate"] == pytest.approx(2 / 3)
    assert figures["num_scores"] == 20
    assert figures["tie_rate"] == 0.0
    assert figures["ceiling_share"] == 0.5
    assert figures["alarms"] == []


def test_several_judges_have_figures_of_their_own_and_scales_are_never_mixed():
    # one member is sure on a scale of 100, the other says 0 or 1 at random: together they would look reliable
    sure = [Judgement(g.prompt.id, (1.0,) * 3, verdicts=((100.0, 100.0), (0.0, 0.0), (50.0, 50.0))) for g in GROUPS]
    dice = [Judgement(g.prompt.id, (1.0,) * 3, verdicts=((0.0, 1.0), (1.0, 0.0), (1.0, None))) for g in GROUPS]
    together = [Judgement(g.prompt.id, (float(k), 1.0, 2.0)) for k, g in enumerate(GROUPS)]
    figures = audit(GROUPS, together, [], Evidence(members={"sure": sure, "dice": dice}))
    assert figures["members"]["sure"]["self_reliability"] == figures["members"]["sure"]["self_agreement"] == 1.0
    assert figures["members"]["dice"]["self_agreement"] == figures["self_reliability"] == 0.0
    assert figures["members"]["dice"]["parse_rate"] == pytest.approx(5 / 6)
    assert (figures["num_repeated"], figures["self_agreement"]) == (50, pytest.approx(0.6))
    assert [alarm[:31] for alarm in figures["alarms"]] == ["dice: verdicts on one question "]


def test_equal_lengths_count_half_and_few_rows_ring_no_alarm():
    assert audit(GROUPS, None, [pair_of([1], [1, 2], [3, 4])])["chosen_longer"] == 0.5
    few = GROUPS[: MIN_COUNT // 3 - 1]
    judgements = [Judgement(group.prompt.id, (5.0, 5.0, 5.0)) for group in few]
    assert audit(few, judgements, pairs_of(MIN_COUNT - 1, MIN_COUNT - 1))["alarms"] == []
    assert audit(GROUPS, None, pairs_of(MIN_COUNT, MIN_COUNT))["alarms"] != []


def test_a_round_without_a_judge_has_the_figures_of_its_pairs_alone():
    figures = audit(GROUPS, None, [])
    assert all(figures[key] is None for key in ("parse_rate", "tie_rate", "swap_consistency", "chosen_longer"))
    assert figures["histogram"] == figures["alarms"] == []


def test_a_histogram_shows_few_values_one_by_one_and_many_in_bins():
    assert histogram(lambda: [0.0, 1.0, 1.0]) == [[0.0, 0.0, 1], [1.0, 1.0, 2]]
    many = histogram(lambda: (float(n) for n in range(100)))
    assert len(many) == 10
    assert [row[2] for row in many] == [10] * 10
    assert (many[0][0], many[-1][1]) == (0.0, 99.0)
    more = np.random.default_rng(0).normal(size=25_000)
    counts, edges = np.histogram(more, 10)
    assert histogram(lambda: more.tolist()) == [list(row) for row in zip(edges[:-1], edges[1:], counts, strict=True)]
