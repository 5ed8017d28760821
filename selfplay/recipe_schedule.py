"""transformers' learning rate schedules by name, and what `train.lr_scheduler_kwargs` may say to each.

Those that follow the loss (reduce_lr_on_plateau, greedy) are left out: a resumed schedule is known by its step alone.
"""

from typing import Annotated, Literal, get_args

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from selfplay.recipe_values import Section, Share

ScheduleName = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]
Curve = Literal["linear", "cosine", "1-sqrt"]
TAKEN: dict[str, tuple[str, ...]] = {
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"),
}
LENGTHLESS = ("constant", "constant_with_warmup", "inverse_sqrt")  # the same rates however many steps there are
POLYNOMIAL_END = 1e-7  # transformers' default of lr_end
assert set(TAKEN) <= set(get_args(ScheduleName))


class ScheduleKwargs(Section):
    """What schedules take beside warm-up and length. Rates are learning rates; ratios are shares of `learning_rate`."""

    num_cycles: PositiveFloat | None = None
    lr_end: PositiveFloat | None = None
    power: PositiveFloat | None = None
    timescale: PositiveInt | None = None
    min_lr: PositiveFloat | None = None
    min_lr_rate: Share | None = None
    warmup_lr_rate: Annotated[float, Field(ge=0, lt=1)] | None = None
    num_decay_steps: PositiveInt | None = None
    warmup_type: Curve | None = None
    decay_type: Curve | None = None
    min_lr_ratio: Annotated[NonNegativeFloat, Field(lt=1)] | None = None

    def given(self) -> dict[str, float | int | str]:
        """What the recipe says."""
        found: dict[str, float | int | str] = self.model_dump(exclude_none=True)
        return found


def check_schedule(name: str, kwargs: ScheduleKwargs, *, rates: list[float], warmup: list[float]) -> None:
    """ValueError where a schedule would be told what it can't use, or not be told what it needs. `rates` and `warmup` are
    the learning_rate and warmup_steps of all rounds.
    """
    given, taken = kwargs.given(), TAKEN.get(name, ())
    if unknown := [key for key in given if key not in taken]:
        allowed = f"it takes {', '.join(taken)}" if taken else "it takes none"
        raise ValueError(f"lr_scheduler_kwargs: {name} has no {', '.join(unknown)}; {allowed}")
    if name == "constant" and any(warmup):
        raise ValueError("lr_scheduler_type constant has no warm-up: say constant_with_warmup, or drop warmup_steps")
    if "min_lr" in taken and ("min_lr" in given) == ("min_lr_rate" in given):
        raise ValueError(f"lr_scheduler_kwargs: {name} needs min_lr or min_lr_rate, one of them")
    if name == "warmup_stable_decay" and "num_decay_steps" not in given:
        raise ValueError("lr_scheduler_kwargs: warmup_stable_decay needs num_decay_steps")
    lowest = given.get("min_lr", given.get("lr_end", POLYNOMIAL_END if name == "polynomial" else 0.0))
    if not float(lowest) < min(rates):
        raise ValueError(f"the schedule {name} ends at {lowest:g}, which is not below learning_rate {min(rates):g}")
