"""What may stand in `pairs.filters` of a recipe. selfplay/filters/ says what each does."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from selfplay.recipe_values import PerRound, Section, Share


class MixPreviousRecipe(Section):
    """Pairs of earlier rounds beside the new ones: of the last `window` rounds, or of all. `weights` are by age, in rounds
    (the last repeats), and multiply the loss of a pair; `share` is the largest share of mixed-in pairs.
    """

    kind: Literal["mix_previous"]
    window: PerRound[PositiveInt] | Literal["all"] = 1
    weights: Annotated[list[PositiveFloat], Field(min_length=1)] | None = None
    share: PerRound[Share] | None = None

    @model_validator(mode="after")
    def _weights_are_read(self) -> "MixPreviousRecipe":
        if self.window != "all" and self.weights is not None:
            longest = max(self.window) if isinstance(self.window, list) else self.window
            if len(self.weights) > longest:
                raise ValueError(
                    f"weights has {len(self.weights)} values, but window reaches back {longest} rounds only"
                )
        return self


class ExactDuplicatesRecipe(Section):
    kind: Literal["exact_duplicates"]


class NearDuplicatesRecipe(Section):
    """Token n-grams of `ngram` tokens; `threshold` is the similarity from which two pairs are near duplicates."""

    kind: Literal["near_duplicates"]
    ngram: PositiveInt = 3
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.8


class ContradictionsRecipe(Section):
    """`keep: newest` believes the newest round; by default both sides go."""

    kind: Literal["contradictions"]
    keep: Literal["none", "newest"] = "none"


class CapPerPromptRecipe(Section):
    kind: Literal["cap_per_prompt"]
    max_pairs: PerRound[PositiveInt]


class BalanceLengthRecipe(Section):
    """Weights under which the chosen completions of a round are as long as the rejected ones."""

    kind: Literal["balance_length"]


class PythonFilterRecipe(Section):
    """A function of the user: "file.py:name" or "package.module:name". Runs only with --allow-code."""

    kind: Literal["python"]
    target: Annotated[str, Field(pattern=r"^[^:]+:[A-Za-z_]\w*$")]


FilterRecipe = Annotated[
    MixPreviousRecipe
    | ExactDuplicatesRecipe
    | NearDuplicatesRecipe
    | ContradictionsRecipe
    | CapPerPromptRecipe
    | BalanceLengthRecipe
    | PythonFilterRecipe,
    Field(discriminator="kind"),
]
