"""Every pairing strategy: what holds for all, and what each alone promises."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from test_pairs import SCORE, TEXT, group_of

from selfplay.errors import DataError, SelfplayError
from selfplay.pairs import (
    AllAboveMargin,
    BestVsRandom,
    BestVsWorst,
    CorrectVsIncorrect,
    GoldVsCompletion,
    TopKVsBottomK,
    WinRates,
    make_selector,
    select_pairs,
)
from selfplay.protocols import PairSelector
from selfplay.recipe_pairs import PairsRecipe
from selfplay.recipe_values import Section
from selfplay.types import Group, Judgement, PreferencePair

Make = Callable[[float, Any], Any]
# By name: a selector with this margin and this treatment of truncated completions, and the most pairs of one prompt.
SCORED: dict[str, tuple[Make, int]] = {
    "best_vs_worst": (lambda m, cut: BestVsWorst(m, 2, cut), 2),
    "best_vs_worst, rho 0.3": (lambda m, cut: BestVsWorst(m, 2, cut, length_rho=0.3, seed=5), 2),
    "best_vs_random": (lambda m, cut: BestVsRandom(m, 2, cut, seed=5), 2),
    "top_k_vs_bottom_k": (lambda m, cut: TopKVsBottomK(2, m, None, cut, seed=5), 4),
    "all_above_margin": (lambda m, cut: AllAboveMargin(m, None, cut, seed=5), 15),
    "all_above_margin, 3 pairs": (lambda m, cut: AllAboveMargin(m, 3, cut, seed=5), 3),
    "win_rates, order": (lambda m, cut: WinRates("order", BestVsWorst(m, 1, cut)), 1),
    "win_rates, bradley_terry": (lambda m, cut: WinRates("bradley_terry", BestVsWorst(m, 2, cut)), 2),
    "win_rates, scores": (lambda m, cut: WinRates("scores", BestVsWorst(m, 2, cut)), 2),
}
STRATEGIES = {
    **{name: make for name, (make, _) in SCORED.items()},
    "correct_vs_incorrect": lambda m, cut: CorrectVsIncorrect(0.5, 3, truncated=cut, seed=5),
    "correct_vs_incorrect, gold": lambda m, cut: CorrectVsIncorrect(0.5, 3, add_gold=True, truncated=cut, seed=5),
    "gold_vs_completion": lambda m, cut: GoldVsCompletion(2, "rejected" if cut == "judged" else cut, seed=5),
}
CUTS = ("drop", "judged")


@st.composite
def judged(draw: st.DrawFn) -> tuple[Group, Judgement]:
    """A group with a gold answer, and scores; some completions are equal, empty, truncated or without a verdict."""
    texts = draw(st.lists(TEXT, min_size=1, max_size=6))
    group = group_of(
        texts, gold=draw(st.sampled_from(["gold", "a", "b"])), cut=sorted(draw(st.sets(st.integers(0, 5))))
    )
    return group, Judgement("p", tuple(draw(st.lists(SCORE, min_size=len(texts), max_size=len(texts)))))


def as_read(name: str, judgement: Judgement) -> Judgement:
    """The judgement as this strategy reads one: as win rates in [0, 1], equal where the scores are, or as it is."""
    if name != "win_rates, scores":
        return judgement
    return Judgement(judgement.prompt_id, tuple(None if s is None else (s + 10) / 20 for s in judgement.scores))


def check_common(group: Group, judgement: Judgement, pairs: Sequence[PreferencePair], cut: str) -> None:
    """What holds for every pair of every strategy."""
    for pair in pairs:
        assert (pair.prompt, pair.prompt_token_ids) == (group.prompt.messages, group.prompt_token_ids)
        assert pair.chosen[0].content.strip() != pair.rejected[0].content.strip()
        assert pair.rejected_index is not None
        for index, ids in ((pair.chosen_index, pair.chosen_token_ids), (pair.rejected_index, pair.rejected_token_ids)):
            completion = group.gold if index is None else group.completions[index]
            assert completion is not None
            assert completion.text
            assert completion.token_ids == ids
        indices = [i for i in (pair.chosen_index, pair.rejected_index) if i is not None]
        assert cut == "judged" or all(group.completions[i].finish_reason == "stop" for i in indices)
    texts = [(pair.chosen, pair.rejected) for pair in pairs]
    assert len(texts) == len(set(texts)), "the same two texts make one pair"


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", SCORED)
@given(case=judged(), margin=st.sampled_from([0.0, 0.3, 2.0]))
def test_a_scored_pair_reaches_the_margin_and_has_two_verdicts(
    name: str, cut: str, case: tuple[Group, Judgement], margin: float
) -> None:
    group, judgement, (make, most) = case[0], as_read(name, case[1]), SCORED[name]
    pairs = make(margin, cut).select(group, judgement)
    check_common(group, judgement, pairs, cut)
    assert len(pairs) <= most
    for pair in pairs:
        scores = judgement.scores[pair.chosen_index], judgement.scores[pair.rejected_index]
        assert None not in scores
        assert (pair.chosen_score, pair.rejected_score) == scores
        assert pair.margin > 0
        assert pair.margin >= margin - 1e-6


@pytest.mark.parametrize("name", STRATEGIES)
@given(cases=st.lists(judged(), max_size=4))
def test_every_prompt_gives_pairs_or_a_reason(name: str, cases: list[tuple[Group, Judgement]]) -> None:
    groups = [
        dataclasses.replace(g, prompt=dataclasses.replace(g.prompt, id=f"p{n}")) for n, (g, _) in enumerate(cases)
    ]
    judgements = [Judgement(f"p{n}", as_read(name, j).scores) for n, (_, j) in enumerate(cases)]
    judged_by = None if name == "gold_vs_completion" else judgements
    found = select_pairs(STRATEGIES[name](0.0, "drop"), groups, judged_by, round=2, judge="j")
    paired = {pair.prompt_id for pair in found.pairs}
    assert sorted([*paired, *(drop.id for drop in found.drops)]) == [group.prompt.id for group in groups]
    assert all(drop.reason for drop in found.drops)
    assert {(pair.origin_round, pair.judge) for pair in found.pairs} <= {(2, "j")}


def paired(selector: PairSelector, scores: Sequence[float | None], texts: Sequence[str] | None = None) -> list[Any]:
    """(chosen, rejected) indices for completions with these scores, of one letter each unless texts are given."""
    group = group_of(texts if texts is not None else [chr(97 + n) for n in range(len(scores))], gold="gold")
    return [(p.chosen_index, p.rejected_index) for p in selector.select(group, Judgement("p", tuple(scores)))]


def test_length_control_takes_the_shortest_good_one_and_the_longest_bad_one() -> None:
    scores, texts = (10.0, 9.0, 5.0, 1.0, 0.0), ["aaaaaaa", "bb", "ccc", "dddddd", "e"]
    # rho 0.2: at least 8 may be chosen, at most 2 may be rejected
    assert paired(BestVsWorst(length_rho=0.2), scores, texts) == [(1, 3)]
    assert paired(BestVsWorst(length_rho=0.0), scores, texts) == [(0, 4)]
    assert paired(BestVsWorst(length_rho=0.2, max_pairs_per_prompt=9), scores, texts) == [(1, 3), (0, 4)]
    assert paired(BestVsWorst(min_margin=9.5, length_rho=0.2), scores, texts) == [(0, 4)]


RHOS = tuple(Fraction(rho) for rho in ("0", "0.1", "0.2", "0.25", "0.3", "0.32", "0.4", "0.49"))


@st.composite
def means(draw: st.DrawFn) -> tuple[list[str], list[Fraction]]:
    """Texts of a few lengths, and their scores: means of some verdicts on 0..5."""
    count = draw(st.sampled_from([1, 3, 5, 11]))
    texts = draw(st.lists(st.sampled_from(["a", "bb", "cc", "ddd", "e" * 9]), min_size=2, max_size=5))
    sums = draw(st.lists(st.integers(0, 5 * count), min_size=len(texts), max_size=len(texts)))
    return texts, [Fraction(one, count) for one in sums]


@given(case=means(), rho=st.sampled_from(RHOS))
@example(case=(["aa", "bb", "c" * 20], [Fraction(48, 11), Fraction(23, 11), Fraction(31, 11)]), rho=Fraction("0.32"))
@example(case=(["a" * 30, "bb", "c"], [Fraction(3), Fraction(1), Fraction("2.8")]), rho=Fraction("0.1"))
def test_length_control_is_the_published_rule(case: tuple[list[str], list[Fraction]], rho: Fraction) -> None:
    texts, exact = case
    group, judgement = group_of(texts), Judgement("p", tuple(map(float, exact)))
    found = _plain(group, judgement)
    pairs = BestVsWorst(length_rho=float(rho)).select(group, judgement)
    top, bottom = max(exact[i] for i in found), min(exact[i] for i in found)
    if top == bottom:
        assert pairs == []
        return
    good = [len(texts[i]) for i in found if exact[i] >= (1 - rho) * top + rho * bottom]
    bad = [len(texts[i]) for i in found if exact[i] <= (1 - rho) * bottom + rho * top]
    (pair,) = pairs
    assert (len(pair.chosen[0].content), len(pair.rejected[0].content)) == (min(good), max(bad))


@pytest.mark.parametrize("count", [1, 3, 5, 11], ids="{} verdicts".format)
def test_a_score_exactly_on_a_threshold_of_length_control_is_inside(count: int) -> None:
    num_on = 0
    for best, worst, rho in product(range(5 * count + 1), range(5 * count + 1), RHOS):
        on = Fraction(worst) + rho * (best - worst)  # of sums: the bound of those that may be rejected
        if best <= worst or not rho or on.denominator != 1:
            continue
        num_on += 1
        ends, selector = (best / count, worst / count), BestVsWorst(length_rho=float(rho))
        assert paired(selector, (*ends, int(on) / count), ["aa", "bb", "c" * 20]) == [(0, 2)]
        high = int(best - rho * (best - worst))
        assert paired(selector, (*ends, high / count), ["a" * 30, "bb", "c"]) == [(2, 1)]
    assert num_on > 2


def _plain(group: Group, judgement: Judgement) -> list[int]:
    from selfplay.pairs import usable

    return usable(group, judgement)


def test_the_best_meets_every_lower_one_about_equally_often() -> None:
    met: Counter[Any] = Counter()
    for n in range(600):
        group = group_of(["good", "bad1", "bad2", "bad3"], id=f"p{n}")
        (pair,) = BestVsRandom(seed=1).select(group, Judgement(group.prompt.id, (1.0, 0.0, 0.5, 0.9)))
        met[pair.chosen_index, pair.rejected_index] += 1
    assert sorted(met) == [(0, 1), (0, 2), (0, 3)]
    assert all(150 < count < 250 for count in met.values())


def test_another_seed_draws_another_rejected_completion() -> None:
    scores = (1.0, 0.0, 0.0, 0.0, 0.0)
    drawn = {paired(BestVsRandom(seed=seed), scores)[0] for seed in range(40)}
    assert drawn == {(0, n) for n in (1, 2, 3, 4)}


def test_top_k_pairs_the_k_best_with_the_k_worst_by_falling_margin() -> None:
    scores = (0.0, 1.0, 2.0, 10.0, 12.0)
    assert paired(TopKVsBottomK(1), scores) == [(4, 0)]
    assert paired(TopKVsBottomK(2), scores) == [(4, 0), (4, 1), (3, 0), (3, 1)]
    assert paired(TopKVsBottomK(2, max_pairs_per_prompt=2), scores) == [(4, 0), (4, 1)]
    assert paired(TopKVsBottomK(2, min_margin=10.0), scores) == [(4, 0), (4, 1), (3, 0)]
    # two of three: nobody stands on both sides
    assert paired(TopKVsBottomK(2), (3.0, 2.0, None, 1.0)) == [(0, 3), (1, 3)]


@given(case=judged(), margin=st.sampled_from([0.0, 0.5, 2.0]))
@example(case=(group_of("ab"), Judgement("p", (1.0, 0.5))), margin=0.5)
def test_all_above_margin_misses_no_two_completions(case: tuple[Group, Judgement], margin: float) -> None:
    group, judgement = case
    scores = {i: s for i in _plain(group, judgement) if (s := judgement.scores[i]) is not None}
    expected = {(c, r) for c in scores for r in scores if scores[c] > scores[r] and scores[c] - scores[r] >= margin}
    pairs = AllAboveMargin(margin).select(group, judgement)
    assert {(p.chosen_index, p.rejected_index) for p in pairs} == expected
    assert len(pairs) == len(expected)


def test_correct_and_incorrect_completions_are_paired_without_repeats() -> None:
    scores = (1.0, 1.0, 0.0, 0.0, 0.0, None)
    every = {(c, r) for c in (0, 1) for r in (2, 3, 4)}
    assert set(paired(CorrectVsIncorrect(), scores)) == every
    some = paired(CorrectVsIncorrect(max_pairs_per_prompt=4), scores)
    assert len(some) == len(set(some)) == 4
    assert set(some) < every
    assert set(paired(CorrectVsIncorrect(add_gold=True), scores)) == every | {(None, 2), (None, 3), (None, 4)}
    assert paired(CorrectVsIncorrect(correct_score=0.5), (0.5, 0.4)) == [(0, 1)]
    assert paired(CorrectVsIncorrect(correct_score=0.8), (0.7 + 0.1, 0.0)) == [(0, 1)]  # a hair below 0.8


def test_the_gold_answer_helps_where_the_policy_always_fails() -> None:
    assert paired(CorrectVsIncorrect(), (0.0, 0.0)) == []
    assert set(paired(CorrectVsIncorrect(add_gold=True), (0.0, 0.0))) == {(None, 0), (None, 1)}
    # what the policy wrote is the gold answer itself: neither wrong nor a second chosen one
    assert paired(CorrectVsIncorrect(add_gold=True), (0.0, 0.0), ["gold", "b"]) == [(None, 1)]
    assert paired(CorrectVsIncorrect(add_gold=True), (1.0, 0.0), ["gold", "b"]) == [(None, 1)]
    assert paired(CorrectVsIncorrect(add_gold=True), (1.0, 0.0), ["a", "gold"]) == []


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ((0.0, 0.0), "no correct completion"),
        ((1.0, 1.0), "no incorrect completion"),
        ((None, None), "too few usable completions"),
    ],
    ids=["all wrong", "all right", "no verdict"],
)
def test_a_prompt_without_both_sides_says_which_is_missing(scores: tuple[float | None, ...], reason: str) -> None:
    found = select_pairs(CorrectVsIncorrect(), [group_of(["a", "b"])], [Judgement("p", scores)])
    assert [drop.reason for drop in found.drops] == [reason]


def test_a_missing_gold_answer_is_named() -> None:
    with pytest.raises(DataError, match=r"prompts\.gold_column"):
        CorrectVsIncorrect(add_gold=True).select(group_of(["a", "b"]), Judgement("p", (1.0, 0.0)))


def test_spin_draws_among_several_completions_and_meets_each() -> None:
    met: Counter[int | None] = Counter()
    for n in range(300):
        (pair,) = GoldVsCompletion(seed=1).select(group_of(["a", "b", "c"], id=f"p{n}", gold="gold"), None)
        met[pair.rejected_index] += 1
    assert sorted(met) == [0, 1, 2]  # type: ignore[type-var]
    assert all(70 < count < 130 for count in met.values())
    several = GoldVsCompletion(5).select(group_of(["a", "gold", "b", ""], gold="gold"), None)
    assert sorted(p.rejected_index for p in several) == [0, 2]  # type: ignore[type-var]
    group = group_of(["a", "bb"], gold="gold", cut=[1])
    assert len(GoldVsCompletion(5).select(group, None)) == 1
    assert len(GoldVsCompletion(5, "rejected").select(group, None)) == 2


def test_a_selector_may_not_pair_what_has_no_verdict() -> None:
    class Careless:
        def select(self, group: Group, judgement: Judgement | None) -> list[PreferencePair]:
            return BestVsWorst().select(group, Judgement("p", (1.0, 0.0)))

    with pytest.raises(SelfplayError, match="completion 1, which has no verdict"):
        select_pairs(Careless(), [group_of(["a", "b"])], [Judgement("p", (1.0, None))])


class Holder(Section):
    pairs: PairsRecipe


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"min_margin": 1}, BestVsWorst(1, seed=7)),
        ({"length_rho": [0.0, 0.32]}, BestVsWorst(length_rho=0.32, seed=7)),
        ({"kind": "best_vs_random", "truncated": "judged"}, BestVsRandom(truncated="judged", seed=7)),
        ({"kind": "top_k_vs_bottom_k", "k": [1, 2], "min_margin": 0.5}, TopKVsBottomK(2, 0.5, seed=7)),
        ({"kind": "all_above_margin", "min_margin": 2, "max_pairs_per_prompt": 4}, AllAboveMargin(2, 4, seed=7)),
        (
            {"kind": "correct_vs_incorrect", "correct_score": 3, "add_gold": True, "max_pairs_per_prompt": [10, 20]},
            CorrectVsIncorrect(3, 20, add_gold=True, seed=7),
        ),
        ({"kind": "gold_vs_completion", "max_pairs_per_prompt": 2}, GoldVsCompletion(2, seed=7)),
        ({"kind": "gold_vs_completion", "truncated": "rejected"}, GoldVsCompletion(1, "rejected", seed=7)),
        (
            {"kind": "win_rates", "win_rate_from": "order", "length_rho": 0.1},
            WinRates("order", BestVsWorst(length_rho=0.1, seed=7)),
        ),
    ],
    ids=lambda value: value.get("kind", "best_vs_worst") + str(len(value)) if isinstance(value, dict) else "",
)
def test_every_kind_of_a_recipe_makes_its_selector_with_the_rounds_values(
    data: dict[str, Any], expected: PairSelector
) -> None:
    recipe = Holder.model_validate({"pairs": data}).pairs
    made = make_selector(recipe, 1, seed=7)
    assert made == expected
    assert isinstance(made, PairSelector)
    # the bound that a plan counts with holds
    group = group_of("abcdefg", gold="gold")
    judgement = None if recipe.kind == "gold_vs_completion" else Judgement("p", tuple(float(n) for n in range(7)))
    assert 1 <= len(made.select(group, judgement)) <= recipe.most_pairs(1, 7)
