"""The win rates of chosen and rejected completions, from scores, their order, or rewards."""

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_pairs import group_of
from test_pairs_strategies import as_read, judged

from selfplay.errors import JudgeError
from selfplay.judges.lift import win_rates
from selfplay.pairs import WinRates
from selfplay.types import Group, Judgement

WIN_RATES = ("order", "bradley_terry", "scores")


def rates(kind: Any, scores: Sequence[float | None]) -> tuple[float | None, float | None]:
    group = group_of([chr(97 + n) for n in range(len(scores))])
    (pair,) = WinRates(kind).select(group, Judgement("p", tuple(scores)))
    return pair.chosen_win_rate, pair.rejected_win_rate


def test_win_rates_are_means_over_the_group_with_a_half_for_itself() -> None:
    # 0.8 over two others: (2 * 0.8 + 0.5) / 3
    assert rates("scores", (0.8, 0.5, 0.2)) == pytest.approx((0.7, 0.3))
    assert rates("scores", (1.0, 0.0)) == pytest.approx((0.75, 0.25))
    # beats two, ties with itself; loses to two; a missing verdict takes no part
    assert rates("order", (9.0, 5.0, None, -7.0)) == pytest.approx((2.5 / 3, 0.5 / 3))
    assert rates("order", (1.0, 1.0, 0.0)) == pytest.approx((2 / 3, 0.5 / 3))
    beats = 1 / (1 + math.exp(-2))
    assert rates("bradley_terry", (3.0, 1.0)) == pytest.approx(((0.5 + beats) / 2, (0.5 + 1 - beats) / 2))
    assert rates("bradley_terry", (2000.0, -2000.0)) == pytest.approx((0.75, 0.25))


@pytest.mark.parametrize("kind", WIN_RATES)
@given(case=judged())
def test_the_chosen_completion_has_the_higher_win_rate(kind: Any, case: tuple[Group, Judgement]) -> None:
    group, judgement = case
    for pair in WinRates(kind).select(group, as_read(f"win_rates, {kind}", judgement)):
        assert pair.chosen_win_rate is not None
        assert pair.rejected_win_rate is not None
        # not <= 1/2 <=: a better completion may be judged and unusable, for it is part of what the policy writes
        assert 0 <= pair.rejected_win_rate <= pair.chosen_win_rate <= 1
        assert kind != "order" or pair.rejected_win_rate < pair.chosen_win_rate


@st.composite
def compared(draw: st.DrawFn) -> tuple[Group, dict[tuple[int, int], float | None]]:
    """A group and P(i beats j) as said when i was shown first; some comparisons have no verdict."""
    group = group_of("abcdef"[: draw(st.integers(2, 6))])
    said = st.sampled_from([None, None, 0.0, 0.3, 0.5, 1.0])
    return group, {places: draw(said) for places in permutations(range(len(group.completions)), 2)}


@given(case=compared())
def test_win_rates_of_comparisons_of_which_some_are_missing_are_means_over_the_others(
    case: tuple[Group, dict[tuple[int, int], float | None]],
) -> None:
    group, first_wins = case
    judgement = win_rates(group, first_wins)
    count = sum(score is not None for score in judgement.scores)
    found = WinRates("scores").select(group, judgement)
    known = [score for score in judgement.scores if score is not None]
    assert bool(found) == (bool(known) and max(known) > min(known))
    for pair in found:
        ends = ((pair.chosen_index, pair.chosen_win_rate), (pair.rejected_index, pair.rejected_win_rate))
        for index, rate in ends:
            assert index is not None
            # what each comparison says once its swap is undone; a contradiction is a tie
            rates = []
            for other in range(len(group.completions)):
                forth, back = first_wins.get((index, other)), first_wins.get((other, index))
                if forth is not None and back is not None:
                    rates.append(0.5 if (forth - 0.5) * (back - 0.5) > 0 else (forth + 1 - back) / 2)
            assert rate == pytest.approx(((count - 1) * sum(rates) / len(rates) + 0.5) / count)
        assert 0 <= ends[1][1] < ends[0][1] <= 1  # type: ignore[operator]


def test_a_missing_comparison_leaves_the_better_completion_the_higher_rate() -> None:
    # 0 met 1 alone and won; 1 and 2 met everyone: of 3 rates on 2 others each, 0's only one stands for both
    first_wins: dict[tuple[int, int], float | None] = {(0, 1): 1.0, (1, 0): 0.0, (1, 2): 1.0, (2, 1): 0.0, (0, 2): None}
    group = group_of("abc")
    (pair,) = WinRates("scores").select(group, win_rates(group, first_wins))
    assert (pair.chosen_index, pair.rejected_index) == (0, 2)
    assert (pair.chosen_win_rate, pair.rejected_win_rate) == pytest.approx((2.5 / 3, 0.5 / 3))


def test_scores_that_are_no_win_rates_are_refused() -> None:
    with pytest.raises(JudgeError, match=r"prompt p: the score 4\.0 is no win rate.*bradley_terry"):
        rates("scores", (4.0, 1.0))
