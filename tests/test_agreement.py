"""Agreement of two judges, on small tables worked out by hand."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfplay.agreement import agreement, compare_judges, kappa, kendall, sign_counts, spearman, wilson_interval
from selfplay.errors import DataError
from selfplay.types import Judgement

rows = st.lists(st.lists(st.none() | st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=4)


def test_a_judge_agrees_with_itself_on_any_scale():
    one = [(1.0, 2.0, 3.0), (0.0, 5.0, 5.0)]
    other = [tuple(10 * score - 7 for score in row) for row in one]
    counts = sign_counts(one, other)
    assert agreement(counts) == kappa(counts) == kendall(counts) == 1.0


def test_an_opposite_judge_has_no_agreement_and_rank_correlation_minus_one():
    counts = sign_counts([(1.0, 2.0, 3.0)], [(3.0, 2.0, 1.0)])
    assert agreement(counts) == 0.0
    assert kendall(counts) == -1.0
    assert kappa(counts) == -1.0


def test_figures_of_a_table_with_ties_worked_out_by_hand():
    # pairs (0,1), (0,2), (1,2): one says <, <, <; the other says =, <, <
    counts = sign_counts([(1.0, 2.0, 3.0)], [(1.0, 1.0, 2.0)])
    assert counts.sum() == 6
    assert agreement(counts) == pytest.approx(2 / 3)
    # shares of worse, tie, better: (1/2, 0, 1/2) and (1/3, 1/3, 1/3), so chance agrees in 1/3
    assert kappa(counts) == pytest.approx((2 / 3 - 1 / 3) / (1 - 1 / 3))
    assert kendall(counts) == pytest.approx(2 / math.sqrt(3 * 2))


def test_pairs_are_compared_within_a_prompt_only_and_without_missing_verdicts():
    assert sign_counts([(1.0,), (2.0,)], [(2.0,), (1.0,)]).sum() == 0
    assert sign_counts([(1.0, None, 2.0)], [(1.0, 5.0, 2.0)]).sum() == 2
    empty = sign_counts([], [])
    assert agreement(empty) is kappa(empty) is kendall(empty) is None
    ties = sign_counts([(1.0, 1.0)], [(1.0, 1.0)])
    assert agreement(ties) == 1.0
    assert kappa(ties) is kendall(ties) is None


@given(one=rows, other=rows, order=st.permutations(range(3)))
def test_the_order_of_completions_is_irrelevant(one, other, order):
    count = min(len(one), len(other))
    straight = sign_counts(one[:count], other[:count])
    mixed = sign_counts(
        [[row[n] for n in order] for row in one[:count]], [[row[n] for n in order] for row in other[:count]]
    )
    assert (straight == mixed).all()


def test_spearman_gives_ties_their_mean_rank():
    assert spearman([1, 2, 3], [10, 20, 90]) == pytest.approx(1.0)
    # ranks 1.5, 1.5, 3 against 1, 2, 3
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(1.5 * 2))
    assert spearman([1, 1], [1, 2]) is None
    assert spearman([], []) is None


def test_wilson_intervals():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(10, 10) == pytest.approx((0.7224672, 1.0))
    assert wilson_interval(50, 100) == pytest.approx((0.4038315, 0.5961685))


def judged(**scores):
    return [Judgement(id, row) for id, row in scores.items()]


def test_the_disagreements_with_the_largest_gap_come_first():
    one = judged(p=(0.0, 10.0), q=(5.0, 6.0), r=(1.0, 2.0), s=(4.0, 4.0))
    other = judged(p=(0.2, 0.9), q=(1.0, 0.0), r=(0.4, 0.3), s=(0.5, 0.3), only=(1.0, 2.0))
    found = compare_judges(one, other, limit=2)
    assert (found["num_prompts"], found["num_prompts_of_one"], found["num_pairs"]) == (4, 1, 4)
    assert [row["prompt_id"] for row in found["disagreements"]] == ["q", "r"]
    assert found["disagreements"][0] == {
        "prompt_id": "q",
        "completions": [0, 1],
        "a": [5.0, 6.0],
        "b": [1.0, 0.0],
        "gap": pytest.approx(1.1),
    }
    assert found["agreement"] == 0.25


def of(digest, **scores):
    return [replace(one, completions_digest=digest) for one in judged(**scores)]


def test_only_scores_of_the_same_completions_are_compared_and_the_others_are_counted():
    one = [*of("a", p=(1.0, 2.0)), *of("b", q=(1.0, 2.0)), *of("c", r=(1.0, 2.0))]
    other = [*of("a", p=(1.0, 2.0)), *of("z", q=(2.0, 1.0)), *of("c", r=(2.0, 1.0))]
    found = compare_judges(one, other)
    assert (found["num_prompts"], found["num_other_completions"], found["num_unknown"]) == (2, 1, 0)
    assert found["agreement"] == 0.5
    assert [row["prompt_id"] for row in found["disagreements"]] == ["r"]


def test_judgements_without_a_digest_are_compared_and_counted_as_not_known():
    found = compare_judges([*of("a", p=(1.0, 2.0)), *judged(q=(1.0,))], judged(p=(1.0, 2.0), q=(1.0, 2.0)))
    assert (found["num_prompts"], found["num_other_completions"], found["num_unknown"]) == (1, 1, 1)


def test_judgements_that_do_not_belong_together_are_refused():
    with pytest.raises(DataError, match="both judged 1 prompts, but of none the same completions"):
        compare_judges(judged(p=(1.0, 2.0)), judged(p=(1.0,)))
    with pytest.raises(DataError, match="of none the same completions"):
        compare_judges(of("a", p=(1.0, 2.0)), of("b", p=(1.0, 2.0)))
    with pytest.raises(DataError, match="second judgements hold a prompt twice"):
        compare_judges(judged(p=(1.0,)), judged(p=(1.0,)) * 2)
