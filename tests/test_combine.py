"""Several judges of the same completions: what their one score is, and when there is none."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfplay.errors import RecipeError
from selfplay.judges import make_judge
from selfplay.judges.combine import Combine, Combined, Member
from selfplay.judges.contract import judge_checked
from selfplay.protocols import JudgeContext
from selfplay.recipe import Recipe
from selfplay.recipe_file import check_recipe
from selfplay.types import Completion, Group, Judgement, Message, Prompt, prompt_id

Row = list[float | None]
SCORES = st.floats(-50, 50).map(lambda x: round(x, 3)) | st.none()
ROWS = st.integers(1, 6).flatmap(lambda n: st.lists(st.lists(SCORES, min_size=n, max_size=n), min_size=2, max_size=4))
NORMALIZE = ("none", "z_score", "rank")


class Says:
    """Gives fixed scores; where there is none it says why."""

    def __init__(self, name: str, row: Sequence[float | None]) -> None:
        self.identity = name
        self.row = tuple(row)

    def judge(self, groups: Sequence[Group], context: JudgeContext) -> list[Judgement]:
        notes = tuple(
            "" if score is not None else f"{self.identity} is silent\nabout {i}" for i, score in enumerate(self.row)
        )
        return [Judgement(group.prompt.id, self.row, notes, num_compared=3, num_flipped=1) for group in groups]


def group_of(count: int) -> Group:
    messages = (Message("user", "Say something."),)
    return Group(Prompt(prompt_id(messages), messages), (), tuple(Completion(f"text {n}") for n in range(count)))


def combined(rows: Sequence[Row], how: Any, normalize: Any, weights: Sequence[float] = ()) -> Judgement:
    members = [
        Member(f"m{n}", Says(f"judge {n}", row), w)
        for n, (row, w) in enumerate(zip(rows, weights or [1.0] * 9, strict=False))
    ]
    (found,) = judge_checked(Combine(members, how=how, normalize=normalize), [group_of(len(rows[0]))], JudgeContext())
    return found


@given(ROWS, st.sampled_from(["weighted_mean", "min"]), st.sampled_from(NORMALIZE))
def test_a_completion_has_a_score_where_every_member_gave_one_and_else_that_members_reason(
    rows: list[Row], how: str, normalize: str
) -> None:
    found = combined(rows, how, normalize)
    for i, score in enumerate(found.scores):
        silent = [n for n, row in enumerate(rows) if row[i] is None]
        assert (score is None) == bool(silent)
        if silent:
            assert found.notes[i].splitlines()[0] == f"no verdict of m{silent[0]}: judge {silent[0]} is silent"
        for n, row in enumerate(rows):
            shown = "no verdict" if row[i] is None else f"{row[i]:.6g}"
            assert f"m{n}: {shown}" in found.notes[i]
    assert (found.num_compared, found.num_flipped) == (3 * len(rows), len(rows))


@given(ROWS, st.lists(st.floats(0.01, 9), min_size=4, max_size=4))
def test_without_normalization_it_is_the_weighted_mean_or_the_smallest_of_the_scores(
    rows: list[Row], weights: list[float]
) -> None:
    mean, least = combined(rows, "weighted_mean", "none", weights), combined(rows, "min", "none")
    for i, score in enumerate(mean.scores):
        column = [row[i] for row in rows]
        if score is not None:
            numbers = [s for s in column if s is not None]
            wanted = sum(w * s for w, s in zip(weights, numbers, strict=False)) / sum(weights[: len(rows)])
            assert score == pytest.approx(wanted, abs=1e-9)
            assert least.scores[i] == min(numbers)


@given(ROWS, st.sampled_from(["z_score", "rank"]), st.floats(0.1, 20), st.floats(-9, 9))
def test_normalized_scores_know_no_scale(rows: list[Row], normalize: str, factor: float, shift: float) -> None:
    other = [[None if s is None else factor * s + shift for s in rows[0]], *rows[1:]]
    before, after = (combined(r, "weighted_mean", normalize) for r in (rows, other))
    for one, two in zip(before.scores, after.scores, strict=True):
        assert one is None if two is None else one == pytest.approx(two, abs=1e-5)


@given(ROWS, st.sampled_from(["weighted_mean", "min"]), st.sampled_from(NORMALIZE), st.randoms(use_true_random=False))
def test_the_order_of_completions_is_irrelevant(rows: list[Row], how: str, normalize: str, draw: random.Random) -> None:
    order = list(range(len(rows[0])))
    draw.shuffle(order)
    straight = combined(rows, how, normalize).scores
    shuffled = combined([[row[i] for i in order] for row in rows], how, normalize).scores
    for place, i in enumerate(order):
        assert shuffled[place] == (None if straight[i] is None else pytest.approx(straight[i], abs=1e-9))


def test_z_scores_and_ranks_of_one_member_twice_are_known() -> None:
    row: Row = [1.0, 3.0, 5.0, 3.0]
    deviation = math.sqrt(2)
    assert combined([row, row], "weighted_mean", "z_score").scores == pytest.approx(
        (-2 / deviation, 0, 2 / deviation, 0)
    )
    assert combined([row, row], "min", "rank").scores == pytest.approx((0, 0.5, 1, 0.5))
    assert combined([[2.0], [7.0]], "weighted_mean", "rank").scores == (0.5,)
    assert combined([[2.0, 2.0], [0.1, 0.1]], "weighted_mean", "z_score").scores == (0.0, 0.0)


def test_a_completion_that_one_member_did_not_judge_counts_for_none_of_the_ranks() -> None:
    rows: list[Row] = [[1.0, 2.0, 9.0], [1.0, 2.0, None]]
    assert combined(rows, "min", "rank").scores == (0.0, 1.0, None)


def test_a_combination_gives_neighbouring_groups_their_own_judgements_in_any_order() -> None:
    groups = [replace(group_of(1), prompt=Prompt(f"p{n}", ())) for n in range(7)]
    found = [[Judgement(f"p{n}", (float(n * m),)) for n in range(7)] for m in (1, 3)]
    judge = Combined(Combine([Member(name, Says(name, [0.0])) for name in "ab"], how="min", normalize="none"), found)
    for first, end in ((4, 7), (0, 2), (2, 4), (4, 7)):
        judged = judge.judge(groups[first:end], JudgeContext())
        assert [(j.prompt_id, j.scores) for j in judged] == [(f"p{n}", (float(n),)) for n in range(first, end)]


def test_the_identity_changes_with_anything_that_changes_a_score() -> None:
    def identity(how: Any = "weighted_mean", normalize: Any = "none", weight: float = 1.0, judge: str = "a") -> str:
        return Combine([Member("x", Says(judge, [1.0]), weight)], how=how, normalize=normalize).identity

    assert (
        len({identity(), identity(how="min"), identity(normalize="rank"), identity(weight=2.0), identity(judge="b")})
        == 5
    )


def recipe_with(judge: dict[str, Any], **sections: Any) -> Recipe:
    return check_recipe(
        {"model": "m", "prompts": {"source": "p.jsonl", "deal": "same"}, "judge": judge, **sections}, "r"
    )


RULES, COIN, LLM = {"kind": "verifier", "checks": []}, {"kind": "coin"}, {"kind": "llm"}


def combine(*judges: dict[str, Any], how: str = "weighted_mean", normalize: str = "none") -> dict[str, Any]:
    return {"kind": "combine", "how": how, "normalize": normalize, "judges": list(judges)}


@pytest.mark.parametrize(
    ("judge", "sections", "said"),
    [
        pytest.param(combine(RULES), {}, "judge.judges", id="one judge alone"),
        pytest.param(combine(RULES, RULES), {}, "the same judge is there twice", id="twice"),
        pytest.param(
            combine(RULES, {**COIN, "weight": 2.0}, how="min"), {}, "how: min reads no weight", id="weight of min"
        ),
        pytest.param(combine(RULES, combine(COIN, LLM)), {}, "no kind 'combine'", id="nested"),
        pytest.param(
            {k: v for k, v in combine(RULES, COIN).items() if k != "normalize"}, {}, "normalize: missing", id="unsaid"
        ),
        pytest.param(combine(RULES, {**COIN, "wieght": 1.0}), {}, "judge.judges.1.wieght: unknown key", id="misspelt"),
        pytest.param(combine(RULES, {**COIN, "weight": 0.0}), {}, "judge.judges.1.weight", id="no weight"),
        pytest.param(
            combine(RULES, COIN, normalize="rank"),
            {"pairs": {"kind": "correct_vs_incorrect"}},
            "normalize: none",
            id="correct",
        ),
        pytest.param(combine(RULES, LLM), {"pairs": {"kind": "win_rates"}}, "no win rates", id="win rates"),
        pytest.param(
            combine(RULES, LLM, normalize="z_score"),
            {"pairs": {"kind": "win_rates"}},
            "no win rates",
            id="z-scored win rates",
        ),
        pytest.param(
            COIN, {"evaluate": {"judge": combine(RULES, COIN, normalize="rank")}}, "measure a gain", id="relative panel"
        ),
    ],
)
def test_combinations_without_sense_are_refused_at_load(
    judge: dict[str, Any], sections: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_with(judge, **sections)
    assert said in str(caught.value)


def test_the_panel_takes_a_combination_only_where_it_measures() -> None:
    assert recipe_with(combine(RULES, COIN)).heldout_judge is not None
    assert recipe_with(combine(RULES, LLM)).heldout_judge is None  # the policy marks its own work
    assert recipe_with(combine(RULES, COIN, normalize="rank")).heldout_judge is None
    recipe_with(combine(RULES, COIN, normalize="rank"), pairs={"kind": "win_rates"})


def test_a_recipes_combination_asks_its_members_with_their_weights() -> None:
    asked = recipe_with(combine({**RULES, "checks": [{"kind": "words", "min": 2}], "weight": 3.0}, COIN)).judge
    assert asked is not None
    judge = make_judge(asked)
    assert isinstance(judge, Combine)
    assert [(member.name, member.weight) for member in judge.members] == [("verifier", 3.0), ("coin", 1.0)]
    (found,) = judge.judge([group_of(4)], JudgeContext(seed=3))
    (flips,) = judge.members[1].judge.judge([group_of(4)], JudgeContext(seed=3))
    assert found.scores == tuple((3 + (flip or 0)) / 4 for flip in flips.scores)


def test_equal_recipes_share_one_judge() -> None:
    made: dict[str, Any] = {}
    asked = recipe_with(combine({**RULES, "weight": 3.0}, COIN)).judge
    alone = recipe_with(COIN).judge
    assert asked is not None
    assert alone is not None
    both = make_judge(asked, made=made)
    assert isinstance(both, Combine)
    assert make_judge(alone, made=made) is both.members[1].judge
    assert make_judge(asked, made=made) is both
