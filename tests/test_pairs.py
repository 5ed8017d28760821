"""From judgements to pairs: only what differs, ended, and was judged better."""

import dataclasses
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from selfplay.errors import DataError, SelfplayError
from selfplay.pairs import (
    AllAboveMargin,
    BestVsRandom,
    BestVsWorst,
    GoldVsCompletion,
    Selection,
    TopKVsBottomK,
    WinRates,
    make_pair,
    make_selector,
    select_pairs,
    unusable_reason,
    usable,
)
from selfplay.protocols import PairSelector
from selfplay.recipe_pairs import BestVsWorstRecipe, GoldVsCompletionRecipe
from selfplay.types import Completion, Group, Judgement, Message, PreferencePair, Prompt

SCORE = st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0]), st.floats(-10, 10))
TEXT = st.sampled_from(["", "a", "b", "c c", "d"])


def group_of(texts: Sequence[str], *, id: str = "p", gold: str | None = None, cut: Sequence[int] = ()) -> Group:
    """Completions with one token per character; `cut` are the truncated ones."""

    def completion(text: str, n: int) -> Completion:
        ids = tuple(map(ord, text)) + (() if n in cut else (1,))
        return Completion(text, ids, finish_reason="length" if n in cut else "stop")

    prompt = Prompt(id, (Message("user", f"ask {id}"),), gold=gold)
    answer = None if gold is None else Completion(gold, (*map(ord, gold), 1), finish_reason="gold")
    return Group(prompt, (0, len(id)), tuple(completion(t, n) for n, t in enumerate(texts)), answer)


@st.composite
def judged_groups(draw: st.DrawFn) -> tuple[list[Group], list[Judgement]]:
    groups, judgements = [], []
    for n in range(draw(st.integers(0, 4))):
        texts = draw(st.lists(TEXT, min_size=1, max_size=6))
        cut = draw(st.sets(st.integers(0, 5)))
        gold = draw(st.none() | TEXT)
        groups.append(group_of(texts, id=f"p{n}", gold=gold, cut=sorted(cut)))
        scores = draw(st.lists(SCORE, min_size=len(texts), max_size=len(texts)))
        judgements.append(Judgement(f"p{n}", tuple(scores)))
    return groups, judgements


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 2))))
def test_prompts_with_a_pair_are_counted_once_whatever_the_order(rows: list[tuple[str, int]]) -> None:
    group = group_of(["a", "b"])
    pair = make_pair(group, chosen=0, rejected=1, judgement=None)
    pairs = [dataclasses.replace(pair, prompt_id=id, origin_round=round) for id, round in rows]
    selection = Selection(pairs, ())
    assert selection.num_prompts == len({id for id, _ in rows})
    for round in range(3):
        assert selection.num_own_prompts(round) == len({id for id, origin in rows if origin == round})
        assert selection.num_before(round) == sum(origin < round for _, origin in rows)


@given(judged_groups(), st.sampled_from([0.0, 0.3, 2.0]), st.integers(1, 3))
def test_every_pair_of_random_judgements_is_right_and_every_row_is_accounted_for(
    judged: tuple[list[Group], list[Judgement]], margin: float, most: int
) -> None:
    groups, judgements = judged
    found = select_pairs(BestVsWorst(margin, most), groups, judgements, round=3, judge="j")
    by_id = {g.prompt.id: (g, j) for g, j in zip(groups, judgements, strict=True)}
    for pair in found.pairs:
        group, judgement = by_id[pair.prompt_id]
        assert pair.chosen_index is not None
        assert pair.rejected_index is not None
        scores = judgement.scores[pair.chosen_index], judgement.scores[pair.rejected_index]
        assert (pair.chosen_score, pair.rejected_score) == scores
        assert None not in scores
        assert pair.chosen_score >= pair.rejected_score + margin - 1e-12
        assert pair.chosen_score > pair.rejected_score
        assert pair.margin == pair.chosen_score - pair.rejected_score
        assert (pair.prompt, pair.prompt_token_ids) == (group.prompt.messages, group.prompt_token_ids)
        for index, shown, ids in (
            (pair.chosen_index, pair.chosen, pair.chosen_token_ids),
            (pair.rejected_index, pair.rejected, pair.rejected_token_ids),
        ):
            completion = group.completions[index]
            assert completion.text
            assert completion.finish_reason == "stop"
            assert shown == (Message("assistant", completion.text),)
            assert ids == completion.token_ids
        assert pair.chosen != pair.rejected
        assert pair.chosen_token_ids != pair.rejected_token_ids
        assert (pair.origin_round, pair.judge) == (3, "j")
    counts = Counter(pair.prompt_id for pair in found.pairs)
    assert all(count <= most for count in counts.values())
    assert sorted([*counts, *(drop.id for drop in found.drops)]) == [g.prompt.id for g in groups]
    for group in groups:
        used = [i for p in found.pairs if p.prompt_id == group.prompt.id for i in (p.chosen_index, p.rejected_index)]
        assert len(used) == len(set(used))
    usable = sum(unusable_reason(g, i, j) is None for g, j in by_id.values() for i in range(len(g.completions)))
    assert usable + sum(found.unusable.values()) == sum(len(g.completions) for g in groups)


@given(judged_groups(), st.sampled_from([0.0, 0.3, 2.0]), st.integers(1, 3))
def test_truncated_completions_are_paired_as_they_are_scored_on_request(
    judged: tuple[list[Group], list[Judgement]], margin: float, most: int
) -> None:
    groups, judgements = judged
    found = select_pairs(BestVsWorst(margin, most, truncated="judged"), groups, judgements)
    by_id = {g.prompt.id: g for g in groups}
    by_score = {j.prompt_id: j for j in judgements}
    kept = {g.prompt.id: usable(g, by_score[g.prompt.id], keep_truncated=True) for g in groups}
    for pair in found.pairs:
        group = by_id[pair.prompt_id]
        judgement = by_score[pair.prompt_id]
        assert pair.chosen_index is not None
        assert pair.rejected_index is not None
        assert pair.chosen == (Message("assistant", group.completions[pair.chosen_index].text),)
        assert pair.chosen != pair.rejected
        scored = [s for i, s in enumerate(judgement.scores) if s is not None and i in kept[pair.prompt_id]]
        assert (pair.chosen_score, pair.rejected_score) == (max(scored), min(scored))
        assert pair.margin is not None
        assert pair.margin >= max(margin - 1e-12, 0)
    assert "truncated" not in found.unusable
    total = sum(len(group.completions) for group in groups)
    assert sum(map(len, kept.values())) + sum(found.unusable.values()) == total


def test_cut_completions_of_equal_score_are_a_tie_and_not_unusable() -> None:
    group = group_of(["a", "b", "c"], cut=[0, 1, 2])
    found = select_pairs(WinRates("order", BestVsWorst(truncated="judged")), [group], [Judgement("p", (0.0, 0.0, 0.0))])
    assert [drop.reason for drop in found.drops] == ["tie, or margin below min_margin"]
    assert found.unusable == {}


def test_a_judge_that_knows_nothing_chooses_a_repeated_text_as_often_as_it_rejects_it() -> None:
    rng, met = random.Random(0), Counter[bool]()
    for n in range(1000):
        group = group_of(["Yes.", "Yes.", "Yes.", "No, never.", "Perhaps, one day.", "Who can tell?"], id=f"p{n}")
        judgement = Judgement(group.prompt.id, tuple(float(rng.random() < 0.5) for _ in group.completions))
        for pair in BestVsWorst().select(group, judgement):
            met.update(text == "Yes." for text in [pair.chosen[0].content])
            met.subtract(text == "Yes." for text in [pair.rejected[0].content])
    assert abs(met[True]) < 100


@pytest.mark.parametrize("selector", [BestVsWorst(0.2), AllAboveMargin(0.2), BestVsRandom(0.2), TopKVsBottomK(1, 0.2)])
def test_a_margin_in_steps_of_a_fifth_is_reached_at_every_height(selector: PairSelector) -> None:
    for high in range(1, 6):
        group = group_of(["a", "b"])
        assert len(selector.select(group, Judgement("p", (high / 5, (high - 1) / 5)))) == 1
        assert len(selector.select(group, Judgement("p", (high / 5, (high - 0.9) / 5)))) == 0


def test_a_judge_that_knows_nothing_chooses_what_is_cut_as_often_as_it_rejects_it() -> None:
    rng, chosen, rejected, longer = random.Random(0), 0, 0, 0
    texts = ["a", "bcd", "cdefgh", "d" * 12, "e" * 12]
    for n in range(1000):
        group = group_of(texts, id=f"p{n}", cut=[3, 4])
        judgement = Judgement(group.prompt.id, tuple(float(rng.random() < 0.5) for _ in texts))
        for pair in BestVsWorst(max_pairs_per_prompt=2, truncated="judged").select(group, judgement):
            chosen += pair.chosen_index in (3, 4)
            rejected += pair.rejected_index in (3, 4)
            longer += len(pair.chosen_token_ids) - len(pair.rejected_token_ids)
    assert chosen + rejected > 1000
    assert abs(chosen - rejected) < 0.1 * (chosen + rejected)
    assert abs(longer) < 0.5 * (chosen + rejected)


@given(judged_groups(), st.integers(1, 3))
def test_every_pair_with_a_gold_answer_has_it_as_chosen_and_another_text_as_rejected(
    judged: tuple[list[Group], list[Judgement]], most: int
) -> None:
    groups = [g for g in judged[0] if g.gold is not None]
    found = select_pairs(GoldVsCompletion(most), groups, None)
    by_id = {g.prompt.id: g for g in groups}
    for pair in found.pairs:
        group = by_id[pair.prompt_id]
        assert group.gold is not None
        assert pair.chosen_index is None
        assert pair.rejected_index is not None
        assert pair.chosen_token_ids == group.gold.token_ids
        rejected = group.completions[pair.rejected_index]
        assert rejected.text not in ("", group.gold.text)
        assert rejected.finish_reason == "stop"
        assert (pair.chosen_score, pair.rejected_score, pair.margin) == (None, None, None)
    counts = Counter(pair.prompt_id for pair in found.pairs)
    assert all(count <= most for count in counts.values())
    assert sorted([*counts, *(drop.id for drop in found.drops)]) == [g.prompt.id for g in groups]


def test_an_empty_gold_answer_is_never_chosen() -> None:
    found = select_pairs(GoldVsCompletion(), [group_of(["a"], gold="")], None)
    assert found.pairs == ()
    assert found.unusable == {"empty gold answer": 1}


@st.composite
def reordered(draw: st.DrawFn) -> tuple[list[str], set[int], list[float | None], list[int]]:
    """Texts, which of them are truncated, their scores, and another order."""
    texts = draw(st.lists(TEXT, min_size=1, max_size=6))
    scores = draw(st.lists(SCORE, min_size=len(texts), max_size=len(texts)))
    return texts, draw(st.sets(st.integers(0, 5))), scores, draw(st.permutations(range(len(texts))))


@given(reordered(), st.integers(1, 3))
@example((["a", "a", "b"], {0}, [1.0, 1.0, 0.0], [1, 0, 2]), 1)  # one of two equal texts is truncated
@example((["a", "a", "b"], set(), [0.0, 1.0, 0.5], [1, 0, 2]), 1)  # or judged otherwise
def test_the_order_of_the_completions_does_not_change_which_scores_are_paired(
    drawn: tuple[list[str], set[int], list[float | None], list[int]], most: int
) -> None:
    texts, cut, scores, order = drawn

    def paired(order: Sequence[int]) -> list[tuple[float | None, float | None]]:
        group = group_of([texts[i] for i in order], cut=[n for n, i in enumerate(order) if i in cut])
        judgement = Judgement("p", tuple(scores[i] for i in order))
        found = select_pairs(BestVsWorst(0.0, most), [group], [judgement])
        return sorted((p.chosen_score, p.rejected_score) for p in found.pairs)  # type: ignore[type-var]

    assert paired(order) == paired(range(len(texts)))


def test_the_pair_closest_in_length_is_taken_among_equals() -> None:
    group = group_of(["aaaa", "bb", "cccccccc", "dddd"])
    judgement = Judgement("p", (1.0, 1.0, 0.0, 0.0))
    (pair,) = BestVsWorst().select(group, judgement)
    assert (pair.chosen_index, pair.rejected_index) == (0, 3)
    two = BestVsWorst(max_pairs_per_prompt=5).select(group, judgement)
    assert [(p.chosen_index, p.rejected_index) for p in two] == [(0, 3), (1, 2)]


@pytest.mark.parametrize(
    ("scores", "margin", "count"),
    [((1.0, 0.5), 0.5, 1), ((1.0, 0.5), 0.6, 0), ((1.0, 1.0), 0.0, 0), ((None, 1.0), 0.0, 0), ((-1.0, -3.0), 2.0, 1)],
)
def test_a_margin_is_reached_or_no_pair_is_made(scores: tuple[float | None, ...], margin: float, count: int) -> None:
    assert len(BestVsWorst(margin).select(group_of(["a", "b"]), Judgement("p", scores))) == count


def test_middle_scores_are_in_no_pair() -> None:
    pairs = BestVsWorst(max_pairs_per_prompt=9).select(group_of("abcd"), Judgement("p", (0.2, 1.0, 0.0, 0.9)))
    assert [(p.chosen_index, p.rejected_index) for p in pairs] == [(1, 2)]


def test_every_unusable_completion_has_its_reason() -> None:
    group = group_of(["cut", "", "a", "a", "b", "gold"], gold="gold", cut=[0])
    judgement = Judgement("p", (1.0, 1.0, 1.0, 1.0, None, 0.0))
    reasons = [unusable_reason(group, i, judgement) for i in range(6)]
    assert reasons == ["truncated", "empty", None, "equal to another", "no verdict", None]
    assert unusable_reason(group, 5, None) == "equal to gold"
    assert unusable_reason(group, 4, None) is None
    found = select_pairs(BestVsWorst(), [group], [judgement])
    assert found.unusable == {"truncated": 1, "empty": 1, "equal to another": 1, "no verdict": 1}


def test_a_prompt_without_a_pair_says_why() -> None:
    groups = [group_of(["a", "b"], id="tie"), group_of(["a", ""], id="few"), group_of(["a", "b"], id="near")]
    judgements = [Judgement("tie", (1.0, 1.0)), Judgement("few", (1.0, 0.0)), Judgement("near", (1.0, 0.9))]
    found = select_pairs(BestVsWorst(0.5), groups, judgements)
    reasons = {drop.id: drop.reason for drop in found.drops}
    assert reasons == {
        "tie": "tie, or margin below min_margin",
        "near": "tie, or margin below min_margin",
        "few": "too few usable completions",
    }


def test_gold_vs_completion_names_a_prompt_that_has_none() -> None:
    with pytest.raises(DataError, match=r"prompt p .*prompts\.gold_column"):
        select_pairs(GoldVsCompletion(), [group_of(["a"])], None)


class Own:
    """A selector that a user might write."""

    def __init__(self, pair: PreferencePair) -> None:
        self.pair = pair

    def select(self, group: Group, judgement: Judgement | None) -> Sequence[PreferencePair]:
        return [self.pair]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt_id": "q"}, "of prompt q for prompt p"),
        ({"prompt_token_ids": (9,)}, "for prompt p"),
        ({"rejected": (Message("assistant", "a"),)}, "equal"),
        ({"rejected_token_ids": (97, 1)}, "equal"),
        ({"chosen_score": 0.0, "rejected_score": 1.0}, "lower-scored"),
    ],
)
def test_a_selector_that_pairs_what_does_not_belong_together_is_stopped(change: dict[str, object], words: str) -> None:
    group, judgement = group_of(["a", "b"]), Judgement("p", (1.0, 0.0))
    pair = make_pair(group, chosen=0, rejected=1, judgement=judgement)
    assert select_pairs(Own(pair), [group], [judgement]).pairs == (pair,)
    wrong = dataclasses.replace(pair, **change)  # type: ignore[arg-type]
    with pytest.raises(SelfplayError, match=words):
        select_pairs(Own(wrong), [group], [judgement])


def test_a_recipe_names_its_selector_with_the_rounds_values() -> None:
    recipe = BestVsWorstRecipe(min_margin=[0.5, 0.1], max_pairs_per_prompt=[1, 4])
    assert make_selector(recipe, 0, 0) == BestVsWorst(0.5, 1)
    assert make_selector(recipe, 7, 0) == BestVsWorst(0.1, 4)
    spin = make_selector(GoldVsCompletionRecipe(kind="gold_vs_completion", max_pairs_per_prompt=2), 0, 0)
    assert spin == GoldVsCompletion(2)
    assert isinstance(spin, PairSelector)
