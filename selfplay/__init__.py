"""Rounds of self-play for language models: prompts -> groups -> judgements -> pairs -> policy, and again.

    import selfplay

    @selfplay.pointwise
    def shorter(prompt, completion):
        return -len(completion.text)

    selfplay.iterate("recipe.yaml", "runs/shorter", judge=shorter)

Every public name stands below. A name is imported when it is first used, so `import selfplay` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfplay.errors import (
        AuditError,
        DataError,
        GateError,
        GeneratorError,
        JudgeError,
        LockedError,
        NonFiniteError,
        NoPairsError,
        RecipeError,
        SecurityError,
        SelfplayError,
        Stopped,
        StorageError,
        TrainerError,
        UnparsedGateError,
    )
    from selfplay.generators.scripted import ScriptedGenerator
    from selfplay.judges import make_judge
    from selfplay.judges.lift import pairwise, pointwise
    from selfplay.metrics import status
    from selfplay.protocols import FilterContext, Generator, Judge, JudgeContext, PairFilter, PairSelector
    from selfplay.recipe import Recipe
    from selfplay.recipe_file import load_recipe
    from selfplay.rounds import iterate
    from selfplay.single import read_groups, read_judgements
    from selfplay.types import Completion, Group, Judgement, Message, PreferencePair, Prompt, Sampling

__version__ = "0.1.0"

_HOMES = {
    "selfplay.errors": (
        "AuditError",
        "DataError",
        "GateError",
        "GeneratorError",
        "JudgeError",
        "LockedError",
        "NoPairsError",
        "NonFiniteError",
        "RecipeError",
        "SecurityError",
        "SelfplayError",
        "Stopped",
        "StorageError",
        "TrainerError",
        "UnparsedGateError",
    ),
    "selfplay.generators.scripted": ("ScriptedGenerator",),
    "selfplay.judges": ("make_judge",),
    "selfplay.judges.lift": ("pairwise", "pointwise"),
    "selfplay.metrics": ("status",),
    "selfplay.protocols": ("FilterContext", "Generator", "Judge", "JudgeContext", "PairFilter", "PairSelector"),
    "selfplay.recipe": ("Recipe",),
    "selfplay.recipe_file": ("load_recipe",),
    "selfplay.rounds": ("iterate",),
    "selfplay.single": ("read_groups", "read_judgements"),
    "selfplay.types": ("Completion", "Group", "Judgement", "Message", "PreferencePair", "Prompt", "Sampling"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022 - in the order of use
    "load_recipe",
    "Recipe",
    "iterate",
    "status",
    "pointwise",
    "pairwise",
    "make_judge",
    "read_groups",
    "read_judgements",
    "ScriptedGenerator",
    "Message",
    "Prompt",
    "Completion",
    "Group",
    "Judgement",
    "PreferencePair",
    "Sampling",
    "Generator",
    "Judge",
    "JudgeContext",
    "PairSelector",
    "PairFilter",
    "FilterContext",
    "SelfplayError",
    "RecipeError",
    "DataError",
    "JudgeError",
    "GeneratorError",
    "StorageError",
    "TrainerError",
    "Stopped",
    "GateError",
    "UnparsedGateError",
    "NoPairsError",
    "NonFiniteError",
    "AuditError",
    "SecurityError",
    "LockedError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'selfplay' has no attribute {name!r}")
    value = vars(import_module(_HOME_OF[name]))[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
