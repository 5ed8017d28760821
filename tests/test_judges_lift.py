"""Functions as judges: what a score means, what a swap undoes, what never becomes a number."""

import asyncio
import functools
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfplay.errors import JudgeError
from selfplay.judges.lift import pairwise, pointwise
from selfplay.protocols import Judge, JudgeContext
from selfplay.types import Completion, Group, Message, Prompt, prompt_id

CONTEXT = JudgeContext()


def make_group(*texts: str, ask: str = "say something") -> Group:
    messages = (Message("user", ask),)
    return Group(Prompt(prompt_id(messages), messages), (1, 2), tuple(Completion(text) for text in texts))


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
def test_progress_is_told_call_by_call(is_async):
    async def later(prompt, *completions):
        return 1.0

    groups = [make_group("a", "b", "c"), make_group("d", "e", ask="again")]
    function = later if is_async else lambda prompt, *completions: 1.0
    for lift, total in ((pointwise, 5), (pairwise, 8)):
        judge, told = lift(function), []
        judge.judge(groups, JudgeContext(progress=told.append))
        assert judge.count_verdicts(groups) == total
        assert told == list(range(1, total + 1))


groups_of_texts = st.lists(
    st.lists(st.text("abc", max_size=4), min_size=1, max_size=5).map(lambda texts: make_group(*texts)),
    max_size=4,
).map(lambda groups: [replace(g, prompt=replace(g.prompt, id=f"{g.prompt.id}{n}")) for n, g in enumerate(groups)])


@pointwise
def length(prompt, completion):
    return len(completion.text) if completion.text else None


@pairwise
def prefers_long(prompt, a, b):
    """Not symmetric: it favours whatever stands first."""
    if not a.text and not b.text:
        return None
    return min(1.0, (len(a.text) + 1) / (len(a.text) + len(b.text) + 1))


def test_a_pointwise_function_scores_each_completion_and_can_still_be_called():
    group = make_group("one", "", "three")
    judgement = length.judge([group], CONTEXT)[0]
    assert judgement.scores == (3.0, None, 5.0)
    assert judgement.notes[1]
    assert judgement.notes[0] == ""
    assert length(group.prompt, group.completions[2]) == 5
    assert length.__name__ == "length"
    assert isinstance(length, Judge)


def test_decorators_take_a_name_in_parentheses():
    @pointwise(name="mine")
    def f(prompt, completion):
        return 1.0

    @pairwise(name="also mine")
    def g(prompt, a, b):
        return 0.5

    assert f.identity.startswith("pointwise:mine@")
    assert g.identity.startswith("pairwise:also mine@")
    assert f.judge([make_group("x")], CONTEXT)[0].scores == (1.0,)


@pytest.mark.parametrize("judge", [length, prefers_long])
@given(groups=groups_of_texts, seed=st.integers(0, 99))
def test_the_order_of_groups_is_irrelevant(judge, groups, seed):
    shuffled = random.Random(seed).sample(groups, len(groups))
    found = {j.prompt_id: j for j in judge.judge(shuffled, CONTEXT)}
    assert [found[g.prompt.id] for g in groups] == judge.judge(groups, CONTEXT)


@pytest.mark.parametrize("judge", [length, prefers_long])
@given(texts=st.lists(st.text("abc", max_size=4), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_the_order_of_completions_is_irrelevant(judge, texts, seed):
    order = random.Random(seed).sample(range(len(texts)), len(texts))
    straight = judge.judge([make_group(*texts)], CONTEXT)[0]
    shuffled = judge.judge([make_group(*(texts[i] for i in order))], CONTEXT)[0]
    assert shuffled.scores == tuple(straight.scores[i] for i in order)
    assert shuffled.notes == tuple(straight.notes[i] for i in order)


@pytest.mark.parametrize("always", [1.0, 0.0, 0.7, 0.2])
@given(texts=st.lists(st.text(max_size=3), min_size=2, max_size=5))
def test_a_pairwise_judge_that_always_says_the_same_place_gives_only_ties(always, texts):
    judge = pairwise(lambda prompt, a, b: always)
    judgement = judge.judge([make_group(*texts)], CONTEXT)[0]
    assert judgement.scores == (0.5,) * len(texts)
    assert all("changed with the order" in note for note in judgement.notes)


def test_a_pairwise_judge_is_asked_in_both_orders_and_the_swap_is_undone():
    asked = []

    @pairwise
    def judge(prompt, a, b):
        asked.append((a.text, b.text))
        return {("x", "y"): 0.9, ("y", "x"): 0.3, ("x", "z"): 1.0, ("z", "x"): 0.0, ("y", "z"): 0.5, ("z", "y"): 0.1}[
            asked[-1]
        ]

    scores = judge.judge([make_group("x", "y", "z")], CONTEXT)[0].scores
    assert sorted(asked) == [("x", "y"), ("x", "z"), ("y", "x"), ("y", "z"), ("z", "x"), ("z", "y")]
    assert scores == pytest.approx(((0.8 + 1.0) / 2, (0.2 + 0.7) / 2, (0.0 + 0.3) / 2))


def test_a_comparison_without_a_verdict_in_either_order_is_left_out():
    def lazy(prompt, a, b):
        return None if (a.text, b.text) in (("a", "c"), ("b", "c"), ("c", "b")) else float(a.text < b.text)

    judgement = pairwise(lazy).judge([make_group("a", "b", "c")], CONTEXT)[0]
    assert judgement.scores == (1.0, 0.0, None)
    assert "1 of 2 comparisons without a verdict" in judgement.notes[0]
    assert "both orders" in judgement.notes[2]


def test_a_single_completion_has_nothing_to_be_compared_with():
    judgement = prefers_long.judge([make_group("alone")], CONTEXT)[0]
    assert judgement.scores == (None,)
    assert judgement.notes[0]


@given(texts=st.lists(st.sampled_from(["", "x", "yy"]), min_size=1, max_size=5))
def test_none_is_never_a_number(texts):
    pointwise_scores = length.judge([make_group(*texts)], CONTEXT)[0].scores
    assert [score is None for score in pointwise_scores] == [not text for text in texts]
    nothing = pairwise(lambda prompt, a, b: None).judge([make_group(*texts)], CONTEXT)[0]
    assert nothing.scores == (None,) * len(texts)
    assert all(nothing.notes)


def test_an_exception_names_the_prompt_and_the_completion_and_keeps_its_cause():
    @pointwise
    def broken(prompt, completion):
        return 1 / (len(completion.text) - 3)

    group = make_group("a", "abc")
    with pytest.raises(JudgeError, match=rf"prompt {group.prompt.id}, completion 1: ZeroDivisionError") as caught:
        broken.judge([group], CONTEXT)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_function_that_leaves_the_program_is_an_error_of_the_judge():
    def leave(prompt, a, b):
        raise SystemExit(0)

    with pytest.raises(JudgeError, match="completion 0 against 1: SystemExit"):
        pairwise(leave).judge([make_group("a", "b")], CONTEXT)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "3", 1j, [1.0]])
def test_a_value_that_is_no_score_is_refused_with_its_place(value):
    with pytest.raises(JudgeError, match="completion 0"):
        pointwise(lambda prompt, completion: value).judge([make_group("a")], CONTEXT)


@pytest.mark.parametrize("value", [1.01, -0.01, 2, float("nan")])
def test_a_pairwise_value_must_be_a_probability(value):
    with pytest.raises(JudgeError, match="completion 0 against 1"):
        pairwise(lambda prompt, a, b: value).judge([make_group("a", "b")], CONTEXT)


def test_async_functions_run_side_by_side_up_to_the_limit_and_keep_their_order():
    running, most = 0, 0

    @pointwise(max_concurrency=3)
    async def judge(prompt, completion):
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(len(completion.text)):  # later ones finish first
            await asyncio.sleep(0)
        running -= 1
        return len(completion.text)

    texts = ["x" * n for n in range(12, 0, -1)]
    judgement = judge.judge([make_group(*texts)], CONTEXT)[0]
    assert judgement.scores == tuple(range(12, 0, -1))
    assert most == 3


def test_async_judges_work_inside_a_running_event_loop():
    @pairwise
    async def judge(prompt, a, b):
        return float(a.text > b.text)

    async def notebook():
        return judge.judge([make_group("a", "b")], CONTEXT)

    assert asyncio.run(notebook())[0].scores == (0.0, 1.0)


def test_an_async_exception_names_its_completion():
    @pointwise
    async def judge(prompt, completion):
        raise KeyError(completion.text)

    with pytest.raises(JudgeError, match="completion 0: KeyError"):
        judge.judge([make_group("a", "b")], CONTEXT)


def scaled(factor):
    return pointwise(lambda prompt, completion: factor * len(completion.text))


class Threshold:
    def __init__(self, least):
        self.least = least

    def __call__(self, prompt, completion):
        return len(completion.text) >= self.least


def at_least(least, prompt, completion):
    return len(completion.text) >= least


def built_without_source(body):
    space = {}
    exec(f"def f(prompt, completion): return {body}", space)
    return space["f"]


def both_on_one_line():
    return pointwise(lambda prompt, completion: 1.0), pointwise(lambda prompt, completion: 2.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (scaled(1), scaled(2)),
        (pointwise(Threshold(1)), pointwise(Threshold(2))),
        (pointwise(functools.partial(at_least, 1)), pointwise(functools.partial(at_least, 2))),
        (pointwise(built_without_source("1")), pointwise(built_without_source("2"))),
        both_on_one_line(),
        (pointwise(at_least), pairwise(at_least)),
    ],
    ids=["closure", "object", "partial", "no source", "two lambdas on a line", "kind"],
)
def test_an_identity_differs_where_the_verdicts_could(one, other):
    assert one.identity != other.identity


def test_an_identity_stays_the_same_for_the_same_function():
    assert scaled(3).identity == scaled(3).identity
    assert pointwise(Threshold(1)).identity == pointwise(Threshold(1)).identity
    assert pointwise(at_least).identity == pointwise(at_least).identity
    assert "test_judges_lift.at_least@" in pointwise(at_least).identity
    assert pointwise(max).identity == pointwise(max).identity


def test_a_function_that_names_itself_can_be_a_judge():
    @pointwise
    def judge(prompt, completion):
        shorter = Completion(completion.text[1:])
        return 1 + judge(prompt, shorter) if completion.text else 0

    assert judge.judge([make_group("abcd")], CONTEXT)[0].scores == (4.0,)
