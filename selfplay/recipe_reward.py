"""The judge `reward_model` of a recipe: a sequence classifier with one label, whose raw logit is the score."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from selfplay.recipe_values import Section


class RewardModelRecipe(Section):
    """`model` is a folder (`selfplay train-reward` makes one) or a hub id. `chat_template` stands in for its tokenizer's own.
    A prompt and completion of more than `max_length` tokens get no verdict; the default is the model's own length.
    `max_batch_tokens` counts padding. `dtype: auto` computes as the weights are stored.

    `calibration` names labelled preference pairs on which the model's accuracy is measured before anything is sampled. A
    model that is not shown to beat chance is refused, unless `allow_chance` is true.
    """

    kind: Literal["reward_model"]
    model: Annotated[str, Field(min_length=1)]
    chat_template: str | None = None
    max_length: PositiveInt | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_batch_tokens: PositiveInt = 16384
    calibration: str | None = None
    allow_chance: bool = False


# What may change on a run that goes on: how rewards are computed, and whether they are trusted, never what they are.
REWARD_CONDUCT = ("device", "max_batch_tokens", "allow_chance")
