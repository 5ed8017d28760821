"""The section `pairs` of a recipe: one class per selector, each with the options that it reads and no others.

selfplay/pairs/ says what each does, and which paper it is from; recipe_filters.py holds what may stand in `filters`.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, NonNegativeFloat, PositiveInt, Tag, model_validator

from selfplay.recipe_filters import FilterRecipe, MixPreviousRecipe
from selfplay.recipe_values import PerRound, Section, at_round

# below a half, so that the scores of the chosen tier stay above those of the rejected one
Rho = Annotated[float, Field(ge=0, lt=0.5)]
DEFAULT_KIND = "best_vs_worst"
MAX_UNPARSED = 0.05


class AnyPairs(Section):
    """What every kind has."""

    reads_scores: ClassVar[bool] = False

    kind: str
    filters: list[FilterRecipe] = []

    @property
    def needs_gold(self) -> bool:
        """Whether every prompt must have a gold answer."""
        return False

    @property
    def min_completions(self) -> int:
        """With fewer completions, and the gold answer where it is read, there is nothing to compare."""
        return 1 if self.needs_gold else 2

    @property
    def unparsed_bound(self) -> float:
        """The largest share of verdicts that can't be read, and of completions without a score, where a judge is asked."""
        return MAX_UNPARSED

    def most_pairs(self, round: int, num_completions: int) -> int:
        """The most pairs that one prompt can give in a round, before filters."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _mixed_once(self) -> "AnyPairs":
        if sum(isinstance(one, MixPreviousRecipe) for one in self.filters) > 1:
            raise ValueError("filters: mix_previous is there twice, which would add the same pairs twice; keep one")
        return self


class ScoredPairs(AnyPairs):
    """What every kind that reads scores has. `truncated: judged` takes a completion that max_tokens cut as the judge scored
    it; by default it enters no pair. Where the judge fails what is cut, as rules do, its pairs teach the policy to end in time,
    which nothing else does: without them completions may grow from round to round.
    """

    reads_scores: ClassVar[bool] = True

    truncated: Literal["drop", "judged"] = "drop"
    max_unparsed: Annotated[float, Field(ge=0, le=1)] = MAX_UNPARSED

    @property
    def unparsed_bound(self) -> float:
        return self.max_unparsed


class BestVsWorstRecipe(ScoredPairs):
    """`length_rho` is the length control of Meta-Rewarding; without it pairs are those closest in length."""

    kind: Literal["best_vs_worst"] = "best_vs_worst"
    min_margin: PerRound[NonNegativeFloat] = 0.0
    max_pairs_per_prompt: PerRound[PositiveInt] = 1
    length_rho: PerRound[Rho] | None = None

    def most_pairs(self, round: int, num_completions: int) -> int:
        return at_round(self.max_pairs_per_prompt, round)


class WinRatesRecipe(ScoredPairs):
    """Best against worst with both win rates, for a loss that reads them. `win_rate_from` says what the judge's scores are:
    win rates already (`scores`: a pairwise judge), ranks (`order`), or rewards (`bradley_terry`).
    """

    kind: Literal["win_rates"]
    win_rate_from: Literal["scores", "order", "bradley_terry"] = "scores"
    min_margin: PerRound[NonNegativeFloat] = 0.0
    max_pairs_per_prompt: PerRound[PositiveInt] = 1
    length_rho: PerRound[Rho] | None = None

    def most_pairs(self, round: int, num_completions: int) -> int:
        return at_round(self.max_pairs_per_prompt, round)


class BestVsRandomRecipe(ScoredPairs):
    kind: Literal["best_vs_random"]
    min_margin: PerRound[NonNegativeFloat] = 0.0
    max_pairs_per_prompt: PerRound[PositiveInt] = 1

    def most_pairs(self, round: int, num_completions: int) -> int:
        return min(at_round(self.max_pairs_per_prompt, round), num_completions - 1)


class TopKVsBottomKRecipe(ScoredPairs):
    """`max_pairs_per_prompt` keeps the pairs of the largest margins; without it all k * k are made."""

    kind: Literal["top_k_vs_bottom_k"]
    k: PerRound[PositiveInt]
    min_margin: PerRound[NonNegativeFloat] = 0.0
    max_pairs_per_prompt: PerRound[PositiveInt] | None = None

    def most_pairs(self, round: int, num_completions: int) -> int:
        return _at_most(at_round(self.k, round) ** 2, self.max_pairs_per_prompt, round)


class AllAboveMarginRecipe(ScoredPairs):
    """`max_pairs_per_prompt` draws that many of a prompt's pairs; without it all are made."""

    kind: Literal["all_above_margin"]
    min_margin: PerRound[NonNegativeFloat]
    max_pairs_per_prompt: PerRound[PositiveInt] | None = None

    def most_pairs(self, round: int, num_completions: int) -> int:
        return _at_most(num_completions * (num_completions - 1) // 2, self.max_pairs_per_prompt, round)


class CorrectVsIncorrectRecipe(ScoredPairs):
    """A completion is correct where its score is at least `correct_score`. `add_gold` puts the gold answer beside them."""

    kind: Literal["correct_vs_incorrect"]
    correct_score: float = 1.0
    max_pairs_per_prompt: PerRound[PositiveInt] = 10
    add_gold: bool = False

    @property
    def needs_gold(self) -> bool:
        return self.add_gold

    def most_pairs(self, round: int, num_completions: int) -> int:
        both = num_completions + self.add_gold
        return _at_most((both // 2) * (both - both // 2), self.max_pairs_per_prompt, round)


class GoldVsCompletionRecipe(AnyPairs):
    """SPIN reads no scores. `truncated: rejected` also rejects completions that max_tokens cut."""

    kind: Literal["gold_vs_completion"]
    max_pairs_per_prompt: PerRound[PositiveInt] = 1
    truncated: Literal["drop", "rejected"] = "drop"

    @property
    def needs_gold(self) -> bool:
        return True

    def most_pairs(self, round: int, num_completions: int) -> int:
        return min(at_round(self.max_pairs_per_prompt, round), num_completions)


def _at_most(count: int, cap: Any, round: int) -> int:
    return count if cap is None else min(count, at_round(cap, round))


def _kind(value: Any) -> Any:
    if isinstance(value, AnyPairs):
        return value.kind
    return value.get("kind", DEFAULT_KIND) if isinstance(value, dict) else DEFAULT_KIND


PairsRecipe = Annotated[
    Annotated[BestVsWorstRecipe, Tag("best_vs_worst")]
    | Annotated[BestVsRandomRecipe, Tag("best_vs_random")]
    | Annotated[TopKVsBottomKRecipe, Tag("top_k_vs_bottom_k")]
    | Annotated[AllAboveMarginRecipe, Tag("all_above_margin")]
    | Annotated[CorrectVsIncorrectRecipe, Tag("correct_vs_incorrect")]
    | Annotated[GoldVsCompletionRecipe, Tag("gold_vs_completion")]
    | Annotated[WinRatesRecipe, Tag("win_rates")],
    Discriminator(_kind),
]
