"""What a judge hands back is checked where it enters."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfplay.errors import JudgeError, RecipeError, UnparsedGateError
from selfplay.judges.contract import check_judgements, check_unparsed, judge_checked
from selfplay.judges.lift import pointwise
from selfplay.judges.unparsed import count_verdicts
from selfplay.protocols import JudgeContext
from selfplay.types import Completion, Group, Judgement, Message, Prompt

CONTEXT = JudgeContext()
PROMPT = Prompt("p1", (Message("user", "hello"),), checks=({"kind": "x", "words": ["a"]},), meta={"n": [1]})
GROUP = Group(PROMPT, (1,), (Completion("a"), Completion("b")))
OTHER = replace(GROUP, prompt=replace(PROMPT, id="p2"))


class Fixed:
    identity = "fixed"

    def __init__(self, judgements):
        self.judgements = judgements

    def judge(self, groups, context):
        return self.judgements


@pytest.mark.parametrize(
    ("given_score", "wanted"),
    [
        (None, None),
        (True, 1.0),
        (False, 0.0),
        (3, 3.0),
        (np.float32(0.5), 0.5),
        (np.int64(2), 2.0),
        (np.bool_(True), 1.0),
        (np.float64(1.5), 1.5),
    ],
)
def test_scores_become_plain_floats_or_none(given_score, wanted):
    checked = check_judgements([GROUP], [Judgement("p1", (given_score, None))], "j")[0]
    assert checked.scores == (wanted, None)
    assert type(checked.scores[0]) in (float, type(None))
    assert checked.notes == ("", "")


@pytest.mark.parametrize(
    "bad",
    [
        float("nan"),
        float("inf"),
        -float("inf"),
        np.float32("nan"),
        10**400,
        "3",
        "",
        1j,
        [1],
        np.array([1.0]),
        pytest.param(object(), id="an object"),
    ],
    ids=repr,
)
def test_a_score_that_is_no_finite_number_is_refused_naming_the_prompt(bad):
    with pytest.raises(JudgeError, match="prompt p1, completion 1"):
        check_judgements([GROUP], [Judgement("p1", (1.0, bad))], "j")


@pytest.mark.parametrize(
    ("judgements", "said"),
    [
        (None, "expected a list"),
        ("no", "expected a list"),
        ({}, "expected a list"),
        ((j for j in ()), "found generator"),
        ([], "0 judgements for 2 groups"),
        ([Judgement("p1", (1.0, 2.0))] * 3, "3 judgements for 2 groups"),
        ([Judgement("p2", (1.0, 2.0)), Judgement("p1", (1.0, 2.0))], "prompt p1.*'p2'"),
        ([Judgement("p1", (1.0,)), Judgement("p2", (1.0, 2.0))], "prompt p1: 1 scores for 2"),
        ([Judgement("p1", (1.0, 2.0)), Judgement("p2", (1.0, 2.0, 3.0))], "prompt p2: 3 scores for 2"),
        ([Judgement("p1", (1.0, 2.0)), (1.0, 2.0)], "prompt p2: expected a Judgement"),
        ([Judgement("p1", 1.0), Judgement("p2", (1.0, 2.0))], "prompt p1: `scores`"),
        ([Judgement("p1", (1.0, 2.0), "ok"), Judgement("p2", (1.0, 2.0))], "prompt p1: `notes`"),
        ([Judgement("p1", (1.0, 2.0), ("", "", "")), Judgement("p2", (1.0, 2.0))], "3 notes for 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_shape_is_refused_naming_judge_and_prompt(judgements, said):
    with pytest.raises(JudgeError, match=said) as caught:
        check_judgements([GROUP, OTHER], judgements, "my judge")
    assert "my judge" in str(caught.value)


def test_notes_are_padded():
    checked = check_judgements([GROUP], [Judgement("p1", (None, 1.0), ("why",))], "j")[0]
    assert checked.notes == ("why", "")


def test_a_judge_that_edits_a_prompt_is_refused_and_the_prompt_stays_as_it_was():
    @pointwise
    def vandal(prompt, completion):
        prompt.checks[0]["words"].append("b")
        return 1.0

    with pytest.raises(JudgeError, match="changed the prompt p1"):
        judge_checked(vandal, [GROUP], CONTEXT)
    assert GROUP.prompt.checks == ({"kind": "x", "words": ["a"]},)


def test_a_judge_that_edits_the_list_of_groups_changes_nothing():
    class Popper(Fixed):
        def judge(self, groups, context):
            groups.clear()
            return self.judgements

    given_groups = [GROUP]
    assert judge_checked(Popper([Judgement("p1", (1, 2))]), given_groups, CONTEXT)[0].scores == (1.0, 2.0)
    assert given_groups == [GROUP]


def test_a_judge_that_raises_is_named_with_its_prompts_and_its_cause():
    class Broken(Fixed):
        def judge(self, groups, context):
            raise OSError("no route")

    with pytest.raises(JudgeError, match="judge fixed raised on prompts p1, p2: OSError: no route") as caught:
        judge_checked(Broken(None), [GROUP, OTHER], CONTEXT)
    assert isinstance(caught.value.__cause__, OSError)


def test_errors_of_our_own_keep_their_kind():
    class Misconfigured(Fixed):
        def judge(self, groups, context):
            raise RecipeError("judge.template: ...")

    with pytest.raises(RecipeError):
        judge_checked(Misconfigured(None), [GROUP], CONTEXT)


@pytest.mark.parametrize("identity", ["", None, 3])
def test_a_judge_needs_an_identity(identity):
    judge = Fixed([Judgement("p1", (1, 2))])
    judge.identity = identity
    with pytest.raises(JudgeError, match="identity"):
        judge_checked(judge, [GROUP], CONTEXT)


@given(st.lists(st.lists(st.sampled_from([None, 0.0, 1.0]), max_size=4), max_size=5))
def test_of_one_verdict_for_each_completion_none_is_missing_and_nothing_else(rows):
    scores = [score for row in rows for score in row]
    counted = count_verdicts([Judgement("p", tuple(row)) for row in rows])
    share = scores.count(None) / len(scores) if scores else 0.0
    assert counted.unparsed_share == counted.unscored_share == share


def test_the_gate_opens_at_the_limit_and_closes_above_it():
    def judgements(num_missing):
        return [Judgement("p", (None,) * num_missing + (0.0,) * (100 - num_missing))]

    check_unparsed(judgements(4), 0.05)
    check_unparsed(judgements(5), 0.05)
    with pytest.raises(UnparsedGateError, match=r"6\.0%.*5\.0%"):
        check_unparsed(judgements(6), 0.05)
    check_unparsed(judgements(100), 1.0)
    check_unparsed([], 0.0)


def test_the_gate_shows_the_three_most_frequent_reasons_without_their_details():
    notes = ["cut\n'a'", "cut\n'b'", "cut", "empty", "empty", "far\nout", "far", "rare"]
    with pytest.raises(UnparsedGateError) as caught:
        check_unparsed([Judgement("p", (None,) * 8, tuple(notes))], 0.5, judge_identity="llm:policy")
    message = str(caught.value)
    assert "3 x cut" in message
    assert "2 x empty" in message
    assert "2 x far" in message
    assert "rare" not in message
    assert "'a'" not in message
    assert "llm:policy" in message
    assert "max_unparsed" in message


def test_the_gate_counts_missing_notes_too():
    with pytest.raises(UnparsedGateError, match="2 x no reason given"):
        check_unparsed([Judgement("p", (None, None))], 0.0)
