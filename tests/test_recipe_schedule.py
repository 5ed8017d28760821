"""What a recipe may say of schedules and optimizers, refused at load where it means nothing."""

import inspect
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler

from selfplay.recipe_schedule import LENGTHLESS, TAKEN, ScheduleName
from selfplay.recipe_train import TrainRecipe
from selfplay.train.settings import settings_at

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a kwarg of another schedule": ({"lr_scheduler_kwargs": {"power": 2.0}}, "linear has no power; it takes none"),
    "one of its own missing": ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs min_lr or min_lr_rate, one of them"),
    "both of two": (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-9, "min_lr_rate": 0.1}},
        "one of them",
    ),
    "no decay steps": ({"lr_scheduler_type": "warmup_stable_decay"}, "needs num_decay_steps"),
    "warm-up of constant": ({"lr_scheduler_type": "constant", "warmup_steps": [0, 5]}, "constant_with_warmup"),
    "an end above the rate": (
        {"lr_scheduler_type": "polynomial", "learning_rate": [1e-6, 1e-7]},
        "ends at 1e-07, which is not below learning_rate 1e-07",
    ),
    "a lowest rate above the rate": (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-3}},
        "ends at 0.001",
    ),
    "a schedule that follows the loss": ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "Input should be"),
    "no checkpoints": ({"save_steps": 0}, "save_steps"),
    "two lengths, the run's": (
        {"schedule_epochs": 3, "schedule_scope": "run", "max_steps": 5},
        "schedule_epochs is 3, but schedule_scope: run says how long",
    ),
    "two lengths, in steps": ({"schedule_epochs": 3, "max_steps": [-1, 5]}, "but max_steps says how long"),
    "a length of what has none": ({"schedule_epochs": 3, "lr_scheduler_type": "constant"}, "constant has no length"),
    "a length of what has none, with warm-up in steps": (
        {"schedule_epochs": 3, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": [0, 5]},
        "constant_with_warmup has no length",
    ),
    "a length of what falls for ever": (
        {"schedule_epochs": 3, "lr_scheduler_type": "inverse_sqrt", "warmup_steps": 5},
        "inverse_sqrt has no length",
    ),
    "a schedule that ends with the training": (
        {"schedule_epochs": 2, "num_train_epochs": [1, 2]},
        "schedule_epochs is 2, but num_train_epochs is 2",
    ),
    "betas of rmsprop": ({"optim": "rmsprop", "adam_beta1": 0.5}, "do nothing with optim rmsprop"),
}


@pytest.mark.parametrize("case", WRONG)
def test_senseless_schedules_and_optimizers_are_refused(case: str) -> None:
    values, said = WRONG[case]
    with pytest.raises(ValidationError, match=said):
        TrainRecipe.model_validate(values)


def test_what_a_schedule_takes_reaches_the_trainer_and_nothing_else_does() -> None:
    recipe = TrainRecipe.model_validate(
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0, "lr_end": 1e-8}}
    )
    assert settings_at(recipe, 0, bf16=False).lr_scheduler_kwargs == {"power": 2.0, "lr_end": 1e-8}
    again = TrainRecipe.model_validate(recipe.model_dump())  # with every null that a resolved recipe spells out
    assert again == recipe
    assert settings_at(TrainRecipe(), 0, bf16=False).lr_scheduler_kwargs == {}


def test_a_warm_up_that_is_a_share_has_a_length() -> None:
    for name in ("constant_with_warmup", "inverse_sqrt"):
        values = {"schedule_epochs": 3, "lr_scheduler_type": name, "warmup_steps": [5, 0.1]}
        assert TrainRecipe.model_validate(values).schedule_epochs == 3


def test_the_rates_of_a_schedule_without_a_length_are_those_of_any_length() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    needed = {
        "cosine_with_min_lr": {"min_lr": 1e-9},
        "cosine_warmup_with_min_lr": {"min_lr": 1e-9},
        "warmup_stable_decay": {"num_decay_steps": 5},
    }

    def rate(name: str, length: int) -> float:
        made = get_scheduler(
            name,
            torch.optim.SGD([parameter], lr=1.0),
            num_warmup_steps=2,
            num_training_steps=length,
            scheduler_specific_kwargs=needed.get(name, {}),
        )
        return float(made.lr_lambdas[0](9))

    assert [name for name in get_args(ScheduleName) if rate(name, 10) == rate(name, 1000)] == [*LENGTHLESS]


def test_transformers_takes_what_the_table_says() -> None:
    for name, taken in TAKEN.items():
        function = next(f for kind, f in TYPE_TO_SCHEDULER_FUNCTION.items() if kind.value == name)
        assert {*taken} <= {*inspect.signature(function).parameters}, name
