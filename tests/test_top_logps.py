"""Verdicts from the few log-probabilities that an endpoint lists: what is not listed is never guessed."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_server import Act, Asked, Server, http, says

from selfplay.errors import JudgeError
from selfplay.judges.api import ApiJudge
from selfplay.judges.template import parse_template
from selfplay.judges.top_logps import MAX_UNSEEN, score_from_top
from selfplay.protocols import JudgeContext
from selfplay.recipe_judges import ApiJudgeRecipe
from selfplay.types import Completion, Group, Message, Prompt, prompt_id

YES_NO = {"yes": 1.0, "no": 0.0}


def listed(**masses: float) -> list[tuple[str, float]]:
    return [(token, math.log(mass)) for token, mass in masses.items()]


def test_the_score_is_the_expected_value_over_the_listed_labels() -> None:
    found = score_from_top(listed(yes=0.6, no=0.2, maybe=0.1), YES_NO)
    assert found.score == pytest.approx(0.75)
    assert "0.80" in found.note


def test_white_space_around_a_token_is_no_part_of_its_text() -> None:
    top = [(" yes", math.log(0.3)), ("yes", math.log(0.3)), ("\nno", math.log(0.3)), ("x", math.log(1e-4))]
    assert score_from_top(top, YES_NO).score == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("top", "words"),
    [
        ([], "lists no log-probabilities"),
        (listed(maybe=0.9, perhaps=0.05), "no label is among"),
        ([("yes", -math.inf), ("no", -9999.0)], "no label is among"),
        (listed(yes=1e-4, no=1e-4, maybe=0.9), "less than 0.01 probability"),
        # "no" may be as probable as the last one listed
        (listed(yes=0.3, maybe=0.1), "may be in what the server does not list"),
        # "no" can be spelled "n", "o"
        (listed(yes=0.3, n=0.3, maybe=1e-5), "may be in what the server does not list"),
        ([("yes", math.nan), ("no", -1.0)], "probabilities are none"),
        ([("yes", 0.5), ("no", -1.0)], "probabilities are none"),
        ([("yes", 1e300), ("no", -1.0)], "probabilities are none"),
    ],
    ids=["nothing", "no label", "impossible", "little mass", "one unseen", "pieces", "nan", "above 1", "huge"],
)
def test_what_is_not_covered_gives_no_verdict_and_never_a_number(top: list[tuple[str, float]], words: str) -> None:
    found = score_from_top(top, YES_NO, 0.01)
    assert found.score is None
    assert words in found.note


@given(
    masses=st.lists(st.floats(1e-6, 1.0), min_size=4, max_size=12),
    values=st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    count=st.integers(1, 12),
)
def test_a_verdict_from_a_part_of_the_list_is_near_the_one_from_all_of_it(
    masses: list[float], values: list[float], count: int
) -> None:
    labels = dict(zip(("La", "Lb", "Lc", "Ld"), values, strict=True))
    names = [*labels, *(f"x{n}" for n in range(len(masses) - 4))]
    total = math.fsum(masses)
    whole = sorted(((n, m / total) for n, m in zip(names, masses, strict=True)), key=lambda pair: -pair[1])
    mass = math.fsum(m for n, m in whole if n in labels)
    exact = math.fsum(m * labels[n] for n, m in whole if n in labels) / mass
    found = score_from_top([(n, math.log(m)) for n, m in whole[:count]], labels)
    if count >= len(whole):
        assert found.score == pytest.approx(exact)
    elif found.score is not None:
        assert abs(found.score - exact) <= MAX_UNSEEN * (max(values) - min(values)) + 1e-9


TEMPLATE = parse_template(
    "---\nname: t\nversion: 1\nmode: pairwise\nlabels: {A: 1, B: 0}\nmin_label_mass: 0.01\n---\n"
    "[user]\n{completion_a} or {completion_b}?",
    where="t",
    digest="d",
)


def listing(top: Any) -> Act:
    first = {"token": "A", "top_logprobs": top}
    choice = {"message": {"content": "A"}, "finish_reason": "length", "logprobs": {"content": [first]}}
    return http(200, json.dumps({"choices": [choice]}).encode(), Content_Type="application/json")


def prefers_wrens(asked: Asked) -> Act:
    first = asked.text.partition(" or ")[0]
    a = 0.75 if "wren" in first else 0.25
    return listing([{"token": t, "logprob": math.log(m)} for t, m in (("A", a), ("B", 0.9 - a), ("The", 0.01))])


def judge_at(url: str, **fields: Any) -> ApiJudge:
    data = {"kind": "api", "base_url": url, "model": "m", "verdict": "labels", "max_retries": 0} | fields
    return ApiJudge(TEMPLATE, ApiJudgeRecipe.model_validate(data), pause=0.001)


def group_of(*texts: str, ask: str = "name a bird") -> Group:
    messages = (Message("user", ask),)
    return Group(Prompt(prompt_id(messages), messages), (1,), tuple(Completion(text) for text in texts))


def test_an_endpoint_gives_the_probability_that_a_beats_b_and_the_swap_is_undone() -> None:
    with Server(prefers_wrens) as server:
        judge = judge_at(server.url, top_logprobs=7)
        judgement = judge.judge([group_of("a wren", "an owl")], JudgeContext())[0]
    forth, back = 0.75 / 0.9, 0.25 / 0.9
    assert judgement.scores == pytest.approx(((forth + 1 - back) / 2, (back + 1 - forth) / 2))
    for asked in server.asked:
        body = asked.body
        assert (body["logprobs"], body["top_logprobs"], body["max_tokens"], body["temperature"]) == (True, 7, 1, 0.0)
    assert judge.identity != judge_at(server.url).identity


def test_log_probabilities_are_kept_with_the_replies_and_not_asked_for_twice(tmp_path: Any) -> None:
    with Server(prefers_wrens) as server:
        found = []
        for _ in range(2):
            judge = judge_at(server.url)
            with judge.stage(tmp_path, lambda note: None):
                found.append(judge.judge([group_of("a wren", "an owl")], JudgeContext()))
        assert found[0] == found[1]
        assert len(server.asked) == 2


def test_a_server_without_log_probabilities_stops_the_stage_with_the_reason() -> None:
    with Server(lambda asked: says("A")) as server, pytest.raises(JudgeError, match="gives no log-probabilities"):
        judge_at(server.url).judge([group_of("a", "b")], JudgeContext())


@pytest.mark.parametrize(
    "top",
    [[], None, [{"token": "A"}], [{"token": 3, "logprob": 0.0}], "A"],
    ids=["empty", "null", "half", "no text", "text"],
)
def test_a_garbled_list_is_none_with_a_note_and_other_rows_are_kept(top: Any) -> None:
    groups = [group_of("a wren", "an owl"), group_of("x", "y", ask="other")]
    with Server(lambda asked: listing(top) if "x" in asked.text else prefers_wrens(asked)) as server:
        good, bad = judge_at(server.url).judge(groups, JudgeContext())
    assert None not in good.scores
    assert bad.scores == (None, None)
    assert "log-probabilities" in bad.notes[0]
