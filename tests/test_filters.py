"""Filters over the pairs of a round: what each keeps, and that every row is accounted for."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from selfplay.errors import RecipeError, SecurityError, SelfplayError
from selfplay.filters import NamedFilter, apply_filters, load_programs, make_filters
from selfplay.filters.apply import key_of
from selfplay.filters.balance_length import BalanceLength
from selfplay.filters.cap_per_prompt import CapPerPrompt
from selfplay.filters.contradictions import Contradictions
from selfplay.filters.exact_duplicates import ExactDuplicates
from selfplay.filters.mix_previous import MixPrevious
from selfplay.filters.near_duplicates import NearDuplicates, jaccard, ngrams
from selfplay.protocols import FilterContext, PairFilter
from selfplay.recipe_filters import PythonFilterRecipe
from selfplay.recipe_pairs import BestVsWorstRecipe
from selfplay.types import Message, PreferencePair, derive_seed

NOTHING = FilterContext()


def pair(prompt: str, chosen: str, rejected: str, *, round: int = 0, weight: float = 1.0) -> PreferencePair:
    """A pair with one token per character."""
    return PreferencePair(
        prompt,
        (Message("user", prompt),),
        (Message("assistant", chosen),),
        (Message("assistant", rejected),),
        tuple(map(ord, prompt)),
        tuple(map(ord, chosen)),
        tuple(map(ord, rejected)),
        weight=weight,
        origin_round=round,
    )


def brief(pairs: Sequence[PreferencePair]) -> list[str]:
    return [f"{p.prompt_id}:{p.chosen[0].content}>{p.rejected[0].content}@{p.origin_round}" for p in pairs]


def earlier(*rounds: list[PreferencePair]) -> FilterContext:
    """The context of the round after these."""
    return FilterContext(len(rounds), 3, lambda index: rounds[index])


@st.composite
def some_pairs(draw: st.DrawFn) -> list[PreferencePair]:
    """Pairs of few prompts and texts, in rounds 0 to 2: full of duplicates and contradictions."""
    text = st.sampled_from(["aaaa", "aaab", "abcabc", "xyzxyz", "q"])
    rows = draw(st.lists(st.tuples(st.sampled_from(["p", "pp"]), text, text, st.integers(0, 2)), max_size=12))
    return [pair(p, c, r, round=n) for p, c, r, n in rows if c != r]


FILTERS: dict[str, PairFilter] = {
    "exact_duplicates": ExactDuplicates(),
    "near_duplicates": NearDuplicates(2, 0.5),
    "contradictions": Contradictions(),
    "contradictions, newest": Contradictions("newest"),
    "cap_per_prompt": CapPerPrompt(2),
}


@pytest.mark.parametrize("name", FILTERS)
@given(pairs=some_pairs())
def test_a_filter_keeps_some_pairs_in_their_order_and_doing_it_twice_changes_nothing(
    name: str, pairs: list[PreferencePair]
) -> None:
    kept = list(FILTERS[name](pairs, NOTHING))
    left = iter(pairs)
    assert all(any(one is other for other in left) for one in kept), "kept pairs are those given, in their order"
    assert list(FILTERS[name](kept, NOTHING)) == kept


@given(pairs=some_pairs(), names=st.lists(st.sampled_from(list(FILTERS)), max_size=4))
def test_rows_in_are_rows_out_and_rows_dropped(pairs: list[PreferencePair], names: list[str]) -> None:
    context = FilterContext(2)
    kept, drops, counts = apply_filters([NamedFilter(name, FILTERS[name]) for name in names], pairs, context)
    assert [count.filter for count in counts] == names
    before = len(pairs)
    for count in counts:
        assert count.num_in == before
        assert count.num_in + count.num_added == count.num_out + count.num_dropped
        before = count.num_out
    assert before == len(kept)
    own = {p.prompt_id for p in pairs if p.origin_round == 2}
    left = {p.prompt_id for p in kept if p.origin_round == 2}
    assert sorted(drop.id for drop in drops) == sorted(own - left)
    assert all(drop.reason.removeprefix("filter ") in names for drop in drops)


@given(pairs=some_pairs())
def test_no_exact_duplicate_is_left_and_nothing_else_goes(pairs: list[PreferencePair]) -> None:
    kept = ExactDuplicates()(pairs, NOTHING)
    texts = [(p.prompt_id, p.chosen, p.rejected) for p in kept]
    assert len(texts) == len(set(texts))
    assert set(texts) == {(p.prompt_id, p.chosen, p.rejected) for p in pairs}
    for one in kept:
        same = [p for p in pairs if (p.prompt_id, p.chosen, p.rejected) == (one.prompt_id, one.chosen, one.rejected)]
        assert one.origin_round == max(p.origin_round for p in same)


def similarity(one: PreferencePair, other: PreferencePair, n: int) -> float:
    parts = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
    return min(jaccard(ngrams(getattr(one, part), n), ngrams(getattr(other, part), n)) for part in parts)


@given(pairs=some_pairs(), n=st.integers(1, 4), threshold=st.sampled_from([0.2, 1 / 3, 0.5, 0.8, 1.0]))
def test_near_duplicates_are_those_that_comparing_every_two_pairs_finds(
    pairs: list[PreferencePair], n: int, threshold: float
) -> None:
    kept: list[PreferencePair] = []
    for one in sorted(pairs, key=lambda p: (-p.origin_round, derive_seed(0, "near duplicates", p.prompt_id))):
        if all(similarity(one, other, n) < threshold for other in kept):
            kept.append(one)
    found = NearDuplicates(n, threshold)(pairs, NOTHING)
    assert sorted(map(id, found)) == sorted(map(id, kept))


def test_a_shared_prompt_and_gold_answer_make_no_near_duplicate() -> None:
    pairs = [pair("a long prompt", "the gold answer", text) for text in ("quite this", "something else", "quite this!")]
    assert brief(NearDuplicates()(pairs, NOTHING)) == brief(pairs[:2])


def test_the_measure_is_shared_ngrams_over_all() -> None:
    assert ngrams((1, 2, 3, 4), 2) == {(1, 2), (2, 3), (3, 4)}
    assert ngrams((1,), 3) == {(1,)}
    assert jaccard(ngrams((1, 2, 3, 4), 2), ngrams((1, 2, 3, 5), 2)) == 2 / 4


@given(pairs=some_pairs())
def test_no_contradiction_is_left(pairs: list[PreferencePair]) -> None:
    for keep in ("none", "newest"):
        kept = Contradictions(keep)(pairs, NOTHING)  # type: ignore[arg-type]
        texts = {(p.prompt_id, p.chosen, p.rejected) for p in kept}
        assert not {(id, rejected, chosen) for id, chosen, rejected in texts} & texts
    untouched = [p for p in pairs if not any(_against(p, other) for other in pairs)]
    assert list(Contradictions()(pairs, NOTHING)) == untouched


def _against(one: PreferencePair, other: PreferencePair) -> bool:
    return (one.prompt_id, one.chosen, one.rejected) == (other.prompt_id, other.rejected, other.chosen)


def test_of_contradicting_rounds_the_newest_may_be_believed() -> None:
    mixed = [pair("p", "a", "b", round=2), pair("p", "b", "a", round=1), pair("p", "a", "b"), pair("q", "b", "a")]
    assert brief(Contradictions()(mixed, NOTHING)) == ["q:b>a@0"]
    assert brief(Contradictions("newest")(mixed, NOTHING)) == ["p:a>b@2", "q:b>a@0"]
    # a round that contradicts itself is not believed, nor are the older ones
    torn = [*mixed, pair("p", "b", "a", round=2)]
    assert brief(Contradictions("newest")(torn, NOTHING)) == ["q:b>a@0"]


def test_a_cap_keeps_the_newest_pairs_and_then_the_first() -> None:
    pairs = [pair("p", "a", "b"), pair("p", "c", "d", round=1), pair("p", "e", "f", round=1), pair("q", "a", "b")]
    assert brief(CapPerPrompt(1)(pairs, NOTHING)) == ["p:c>d@1", "q:a>b@0"]
    assert brief(CapPerPrompt(2)(pairs, NOTHING)) == ["p:c>d@1", "p:e>f@1", "q:a>b@0"]


ROUNDS = ([pair("p", "a", "b")], [pair("q", "c", "d", round=1)], [pair("r", "e", "f", round=2)])


def test_spin_trains_on_the_newest_and_the_previous_pairs() -> None:
    new = [pair("s", "g", "h", round=3)]
    assert brief(MixPrevious()(new, earlier(*ROUNDS))) == ["s:g>h@3", "r:e>f@2"]
    assert brief(MixPrevious(2)(new, earlier(*ROUNDS))) == ["s:g>h@3", "r:e>f@2", "q:c>d@1"]
    assert brief(MixPrevious(None)(new, earlier(*ROUNDS))) == ["s:g>h@3", "r:e>f@2", "q:c>d@1", "p:a>b@0"]
    assert brief(MixPrevious(9)(new, earlier(*ROUNDS))) == brief(MixPrevious(None)(new, earlier(*ROUNDS)))
    first = [pair("s", "g", "h")]
    assert list(MixPrevious(None)(first, NOTHING)) == first


def test_older_pairs_weigh_what_their_age_says() -> None:
    new = [pair("s", "g", "h", round=3, weight=5.0)]
    mixed = MixPrevious(None, (0.5, 0.25))(new, earlier(*ROUNDS))
    assert [p.weight for p in mixed] == [5.0, 0.5, 0.25, 0.25]


@example(num_new=3, num_old=9, share=0.7)
@given(num_new=st.integers(1, 20), num_old=st.integers(0, 20), share=st.sampled_from([0.1, 0.25, 0.5, 0.7]))
def test_a_share_of_earlier_pairs_is_reached_and_never_passed(num_new: int, num_old: int, share: float) -> None:
    new = [pair(f"n{n}", "a", "b", round=1) for n in range(num_new)]
    old = [pair(f"o{n}", "a", "b") for n in range(num_old)]
    mix = MixPrevious(1, share=share)
    mixed = mix(new, earlier(old))
    num_mixed = len(mixed) - num_new
    assert num_mixed <= share * len(mixed) + 1e-9
    assert num_mixed == num_old or num_mixed + 1 > share * (len(mixed) + 1) + 1e-9
    assert num_mixed == mix.most_added([num_old, num_new])
    assert mixed[:num_new] == new
    assert mixed == mix(new, earlier(old))


def test_the_draw_of_a_share_follows_the_seed() -> None:
    new, old = [pair("n", "a", "b", round=1)], [pair(f"o{n}", "a", "b") for n in range(9)]
    drawn = {brief(MixPrevious(share=0.5)(new, dataclasses.replace(earlier(old), seed=seed)))[1] for seed in range(60)}
    assert len(drawn) == 9


def added(filter: PairFilter, pairs: list[PreferencePair], context: FilterContext) -> Any:
    return apply_filters([NamedFilter("own", filter)], pairs, context)


def test_mixed_pairs_are_counted_as_added_and_weights_make_no_other_pair() -> None:
    new = [pair("s", "g", "h", round=3)]
    kept, drops, (count,) = added(MixPrevious(2, (0.5,)), new, earlier(*ROUNDS))
    assert (count.num_in, count.num_added, count.num_dropped, count.num_out) == (1, 2, 0, 3)
    assert len(kept) == 3
    assert drops == []
    kept, _, (count,) = added(lambda pairs, context: [dataclasses.replace(p, weight=2.0) for p in pairs], new, NOTHING)
    assert (count.num_added, count.num_dropped) == (0, 0)
    assert kept[0].weight == 2.0
    assert key_of(kept[0]) == key_of(new[0])


def test_a_prompt_that_loses_its_last_own_pair_is_dropped_by_that_filters_name() -> None:
    new = [pair("p", "a", "b", round=1), pair("q", "a", "b", round=1), pair("p", "c", "d", round=1)]
    steps = [
        NamedFilter("mix", MixPrevious()),
        NamedFilter("no q", lambda pairs, context: [p for p in pairs if p.prompt_id != "q" or p.origin_round == 0]),
    ]
    kept, drops, counts = apply_filters(steps, new, earlier([pair("q", "x", "y")]))
    assert brief(kept) == ["p:a>b@1", "p:c>d@1", "q:x>y@0"]
    assert [(drop.id, drop.reason) for drop in drops] == [("q", "filter no q")]
    assert [count.num_dropped for count in counts] == [0, 1]


@pytest.mark.parametrize(
    ("filter", "words"),
    [
        (lambda pairs, context: [*pairs, pair("new", "a", "b", round=1)], "prompt new"),
        (lambda pairs, context: [*pairs, pair("p", "a", "b")] * 2, "given and"),
        (lambda pairs, context: [*pairs, pair("future", "a", "b", round=7)], "prompt future"),
        (lambda pairs, context: [1], "no PreferencePair"),
        (lambda pairs, context: None, "filter own raised: TypeError"),
        (lambda pairs, context: 1 / 0, "filter own raised: ZeroDivisionError"),
    ],
    ids=["invents one", "doubles one", "from the future", "no pair", "nothing", "raises"],
)
def test_a_filter_that_makes_pairs_or_fails_is_stopped_by_name(filter: PairFilter, words: str) -> None:
    with pytest.raises(SelfplayError, match=words):
        added(filter, [pair("n", "a", "b", round=1)], earlier([pair("p", "a", "b")]))


def recipe(target: Path, name: str) -> BestVsWorstRecipe:
    return BestVsWorstRecipe(filters=[PythonFilterRecipe(kind="python", target=f"{target}:{name}")])


def test_a_users_filter_runs_only_when_allowed(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def short(pairs, context):\n    return [p for p in pairs if len(p.chosen_token_ids) < 3]\nx = 1\n")
    with pytest.raises(SecurityError, match=r"pairs\.filters\.target.*--allow-code"):
        load_programs(recipe(file, "short"), allow_code=False)
    programs = load_programs(recipe(file, "short"), allow_code=True)
    (made,) = make_filters(recipe(file, "short"), 0, programs)
    kept, _, _ = apply_filters([made], [pair("p", "aaaa", "b"), pair("p", "a", "b")], NOTHING)
    assert brief(kept) == ["p:a>b@0"]
    (program,) = programs.values()
    assert program.identity.startswith("python:mine.py:short sha256:")
    with pytest.raises(RecipeError, match="no function"):
        load_programs(recipe(file, "x"), allow_code=True)
    with pytest.raises(RecipeError, match='did you mean "short"'):
        load_programs(recipe(file, "shor"), allow_code=True)
    file.write_text("1 / 0\n")
    with pytest.raises(RecipeError, match="failed on import"):
        load_programs(recipe(file, "short"), allow_code=True)


def test_a_recipe_lists_its_filters_with_the_rounds_values() -> None:
    listed = [
        {"kind": "mix_previous", "window": [1, 2], "weights": [1.0, 0.5], "share": [0.2, 0.5]},
        {"kind": "exact_duplicates"},
        {"kind": "near_duplicates", "ngram": 2, "threshold": 0.9},
        {"kind": "contradictions", "keep": "newest"},
        {"kind": "cap_per_prompt", "max_pairs": [3, 4]},
        {"kind": "mix_previous", "window": "all"},
    ]
    first = BestVsWorstRecipe.model_validate({"filters": listed[:5]})
    made = make_filters(first, 1, {})
    assert [one.name for one in made] == [one["kind"] for one in listed[:5]]
    filters = [one.filter for one in made]
    assert filters[0] == MixPrevious(2, (1.0, 0.5), 0.5)
    assert isinstance(filters[1], ExactDuplicates)
    assert filters[2:] == [NearDuplicates(2, 0.9), Contradictions("newest"), CapPerPrompt(4)]
    (everything,) = make_filters(BestVsWorstRecipe.model_validate({"filters": listed[5:]}), 4, {})
    assert everything.filter == MixPrevious(None)


@given(pairs=some_pairs(), uneven=st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=12, max_size=12))
def test_balanced_pairs_are_as_long_on_both_sides_and_all_there(
    pairs: list[PreferencePair], uneven: list[float]
) -> None:
    pairs = [dataclasses.replace(one, weight=weight) for one, weight in zip(pairs, uneven, strict=False)]
    found = BalanceLength()(pairs, NOTHING)
    assert brief(found) == brief(pairs)
    assert all(0 < new.weight <= old.weight for new, old in zip(found, pairs, strict=True))
    gaps = [len(p.chosen_token_ids) - len(p.rejected_token_ids) for p in pairs]
    if min(gaps, default=0) < 0 < max(gaps, default=0):
        assert sum(p.weight * gap for p, gap in zip(found, gaps, strict=True)) == pytest.approx(0, abs=1e-9)
    else:
        assert found == pairs


def test_only_the_heavier_side_loses_weight() -> None:
    pairs = [pair("p", "aaaa", "b"), pair("p", "aaaaa", "b"), pair("p", "a", "bb"), pair("p", "a", "b")]
    assert [one.weight for one in BalanceLength()(pairs, NOTHING)] == [1 / 7, 1 / 7, 1.0, 1.0]
