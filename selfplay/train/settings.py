"""What one training job is: plain values that travel as JSON to the process that trains."""

import importlib.util
from dataclasses import dataclass
from typing import Any

from selfplay.errors import RecipeError
from selfplay.recipe_train import TrainRecipe
from selfplay.recipe_values import at_round

KEPT_CHECKPOINTS = 2
# of an optimizer's state, for each parameter that trains
STATE_BYTES = {"adamw_torch": 8, "adamw_bnb_8bit": 2, "rmsprop": 4}


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """recipe.TrainRecipe for one round: every list replaced by the round's value."""

    learning_rate: float
    loss_type: list[str]
    loss_weights: list[float]
    beta: float | None  # this and the next three: None where no loss reads it
    label_smoothing: float | None
    simpo_gamma: float | None
    reference_logps: str | None
    batch_size: int
    num_train_epochs: int
    max_steps: int
    optim: str
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    lr_scheduler_type: str
    lr_scheduler_kwargs: dict[str, float | int | str]
    warmup_steps: float
    max_grad_norm: float
    max_length: int | None
    max_pack_tokens: int | None  # None: measured once, and kept in a file of the run
    max_pack_length: int | None  # None: as long as the model's attention allows
    bf16: bool
    gradient_checkpointing: bool
    full_determinism: bool
    lora: dict[str, Any] | None  # recipe_train.LoraRecipe; None trains all weights
    shuffle: bool
    save_steps: int | str
    save_dtype: str
    max_audit_difference: float

    @property
    def load_in_4bit(self) -> bool:
        """Whether the base of an adapter is loaded as 4-bit weights."""
        return self.lora is not None and bool(self.lora["load_in_4bit"])

    @property
    def loss_numbers(self) -> dict[str, float | None]:
        """What losses.total_loss hands to the losses."""
        return {"beta": self.beta, "label_smoothing": self.label_smoothing, "simpo_gamma": self.simpo_gamma}


@dataclass(frozen=True, slots=True)
class TrainJob:
    """Paths and settings of one round's training. `pairs` is a file of pairs or of demonstrations. `reference` is None where
    the policy before its first step is the reference; with `ref_model_mixup_alpha` it is the reference of the round before,
    into which the policy is mixed. `groups` are shards of what the policy sampled, for the audit; none where nothing was.

    `pack_budget` is the file that keeps what `max_pack_tokens: auto` became; without one it is kept in `out`.
    `first_step` and `total_steps` place the job in a schedule that spans the run; None where it spans this job, or
    `schedule_epochs` epochs of its rows.
    """

    policy: str
    pairs: str
    out: str
    settings: TrainSettings
    seed: int
    reference: str | None = None
    ref_model_mixup_alpha: float | None = None
    groups: tuple[str, ...] = ()
    optimizer_state: str | None = None
    keep_optimizer_state: bool = False
    pack_budget: str | None = None
    first_step: int = 0
    total_steps: int | None = None
    schedule_epochs: int | None = None
    chat_template: str | None = None

    @property
    def schedule(self) -> list[int | None]:
        """What tells the schedules of two jobs over the same rows apart."""
        span = [self.first_step, self.total_steps]
        return span if self.schedule_epochs is None else [*span, self.schedule_epochs]


def schedule_span(recipe: TrainRecipe, round: int, *, rounds: int) -> tuple[int, int | None]:
    """(first step, total steps) of a round's place in the schedule; the total is None where each round has its own."""
    if recipe.schedule_scope == "round":
        return 0, None
    steps = [at_round(recipe.max_steps, r) for r in range(rounds)]
    return sum(steps[:round]), sum(steps)


def settings_at(recipe: TrainRecipe, round: int, *, bf16: bool) -> TrainSettings:
    """The settings of a round (0-based); `bf16` is what `auto` became."""
    values: dict[str, Any] = {name: at_round(getattr(recipe, name), round) for name in TrainSettings.__slots__}
    names = recipe.losses
    values |= {"loss_type": names, "loss_weights": recipe.loss_weights or [1.0] * len(names), "bf16": bf16}
    values["max_pack_tokens"] = None if recipe.max_pack_tokens == "auto" else recipe.max_pack_tokens
    values["lora"] = recipe.lora.model_dump() if recipe.lora is not None else None
    values["lr_scheduler_kwargs"] = recipe.lr_scheduler_kwargs.given()
    return TrainSettings(**values)


def require_packages(recipe: TrainRecipe) -> None:
    """RecipeError where training needs a package that isn't installed: asked at the start of a run, not when training
    begins.
    """
    four_bit = recipe.lora is not None and recipe.lora.load_in_4bit
    wanted = (
        ("train.optim adamw_bnb_8bit", "bitsandbytes", "bnb", "adamw_torch", recipe.optim == "adamw_bnb_8bit"),
        ("train.lora.load_in_4bit", "bitsandbytes", "bnb", "load_in_4bit: false", four_bit),
        ("train.lora", "peft", "peft", "no lora", recipe.lora is not None),
    )
    for what, package, extra, instead, asked in wanted:
        if asked and importlib.util.find_spec(package) is None:
            raise RecipeError(
                f'{what} needs {package}, which is not installed: pip install "selfplay-dpo[{extra}]", or take {instead}'
            )
