"""How far a judge agrees with itself: figures that a careless judge can't have."""

import random
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfplay.audit import MIN_COUNT, audit
from selfplay.errors import JudgeError
from selfplay.judges.contract import check_judgements
from selfplay.records import Lazy
from selfplay.self_agreement import repeated, self_agreement, self_reliability
from selfplay.types import Completion, Group, Judgement, Prompt

rows = st.lists(st.lists(st.lists(st.integers(0, 5).map(float), min_size=2, max_size=4), max_size=4), max_size=5)


def judgement_of(*verdicts: tuple[float | None, ...]) -> Judgement:
    return Judgement("p", (1.0,), ("",), verdicts=verdicts)


def test_only_questions_with_two_readable_verdicts_count() -> None:
    found = list(repeated([judgement_of((1.0, None), (2.0, 2.0, None)), Judgement("q", (1.0,))]))
    assert found == [[[2.0, 2.0]]]
    assert self_agreement(found) == 1.0
    assert self_agreement([]) is None
    assert self_reliability([]) is None


def test_agreement_is_the_share_of_equal_pairs_as_a_mean_over_questions() -> None:
    # 1 of 3 pairs, and 1 of 1
    assert self_agreement([[[4.0, 4.0, 5.0]], [[0.0, 0.0]]]) == pytest.approx((1 / 3 + 1) / 2)


def test_reliability_is_the_intraclass_correlation_within_prompts() -> None:
    # by hand: MSW = (4 * 0.25) / 2 = 0.5, MSB = 2 * (1.5**2 + 1.5**2) / 1 = 9
    assert self_reliability([[[1.0, 2.0], [4.0, 5.0]]]) == pytest.approx(1 - 0.5 / 9)
    # the same, another prompt with a scale of its own beside it: what separates prompts separates no completions
    assert self_reliability([[[1.0, 2.0], [4.0, 5.0]], [[101.0, 102.0], [104.0, 105.0]]]) == pytest.approx(1 - 0.5 / 9)
    assert self_reliability([[[1.0, 2.0]], [[101.0, 102.0]]]) is None
    assert self_reliability([[[1.0, 1.0], [4.0, 4.0]]]) == 1.0
    assert self_reliability([[[1.0, 4.0], [1.0, 4.0]]]) == 0.0
    assert self_reliability([[[3.0, 3.0], [3.0, 3.0]]]) is None


@given(prompts=rows)
def test_figures_are_shares_and_the_order_of_verdicts_and_prompts_is_irrelevant(
    prompts: list[list[list[float]]],
) -> None:
    agreed, reliable = self_agreement(prompts), self_reliability(prompts)
    assert agreed is None or 0 <= agreed <= 1
    assert reliable is None or 0 <= reliable <= 1
    turned = [[row[::-1] for row in prompt[::-1]] for prompt in prompts[::-1]]
    assert self_agreement(turned) == (None if agreed is None else pytest.approx(agreed))
    assert self_reliability(turned) == (None if reliable is None else pytest.approx(reliable))


def test_a_judge_that_throws_dice_rings_the_alarm_and_one_that_knows_does_not() -> None:
    dice = random.Random(0)
    groups = [Group(Prompt(f"p{n}", ()), (1,), (Completion("a"), Completion("b"))) for n in range(MIN_COUNT)]
    for careless in (True, False):
        judged = []
        for group in groups:
            drawn = tuple(tuple(dice.random() if careless else float(k) for _ in range(4)) for k in range(2))
            judged.append(Judgement(group.prompt.id, tuple(sum(row) / 4 for row in drawn), verdicts=drawn))
        figures = audit(groups, judged, [])
        assert figures["num_repeated"] == 2 * MIN_COUNT
        assert [("is noise" in alarm) for alarm in figures["alarms"]] == [True] * careless


class Made(Lazy[object]):
    """Records that are made when they are asked for."""

    def __init__(self, count: int, make: Callable[[int], object]) -> None:
        self.count, self.make = count, make

    def __len__(self) -> int:
        return self.count

    def _item(self, place: int) -> object:
        return self.make(place)


def test_what_the_audit_of_several_verdicts_holds_does_not_grow_with_the_prompts() -> None:
    def judgement(n: int) -> Judgement:
        return Judgement(f"p{n}", (0.5,) * 4, verdicts=tuple((n + k + 0.25, n + k + 0.75, n / 7) for k in range(4)))

    def group(n: int) -> Group:
        return Group(Prompt(f"p{n}", ()), (1,), (Completion("a"),) * 4)

    peaks = []
    for count in (100, 100, 600):  # first what is imported and cached once
        tracemalloc.start()
        figures = audit(Made(count, group), Made(count, judgement), [])  # type: ignore[arg-type]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert figures["num_repeated"] == 4 * count
    assert (peaks[2] - peaks[1]) / 500 < 200  # bytes a prompt; its verdicts take 1000


@pytest.mark.parametrize(
    "verdicts", [((float("nan"),),), (3.0,), "ab", (("x",),)], ids=["nan", "flat", "text", "words"]
)
def test_verdicts_that_are_no_scores_are_refused_where_they_enter(verdicts: object) -> None:
    group = Group(Prompt("p", ()), (1,), (Completion("a"),))
    with pytest.raises(JudgeError, match="prompt p"):
        check_judgements([group], [Judgement("p", (1.0,), verdicts=verdicts)], "j")  # type: ignore[arg-type]
