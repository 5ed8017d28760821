"""Groups and their judgements become preference pairs. One strategy per file, alternatives of PairSelector (protocols.py);
`make_selector` knows their names. What may enter a pair at all is said in eligible.py.

All are deterministic: a draw is a hash of the run's seed, the round, the prompt and what the completions are.
"""

from selfplay.pairs.all_above_margin import AllAboveMargin
from selfplay.pairs.best_vs_random import BestVsRandom
from selfplay.pairs.best_vs_worst import BestVsWorst
from selfplay.pairs.correct_vs_incorrect import CorrectVsIncorrect
from selfplay.pairs.eligible import unusable_reason, usable
from selfplay.pairs.gold_vs_completion import GoldVsCompletion
from selfplay.pairs.pair import make_pair
from selfplay.pairs.selection import Selection, select_pairs
from selfplay.pairs.top_k_vs_bottom_k import TopKVsBottomK
from selfplay.pairs.win_rates import WinRates
from selfplay.protocols import PairSelector
from selfplay.recipe_pairs import (
    AllAboveMarginRecipe,
    BestVsRandomRecipe,
    CorrectVsIncorrectRecipe,
    GoldVsCompletionRecipe,
    PairsRecipe,
    TopKVsBottomKRecipe,
    WinRatesRecipe,
)
from selfplay.recipe_values import at_round, optional_at_round

__all__ = [
    "AllAboveMargin",
    "BestVsRandom",
    "BestVsWorst",
    "CorrectVsIncorrect",
    "GoldVsCompletion",
    "Selection",
    "TopKVsBottomK",
    "WinRates",
    "make_pair",
    "make_selector",
    "select_pairs",
    "unusable_reason",
    "usable",
]


def make_selector(recipe: PairsRecipe, round: int, seed: int) -> PairSelector:
    """The selector that a recipe names, with the round's values. `seed` is that of the round's stage `pair`."""
    if isinstance(recipe, GoldVsCompletionRecipe):
        return GoldVsCompletion(at_round(recipe.max_pairs_per_prompt, round), recipe.truncated, seed)
    most, cut = optional_at_round(recipe.max_pairs_per_prompt, round), recipe.truncated
    if isinstance(recipe, AllAboveMarginRecipe):
        return AllAboveMargin(at_round(recipe.min_margin, round), most, cut, seed)
    if isinstance(recipe, TopKVsBottomKRecipe):
        return TopKVsBottomK(at_round(recipe.k, round), at_round(recipe.min_margin, round), most, cut, seed)
    assert most is not None, "only these two go without a cap"
    if isinstance(recipe, CorrectVsIncorrectRecipe):
        return CorrectVsIncorrect(recipe.correct_score, most, recipe.add_gold, cut, seed)
    margin = at_round(recipe.min_margin, round)
    if isinstance(recipe, BestVsRandomRecipe):
        return BestVsRandom(margin, most, cut, seed)
    best_vs_worst = BestVsWorst(margin, most, cut, optional_at_round(recipe.length_rho, round), seed)
    return WinRates(recipe.win_rate_from, best_vs_worst) if isinstance(recipe, WinRatesRecipe) else best_vs_worst
