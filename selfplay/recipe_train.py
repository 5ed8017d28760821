"""The section `train` of a recipe. Keys are Hugging Face's own, and TRL's for what only TRL has."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from selfplay.recipe_schedule import LENGTHLESS, ScheduleKwargs, ScheduleName, check_schedule
from selfplay.recipe_values import PerRound, Section

LossName = Literal["sigmoid", "hinge", "ipo", "sppo_hard", "sppo", "sigmoid_norm", "simpo", "sft"]

# What each loss reads beside the logps of the chosen completion. losses.py has the losses themselves.
_LOGRATIOS = frozenset({"rejected", "reference", "beta"})
READS: dict[str, frozenset[str]] = {
    "sigmoid": _LOGRATIOS | {"label_smoothing"},
    "hinge": _LOGRATIOS,
    "ipo": _LOGRATIOS,
    "sppo_hard": _LOGRATIOS,
    "sppo": _LOGRATIOS | {"win_rates"},
    "sigmoid_norm": _LOGRATIOS,
    "simpo": frozenset({"rejected", "beta", "simpo_gamma", "label_smoothing"}),
    "sft": frozenset(),
}
NUMBERS = ("beta", "label_smoothing", "simpo_gamma")
# Fields that only some recipes read: what reads them, and their value where the recipe says nothing. They are None where
# nothing reads them.
CONDITIONAL: dict[str, tuple[str, float | str]] = {
    "beta": ("beta", 0.1),
    "label_smoothing": ("label_smoothing", 0.0),
    "simpo_gamma": ("simpo_gamma", 0.5),
    "reference": ("reference", "prior"),
    "reference_logps": ("reference", "trainer"),
}
MIXUP_ALPHA = 0.6
REFERENCE_KINDS = ("prior", "initial", "ema")


def reads(names: Sequence[str]) -> frozenset[str]:
    """What some losses read together."""
    return frozenset[str]().union(*(READS[name] for name in names))


class LoraRecipe(Section):
    """A LoRA adapter in place of full weights, under peft's names. There is no dropout: the policy must equal its reference
    before the first step. `load_in_4bit` is QLoRA: the base that it is trained on holds 4-bit weights (nf4, double
    quantization), and the policy is the adapter on these.
    """

    r: PositiveInt = 16
    lora_alpha: PositiveInt = 32
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    use_rslora: bool = False
    load_in_4bit: bool = False


class TrainRecipe(Section):
    """The DPO step. `batch_size` counts pairs per optimizer step over all devices.

    `reference`: whose weights the policy is held to. "prior" is the policy that the round starts from, "initial" that of
    the run; "ema" mixes once a round, reference = ref_model_mixup_alpha * policy + (1 - ref_model_mixup_alpha) * reference
    of the round before; else the folder or hub id of a model, which keeps its place (the recipe's own model, named again, is
    that of its model_revision). `reference_logps: engine` takes the logps that the engine gave while it sampled, where the
    reference is the policy that sampled. `schedule_epochs` makes the learning rate's schedule as long as that many epochs, of
    which num_train_epochs are trained.
    """

    learning_rate: PerRound[PositiveFloat] = 5e-7
    loss_type: LossName | Annotated[list[LossName], Field(min_length=1)] = "sigmoid"
    loss_weights: list[PositiveFloat] | None = None
    beta: PerRound[PositiveFloat] | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = None
    simpo_gamma: NonNegativeFloat | None = None
    reference: str | None = None
    ref_model_mixup_alpha: Annotated[float, Field(gt=0, lt=1)] | None = None
    reference_logps: Literal["trainer", "engine"] | None = None
    batch_size: PerRound[PositiveInt] = 32
    num_train_epochs: PerRound[PositiveInt] = 1
    schedule_epochs: PositiveInt | None = None
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
    # tokens of one forward: auto is measured once in a run on a GPU, and 2048 on a CPU (train/budget.py)
    max_pack_tokens: PositiveInt | Literal["auto"] = "auto"
    # tokens of one row of it; null: all of them, but 2048 where the model's attention costs the square of a row
    max_pack_length: PositiveInt | None = None
    bf16: bool | Literal["auto"] = "auto"
    gradient_checkpointing: bool = False
    # sums of one order on CUDA too, where a job that goes on else differs by rounding; slower
    full_determinism: bool = False
    lora: LoraRecipe | None = None
    optimizer_state: Literal["fresh", "carried"] = "fresh"
    schedule_scope: Literal["round", "run"] = "round"
    shuffle: bool = True
    # steps between checkpoints; auto: 10 minutes, more where writing one takes over half a minute (train/checkpoint.py)
    save_steps: PositiveInt | Literal["auto"] = "auto"
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    max_audit_difference: PositiveFloat = 0.1

    @property
    def losses(self) -> list[str]:
        """`loss_type` as a list."""
        return list(self.loss_type) if isinstance(self.loss_type, list) else [self.loss_type]

    @property
    def reference_path(self) -> str | None:
        """The model that `reference` names; None where it is a kind, or nothing reads a reference."""
        return None if self.reference in (None, *REFERENCE_KINDS) else self.reference

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

    @model_validator(mode="before")
    @classmethod
    def _read_by_a_loss(cls, data: Any) -> Any:
        """Fills fields that a loss reads, and refuses values that none does: they would change nothing."""
        if not isinstance(data, dict):
            return data
        loss_type = data.get("loss_type", "sigmoid")
        names = loss_type if isinstance(loss_type, list) else [loss_type]
        if not all(isinstance(name, str) and name in READS for name in names):
            return data  # the field's own check says what is wrong
        filled = dict(data)
        for field, (what, default) in CONDITIONAL.items():
            given = filled.get(field)
            if what in reads(names):
                filled[field] = default if given is None else given
            elif given is not None:
                readers = ", ".join(name for name in READS if what in READS[name])
                raise ValueError(
                    f"{field} is {given}, but loss_type {' + '.join(names)} does not read it. Remove it (or say null), "
                    f"or choose a loss that does: {readers}"
                )
        mixup = filled.get("ref_model_mixup_alpha")
        if filled.get("reference") == "ema":
            filled["ref_model_mixup_alpha"] = MIXUP_ALPHA if mixup is None else mixup
        elif mixup is not None:
            raise ValueError(f"ref_model_mixup_alpha is {mixup}, which reference: ema alone reads. Remove it")
        return filled

    @model_validator(mode="after")
    def _consistent(self) -> "TrainRecipe":
        for steps in self.max_steps if isinstance(self.max_steps, list) else [self.max_steps]:
            if steps != -1 and steps < 1:
                raise ValueError(f"max_steps is {steps}; it must be positive, or -1 for num_train_epochs")
            if self.schedule_scope == "run" and steps == -1:
                raise ValueError("schedule_scope: run needs max_steps, so that the length of the run is known")
        if self.schedule_epochs is not None:
            self._check_schedule_epochs(self.schedule_epochs)
        rates, warmup = (v if isinstance(v, list) else [v] for v in (self.learning_rate, self.warmup_steps))
        check_schedule(self.lr_scheduler_type, self.lr_scheduler_kwargs, rates=rates, warmup=warmup)
        if self.optim == "rmsprop" and (self.adam_beta1, self.adam_beta2) != (0.9, 0.999):
            raise ValueError("adam_beta1 and adam_beta2 do nothing with optim rmsprop: drop them")
        if len(set(self.losses)) != len(self.losses):
            raise ValueError(
                f"loss_type names a loss twice: {', '.join(self.losses)}. Give it one weight in loss_weights"
            )
        if self.loss_weights is not None and len(self.loss_weights) != len(self.losses):
            raise ValueError(f"loss_weights has {len(self.loss_weights)} values for {len(self.losses)} losses")
        if self.reference is not None and not self.reference.strip():
            raise ValueError("reference is prior, initial, ema or a model, not an empty text")
        if self.reference == "ema" and self.lora is not None:
            raise ValueError(
                "reference: ema mixes full weights, and lora trains an adapter. Say prior or initial, or no lora"
            )
        if self.reference_logps == "engine" and self.reference != "prior":
            raise ValueError(
                f"reference_logps: engine takes the logps of the policy that sampled, but reference is {self.reference}. "
                "Say reference: prior, or reference_logps: trainer"
            )
        return self

    def _check_schedule_epochs(self, epochs: int) -> None:
        """ValueError where the length of a schedule is known otherwise, or is no longer than what is trained."""
        said = f"schedule_epochs is {epochs}, but"
        if self.schedule_scope == "run" or self.max_steps != -1:
            other = "schedule_scope: run" if self.schedule_scope == "run" else "max_steps"
            raise ValueError(f"{said} {other} says how long the schedule is. Drop one of them")
        warmup = self.warmup_steps if isinstance(self.warmup_steps, list) else [self.warmup_steps]
        if self.lr_scheduler_type in LENGTHLESS and not any(
            0 < one < 1 for one in warmup
        ):  # a share is one of the length
            raise ValueError(f"{said} the schedule {self.lr_scheduler_type} has no length: drop it")
        counts = self.num_train_epochs if isinstance(self.num_train_epochs, list) else [self.num_train_epochs]
        if epochs <= max(counts):
            raise ValueError(
                f"{said} num_train_epochs is {max(counts)}; a schedule that is longer than the training has more"
            )
