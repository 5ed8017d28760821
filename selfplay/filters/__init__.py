"""Filters look at all pairs of a round, after the selector and before training; a recipe lists them in `pairs.filters` and
they work in that order. One per file, alternatives of PairFilter (protocols.py); `make_filters` knows their names.
"""

from collections.abc import Mapping
from pathlib import Path

from selfplay.filters.apply import FilterCounts, NamedFilter, apply_filters
from selfplay.filters.balance_length import BalanceLength
from selfplay.filters.cap_per_prompt import CapPerPrompt
from selfplay.filters.contradictions import Contradictions
from selfplay.filters.exact_duplicates import ExactDuplicates
from selfplay.filters.mix_previous import MixPrevious
from selfplay.filters.near_duplicates import NearDuplicates
from selfplay.filters.python import LoadedFilter, load_filter
from selfplay.protocols import PairFilter
from selfplay.recipe_filters import (
    BalanceLengthRecipe,
    CapPerPromptRecipe,
    ContradictionsRecipe,
    ExactDuplicatesRecipe,
    FilterRecipe,
    MixPreviousRecipe,
    NearDuplicatesRecipe,
    PythonFilterRecipe,
)
from selfplay.recipe_pairs import AnyPairs
from selfplay.recipe_values import at_round, optional_at_round

__all__ = ["FilterCounts", "NamedFilter", "Programs", "apply_filters", "load_programs", "make_filters", "make_mix"]

Programs = Mapping[str, LoadedFilter]


def load_programs(recipe: AnyPairs, *, allow_code: bool) -> Programs:
    """The filters of a recipe that are programs of the user, by target, each executed once. SecurityError where nobody
    allowed that.
    """
    targets = dict.fromkeys(one.target for one in recipe.filters if isinstance(one, PythonFilterRecipe))
    return {target: load_filter(target, Path(), allow_code=allow_code) for target in targets}


def make_filters(recipe: AnyPairs, round: int, programs: Programs) -> list[NamedFilter]:
    """The filters that a recipe lists, with the round's values."""
    return [NamedFilter(one.kind, _make_filter(one, round, programs)) for one in recipe.filters]


def make_mix(recipe: MixPreviousRecipe, round: int) -> MixPrevious:
    """mix_previous with the round's values."""
    window = None if recipe.window == "all" else at_round(recipe.window, round)
    return MixPrevious(window, tuple(recipe.weights or (1.0,)), optional_at_round(recipe.share, round))


def _make_filter(recipe: FilterRecipe, round: int, programs: Programs) -> PairFilter:
    if isinstance(recipe, MixPreviousRecipe):
        return make_mix(recipe, round)
    if isinstance(recipe, ExactDuplicatesRecipe):
        return ExactDuplicates()
    if isinstance(recipe, NearDuplicatesRecipe):
        return NearDuplicates(recipe.ngram, recipe.threshold)
    if isinstance(recipe, ContradictionsRecipe):
        return Contradictions(recipe.keep)
    if isinstance(recipe, BalanceLengthRecipe):
        return BalanceLength()
    if isinstance(recipe, CapPerPromptRecipe):
        return CapPerPrompt(at_round(recipe.max_pairs, round))
    return programs[recipe.target]
