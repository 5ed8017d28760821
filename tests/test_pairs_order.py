"""Which pairs a round trains on depends on what its completions are, and not on the order of completions or prompts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from test_pairs import group_of
from test_pairs_strategies import CUTS, STRATEGIES, as_read, judged

from selfplay.filters import NamedFilter, apply_filters
from selfplay.filters.balance_length import BalanceLength
from selfplay.filters.cap_per_prompt import CapPerPrompt
from selfplay.filters.contradictions import Contradictions
from selfplay.filters.exact_duplicates import ExactDuplicates
from selfplay.filters.mix_previous import MixPrevious
from selfplay.filters.near_duplicates import NearDuplicates
from selfplay.pairs import BestVsWorst, make_pair, select_pairs
from selfplay.protocols import FilterContext
from selfplay.types import Group, Judgement, PreferencePair

Case = tuple[Group, Judgement]
TIES = (group_of(["aa", "bb", "cc"], gold="gold"), Judgement("p", (1.0, 1.0, 0.0)))
TURNED_TIES = (group_of(["bb", "aa", "cc"], gold="gold"), Judgement("p", (1.0, 1.0, 0.0)))
FILTERS = {
    "exact_duplicates": ExactDuplicates(),
    "near_duplicates": NearDuplicates(1, 0.5),
    "contradictions": Contradictions("newest"),
    "cap_per_prompt": CapPerPrompt(1),
    "balance_length": BalanceLength(),
    "mix_previous": MixPrevious(share=0.4),
}


def turned(case: Case, order: Sequence[int]) -> Case:
    group, judgement = case
    completions = tuple(group.completions[i] for i in order)
    scores = tuple(judgement.scores[i] for i in order)
    return dataclasses.replace(group, completions=completions), Judgement(judgement.prompt_id, scores)


def said(pairs: Sequence[PreferencePair]) -> list[Any]:
    """What pairs say, without the places of their completions: of equal texts either may be taken."""
    return [
        (
            p.prompt_id,
            p.chosen,
            p.rejected,
            p.chosen_score,
            p.rejected_score,
            p.chosen_win_rate,
            p.weight,
            p.origin_round,
        )
        for p in pairs
    ]


@st.composite
def rounds(draw: st.DrawFn) -> tuple[list[Case], list[Case]]:
    """The groups of a round and their judgements, and the same with prompts and completions in another order."""
    cases = []
    for n in range(draw(st.integers(1, 4))):
        group, judgement = draw(judged())
        group = dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, id=f"p{n}"))
        cases.append((group, Judgement(f"p{n}", judgement.scores)))
    other = [turned(case, draw(st.permutations(range(len(case[0].completions))))) for case in cases]
    return cases, draw(st.permutations(other))


def selected(name: str, cut: str, cases: Sequence[Case]) -> Sequence[PreferencePair]:
    groups, judgements = [group for group, _ in cases], [as_read(name, judgement) for _, judgement in cases]
    selector = STRATEGIES[name](0.0, cut)
    return select_pairs(selector, groups, None if name == "gold_vs_completion" else judgements, round=1).pairs


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", STRATEGIES)
@given(both=rounds())
@example(both=([TIES], [TURNED_TIES]))
def test_the_order_of_prompts_and_completions_changes_no_pair(
    name: str, cut: str, both: tuple[list[Case], list[Case]]
) -> None:
    one, other = (said(selected(name, cut, cases)) for cases in both)
    # of one prompt also their order is the same, which a cap reads
    assert sorted(one, key=lambda row: row[0]) == sorted(other, key=lambda row: row[0])


@pytest.mark.parametrize("filter", FILTERS)
@given(name=st.sampled_from(list(STRATEGIES)), both=rounds(), weight=st.sampled_from([1.0, 0.1, 1 / 3]))
def test_the_order_of_prompts_and_completions_changes_no_filter(
    name: str, filter: str, both: tuple[list[Case], list[Case]], weight: float
) -> None:
    left = []
    for cases in both:
        pairs = [dataclasses.replace(pair, weight=weight) for pair in selected(name, "drop", cases)]
        before = [dataclasses.replace(pair, origin_round=0) for pair in pairs]
        context = FilterContext(1, 3, lambda round, before=before: before)
        left.append(apply_filters([NamedFilter(filter, FILTERS[filter])], pairs, context)[0])
    one, other = (sorted(said(pairs), key=lambda row: (row[0], -row[-1])) for pairs in left)
    assert one == other


def test_ties_in_length_are_drawn_and_not_the_first() -> None:
    met = set()
    for n in range(40):
        group = group_of(["aa", "bb", "cc"], id=f"p{n}")
        (pair,) = BestVsWorst(seed=1).select(group, Judgement(group.prompt.id, (1.0, 1.0, 0.0)))
        met.add(pair.chosen[0].content)
    assert met == {"aa", "bb"}


def test_which_of_two_near_pairs_goes_on_does_not_follow_the_prompts() -> None:
    groups = [group_of(["aaaa", "bbbb"], id=f"p{n}") for n in range(9)]
    groups = [dataclasses.replace(group, prompt_token_ids=(1, 2, 3)) for group in groups]
    cases = [(group, Judgement(group.prompt.id, (1.0, 0.0))) for group in groups]
    kept = [
        said(NearDuplicates()(selected("best_vs_worst", "drop", one), FilterContext(1, 3)))
        for one in (cases, cases[::-1], cases[4:] + cases[:4])
    ]
    assert kept[0] == kept[1] == kept[2]
    assert len(kept[0]) == 1


def test_sums_of_lengths_are_the_same_in_every_order() -> None:
    # 0.1 + 0.2 + 0.3 is another float from the other end
    longer = [(f"p{n}", "aa", "b", n / 10) for n in (1, 2, 3)]
    rows = [("q", "a", "bbbb", 0.1), *longer]
    pairs = [dataclasses.replace(_pair(id, chosen, rejected), weight=weight) for id, chosen, rejected, weight in rows]
    one, other = (BalanceLength()(given, FilterContext()) for given in (pairs, pairs[::-1]))
    assert sorted(map(repr, said(one))) == sorted(map(repr, said(other)))


def _pair(id: str, chosen: str, rejected: str) -> PreferencePair:
    return make_pair(group_of([chosen, rejected], id=id), chosen=0, rejected=1, judgement=None)
