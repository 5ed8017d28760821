"""What every section of a recipe is made of. A field of type PerRound takes a number, or a list with one value per round
whose last value repeats.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

T = TypeVar("T")
PerRound = Annotated[
    Annotated[T, Tag("one value")] | Annotated[list[T], Tag("per round"), Field(min_length=1)],
    Discriminator(lambda value: "per round" if isinstance(value, list) else "one value"),
]
Share = Annotated[float, Field(gt=0, lt=1)]
TopP = Annotated[float, Field(gt=0, le=1)]
Revision = Annotated[str, Field(min_length=1)]  # a branch, a tag or a commit of a model on a hub


def at_round(value: T | list[T], round: int) -> T:
    """The value of a PerRound field in a round (0-based); the last entry of a list repeats."""
    return value[min(round, len(value) - 1)] if isinstance(value, list) else value


def optional_at_round(value: T | list[T] | None, round: int) -> T | None:
    """The same for a field that may be missing."""
    return None if value is None else at_round(value, round)


def rounds_that_differ(*values: object) -> int:
    """How many rounds it takes until none of these PerRound values changes any more."""
    return max(len(value) if isinstance(value, list) else 1 for value in values)


def split_by_weight(count: int, weights: Sequence[float]) -> list[int]:
    """`count` in whole parts that are as the weights, by largest remainder; of equal remainders the first gets one more. The
    parts add up to `count`. Weights are read as the decimal numbers that they were written as, so 0.1 is a tenth.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    quotas = [count * weight / sum(exact) for weight in exact]
    parts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(parts)), key=lambda i: parts[i] - quotas[i])
    for i in by_remainder[: count - sum(parts)]:
        parts[i] += 1
    return parts


def check_revision(model: str, revision: str | None) -> None:
    """ValueError where a revision is given of what has none: a folder."""
    if revision is not None and (model.startswith(("/", ".", "~")) or Path(model).is_dir()):
        raise ValueError(
            f"model_revision is {revision}, but the model {model} is a folder: only a model of a hub has revisions. Say "
            "model_revision: null, or name the model by its hub id"
        )


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
