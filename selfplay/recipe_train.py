"""The section `train` of a recipe. Keys are Hugging Face's own."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from selfplay.recipe_schedule import ScheduleKwargs, ScheduleName, check_schedule
from selfplay.recipe_values import PerRound, Section

LossName = Literal["sigmoid", "sft"]


class LoraRecipe(Section):
    """A LoRA adapter in place of full weights, under peft's names. There is no dropout: the policy must equal its reference
    before the first step.
    """

    r: PositiveInt = 16
    lora_alpha: PositiveInt = 32
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    use_rslora: bool = False


class TrainRecipe(Section):
    """The DPO step. `batch_size` counts pairs per optimizer step over all devices."""

    learning_rate: PerRound[PositiveFloat] = 5e-7
    beta: PerRound[PositiveFloat] = 0.1
    loss_type: LossName | Annotated[list[LossName], Field(min_length=1)] = "sigmoid"
    loss_weights: list[PositiveFloat] | None = None
    batch_size: PerRound[PositiveInt] = 32
    num_train_epochs: PerRound[PositiveInt] = 1
    max_steps: PerRound[int] = -1
    optim: Literal["adamw_torch", "adamw_bnb_8bit", "rmsprop"] = "adamw_torch"
    weight_decay: NonNegativeFloat = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: PositiveFloat = 1e-8
    lr_scheduler_type: ScheduleName = "linear"
    lr_scheduler_kwargs: ScheduleKwargs = ScheduleKwargs()
    warmup_steps: PerRound[NonNegativeFloat] = 0.0
    max_grad_norm: PositiveFloat = 1.0
    max_length: PositiveInt | None = None
    max_pack_tokens: PositiveInt = 2048
    bf16: bool | Literal["auto"] = "auto"
    gradient_checkpointing: bool = False
    lora: LoraRecipe | None = None
    reference: Literal["prior", "initial"] = "prior"
    optimizer_state: Literal["fresh", "carried"] = "fresh"
    schedule_scope: Literal["round", "run"] = "round"
    shuffle: bool = True
    # steps between checkpoints; auto: 10 minutes, more where writing one takes over half a minute (train/checkpoint.py)
    save_steps: PositiveInt | Literal["auto"] = "auto"
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    max_audit_difference: PositiveFloat = 0.1

    @model_validator(mode="before")
    @classmethod
    def _old_warmup_name(cls, data: Any) -> Any:
        # transformers 5 dropped warmup_ratio for a warmup_steps below 1, but every published recipe still has it
        if isinstance(data, dict) and "warmup_ratio" in data:
            if "warmup_steps" in data:
                raise ValueError("warmup_steps and warmup_ratio are the same setting: keep one")
            ratios = data["warmup_ratio"] if isinstance(data["warmup_ratio"], list) else [data["warmup_ratio"]]
            if any(isinstance(ratio, int | float) and ratio >= 1 for ratio in ratios):
                raise ValueError(
                    f"warmup_ratio is {data['warmup_ratio']}; a ratio is below 1 (warmup_steps takes steps)"
                )
            data = {k: v for k, v in data.items() if k != "warmup_ratio"} | {"warmup_steps": data["warmup_ratio"]}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> "TrainRecipe":
        for steps in self.max_steps if isinstance(self.max_steps, list) else [self.max_steps]:
            if steps != -1 and steps < 1:
                raise ValueError(f"max_steps is {steps}; it must be positive, or -1 for num_train_epochs")
            if self.schedule_scope == "run" and steps == -1:
                raise ValueError("schedule_scope: run needs max_steps, so that the length of the run is known")
        rates, warmup = (v if isinstance(v, list) else [v] for v in (self.learning_rate, self.warmup_steps))
        check_schedule(self.lr_scheduler_type, self.lr_scheduler_kwargs, rates=rates, warmup=warmup)
        if self.optim == "rmsprop" and (self.adam_beta1, self.adam_beta2) != (0.9, 0.999):
            raise ValueError("adam_beta1 and adam_beta2 do nothing with optim rmsprop: drop them")
        num_losses = len(self.loss_type) if isinstance(self.loss_type, list) else 1
        if self.loss_weights is not None and len(self.loss_weights) != num_losses:
            raise ValueError(f"loss_weights has {len(self.loss_weights)} values for {num_losses} losses")
        return self
