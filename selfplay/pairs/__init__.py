"""Groups and their judgements become preference pairs. One strategy per file, alternatives of PairSelector (protocols.py);
`make_selector` knows their names. What may enter a pair at all is said in usable.py.

All are deterministic: a draw is a hash of the run's seed, the round, the prompt and what the completions are.
"""

from selfplay.pairs.all_above_margin import AllAboveMargin
from selfplay.pairs.best_vs_random import BestVsRandom
from selfplay.pairs.best_vs_worst import BestVsWorst
from selfplay.pairs.correct_vs_incorrect import CorrectVsIncorrect
from selfplay.pairs.gold_vs_completion import GoldVsCompletion
from selfplay.pairs.pair import make_pair
from selfplay.pairs.selection import Selection, select_pairs
from selfplay.pairs.top_k_vs_bottom_k import TopKVsBottomK
from selfplay.pairs.usable import unusable_reason, usable
from selfplay.pairs.win_rates import WinRates
from selfplay.protocols import PairSelector
from selfplay.recipe_pairs import (
    AllAboveMarginRecipe,
    BestVsRandomRecipe,
    BestVsWorstRecipe,
    CorrectVsIncorrectRecipe,
    GoldVsCompletionRecipe,
    PairsRecipe,
    TopKVsBottomKRecipe,
)
from selfplay.recipe_values import at_round

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
    if isinstance(recipe, CorrectVsIncorrectRecipe):
        most = at_round(recipe.max_pairs_per_prompt, round)
        return CorrectVsIncorrect(recipe.correct_score, most, recipe.add_gold, recipe.truncated, seed)
    margin = at_round(recipe.min_margin, round)
    if isinstance(recipe, AllAboveMarginRecipe):
        return AllAboveMargin(margin, at_round(recipe.max_pairs_per_prompt, round), recipe.truncated, seed)
    if isinstance(recipe, TopKVsBottomKRecipe):
        k, cap = at_round(recipe.k, round), at_round(recipe.max_pairs_per_prompt, round)
        return TopKVsBottomK(k, margin, cap, recipe.truncated, seed)
    if isinstance(recipe, BestVsRandomRecipe):
        return BestVsRandom(margin, at_round(recipe.max_pairs_per_prompt, round), recipe.truncated, seed)
    rho = at_round(recipe.length_rho, round)
    if isinstance(recipe, BestVsWorstRecipe):
        return BestVsWorst(margin, at_round(recipe.max_pairs_per_prompt, round), recipe.truncated, rho, seed)
    return WinRates(recipe.win_rate_from, BestVsWorst(margin, 1, recipe.truncated, rho, seed))
