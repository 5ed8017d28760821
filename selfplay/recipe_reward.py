"""The judge `reward_model` of a recipe, a sequence classifier with one label whose raw logit is the score; and how one is
trained.
"""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from selfplay.recipe_values import Revision, Section, Share, check_revision


class RewardModelRecipe(Section):
    """`model` is a folder (`selfplay train-reward` makes one) or a hub id, of which `model_revision` is a revision.
    `chat_template` stands in for its tokenizer's own. A prompt and completion of more than `max_length` tokens get no verdict;
    the default is the model's own length. `max_batch_tokens` counts padding. `dtype: auto` computes as the weights are stored.
    `data_parallel_size` copies score at a time, each on a GPU of its own.

    `calibration` names labelled preference pairs on which the model's accuracy is measured before anything is sampled. A
    model that is not shown to beat chance is refused, unless `allow_chance` is true.
    """

    kind: Literal["reward_model"]
    model: Annotated[str, Field(min_length=1)]
    model_revision: Revision | None = None
    chat_template: str | None = None
    max_length: PositiveInt | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_batch_tokens: PositiveInt = 16384
    data_parallel_size: PositiveInt = 1
    calibration: str | None = None
    allow_chance: bool = False

    @model_validator(mode="after")
    def _revision_of_a_hub_id(self) -> "RewardModelRecipe":
        check_revision(self.model, self.model_revision)
        return self


# What may change on a run that goes on: how rewards are computed, and whether they are trusted, never what they are.
REWARD_CONDUCT = ("device", "max_batch_tokens", "data_parallel_size", "calibration", "allow_chance")


class RewardTraining(Section):
    """How `selfplay train-reward` trains: its flags under Hugging Face's names. `batch_size` counts pairs, `heldout` is a
    share of the prompts. `center_rewards_coefficient` 0 leaves the rewards' mean free.
    """

    learning_rate: PositiveFloat = 1e-5
    batch_size: PositiveInt = 16
    num_train_epochs: PositiveInt = 1
    max_length: PositiveInt | None = None
    heldout: Share = 0.2
    center_rewards_coefficient: NonNegativeFloat = 0.0
    weight_decay: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeFloat = 0.1
    lr_scheduler_type: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    max_batch_tokens: PositiveInt = 4096
    bf16: bool | Literal["auto"] = "auto"
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    seed: NonNegativeInt = 0
