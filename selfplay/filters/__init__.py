"""Filters look at all pairs of a round, after the selector and before training; a recipe lists them in `pairs.filters` and
they work in that order. One per file, alternatives of PairFilter (protocols.py); `make_filters` knows their names.
"""

from pathlib import Path

from selfplay.filters.apply import FilterCounts, NamedFilter, apply_filters
from selfplay.filters.cap_per_prompt import CapPerPrompt
from selfplay.filters.contradictions import Contradictions
from selfplay.filters.exact_duplicates import ExactDuplicates
from selfplay.filters.mix_previous import MixPrevious
from selfplay.filters.near_duplicates import NearDuplicates
from selfplay.filters.python import load_filter
from selfplay.protocols import PairFilter
from selfplay.recipe_filters import (
    CapPerPromptRecipe,
    ContradictionsRecipe,
    ExactDuplicatesRecipe,
    FilterRecipe,
    MixPreviousRecipe,
    NearDuplicatesRecipe,
)
from selfplay.recipe_pairs import AnyPairs
from selfplay.recipe_values import at_round

__all__ = ["FilterCounts", "NamedFilter", "apply_filters", "make_filters"]


def make_filters(recipe: AnyPairs, round: int, *, allow_code: bool) -> list[NamedFilter]:
    """The filters that a recipe lists, with the round's values. SecurityError where one is a program that nobody allowed."""
    return [NamedFilter(_name(one), _make_filter(one, round, allow_code)) for one in recipe.filters]


def _name(recipe: FilterRecipe) -> str:
    return recipe.kind


def _make_filter(recipe: FilterRecipe, round: int, allow_code: bool) -> PairFilter:
    if isinstance(recipe, MixPreviousRecipe):
        window = None if recipe.window == "all" else at_round(recipe.window, round)
        return MixPrevious(window, tuple(recipe.weights or (1.0,)), at_round(recipe.share, round))
    if isinstance(recipe, ExactDuplicatesRecipe):
        return ExactDuplicates()
    if isinstance(recipe, NearDuplicatesRecipe):
        return NearDuplicates(recipe.ngram, recipe.threshold)
    if isinstance(recipe, ContradictionsRecipe):
        return Contradictions(recipe.keep)
    if isinstance(recipe, CapPerPromptRecipe):
        return CapPerPrompt(at_round(recipe.max_pairs, round))
    return load_filter(recipe.target, Path(), allow_code=allow_code)
