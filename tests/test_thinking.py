"""Thinking that a server leaves in its text is no verdict."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_server import Server, says

from selfplay.errors import RecipeError
from selfplay.judges.api import ApiJudge
from selfplay.judges.template import load_template
from selfplay.judges.thinking import after_thinking
from selfplay.protocols import JudgeContext
from selfplay.recipe_file import check_recipe
from selfplay.recipe_judges import ApiJudgeRecipe
from selfplay.types import Completion, Group, Message, Prompt, prompt_id

TAGS = ["<think>", "</think>"]
MESSAGES = (Message("user", "name a bird"),)
GROUP = Group(Prompt(prompt_id(MESSAGES), MESSAGES), (1,), (Completion("a wren"),))


def judge_at(url: str, **fields: Any) -> ApiJudge:
    recipe = ApiJudgeRecipe.model_validate({"kind": "api", "base_url": url, "model": "m", "max_retries": 0} | fields)
    return ApiJudge(load_template(recipe.template, Path()), recipe, pause=0.001)


@pytest.mark.parametrize(
    ("text", "finish_reason", "score"),
    [
        ("<think>Perhaps\nScore: 1\nor not</think>\nGood.\nScore: 4", "stop", 4.0),
        ("Perhaps\nScore: 1\n</think>Score: 4", "stop", 4.0),  # the chat template has opened it
        ("Score: 4", "stop", 4.0),
        ("<think>Perhaps\nScore: 1", "stop", None),
        ("<think>Perhaps\nScore: 1\nor", "length", None),
        ("Perhaps\nScore: 1\nor", "length", None),
        ("Score: 2\n<think>\nScore: 2", "stop", None),
        ("<think>Score: 1</think>", "stop", None),
    ],
    ids=["closed", "opened unseen", "none", "open", "open and cut", "unseen and cut", "late", "nothing behind"],
)
def test_a_verdict_is_read_from_what_follows_the_thinking_and_there_is_none_without_its_end(
    text: str, finish_reason: str, score: float | None
) -> None:
    with Server(lambda asked: says(text, finish_reason=finish_reason)) as server:
        judgement = judge_at(server.url, reasoning_tags=TAGS).judge([GROUP], JudgeContext())[0]
        several = judge_at(server.url, reasoning_tags=TAGS, num_verdicts=2).judge([GROUP], JudgeContext())[0]
    assert judgement.scores == several.scores == (score,)
    assert (score is not None) or judgement.notes[0]
    assert several.verdicts == ((score, score),)


def test_constrained_verdicts_may_follow_thinking() -> None:
    with Server(lambda asked: says('<think>Hm.</think>{"verdict": "Score: 2"}')) as server:
        judged = [
            judge_at(server.url, verdict="constrained", **tags).judge([GROUP], JudgeContext())[0].scores
            for tags in ({}, {"reasoning_tags": TAGS})
        ]
    assert judged == [(None,), (2.0,)]


@pytest.mark.parametrize(
    ("text", "score"),
    [("Score: 4", 4.0), ("<think>Hm.</think>Score: 4", 4.0), ("<think>Score: 4", None), ("Score: 4 bu", None)],
    ids=["a choice", "thought before", "open", "unseen"],
)
def test_a_constrained_verdict_that_is_whole_counts_though_max_tokens_ended_it(text: str, score: float | None) -> None:
    with Server(lambda asked: says(text, finish_reason="length")) as server:
        judge = judge_at(server.url, verdict="constrained", reasoning_tags=TAGS)
        assert judge.judge([GROUP], JudgeContext())[0].scores == (score,)


@given(before=st.text(), after=st.text(), cut=st.booleans())
def test_no_word_of_the_thinking_is_left(before: str, after: str, cut: bool) -> None:
    before, after = (text.replace("think>", "") for text in (before, after))
    assert after_thinking(f"<think>{before}</think>{after}", TAGS, may_be_inside=cut) == after
    assert after_thinking(f"{after}<think>{before}", TAGS, may_be_inside=cut) is None


def test_how_thinking_is_read_is_part_of_the_identity() -> None:
    judges = [judge_at("http://127.0.0.1:1/v1", reasoning_tags=tags) for tags in (None, TAGS, ["<a>", "</a>"])]
    assert len({judge.identity for judge in judges}) == 3


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        ({"chat": {"reasoning_tags": ["<t>", "<t>"]}}, "judge.chat.reasoning_tags: the two are the same"),
        ({"chat": {"reasoning_tags": ["", "<t>"]}}, "judge.chat.reasoning_tags"),
        ({"chat": {"reasoning_tags": TAGS}, "verdict": "labels"}, "verdict: labels leaves no room for thinking"),
        ({"chat": {"reasoning_tags": TAGS}, "verdict": "constrained"}, "constrained leaves no room for thinking"),
    ],
    ids=["the same", "empty", "labels", "constrained"],
)
def test_senseless_tags_of_a_judge_model_are_refused(judge: dict[str, Any], words: str) -> None:
    data = {
        "model": "m",
        "prompts": {"source": "p", "deal": "same"},
        "judge": {"kind": "llm", "model": "other"} | judge,
    }
    with pytest.raises(RecipeError, match=words):
        check_recipe(data, "r.yaml")


def test_two_equal_tags_of_the_policy_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"chat\.reasoning_tags: the two are the same"):
        check_recipe({"model": "m", "chat": {"reasoning_tags": ["<t>", "<t>"]}}, "r.yaml")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"reasoning_tags": ["<think>"]}, "judge.reasoning_tags"),
        ({"reasoning_tags": ["<think>", ""]}, "judge.reasoning_tags"),
        ({"reasoning_tags": ["<think>", "<think>"]}, "the two are the same"),
        ({"reasoning_tags": TAGS, "verdict": "labels"}, "labels reads the first token"),
    ],
    ids=["one", "empty", "the same", "labels"],
)
def test_senseless_tags_are_refused(fields: dict[str, Any], words: str) -> None:
    judge = {"kind": "api", "base_url": "https://judge.example/v1", "model": "m"} | fields
    with pytest.raises(RecipeError, match=words):
        check_recipe({"model": "m", "prompts": {"source": "p", "deal": "same"}, "judge": judge}, "r.yaml")
