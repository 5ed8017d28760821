import subprocess
import sys

import pytest

import selfplay

NAMES = {
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
}


def test_the_public_names_are_these_and_no_others() -> None:
    assert sorted(selfplay.__all__) == sorted(NAMES)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(selfplay, name).__name__ == name


def test_every_error_of_ours_is_public() -> None:
    from selfplay import errors

    ours = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert ours <= NAMES


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'itreate'"):
        selfplay.itreate  # noqa: B018


def test_the_version_is_the_package_s() -> None:
    from importlib.metadata import version

    assert selfplay.__version__ == version("selfplay-dpo")


def test_importing_selfplay_and_its_light_names_loads_no_torch() -> None:
    code = (
        "import sys, selfplay; selfplay.load_recipe; selfplay.pointwise; selfplay.make_judge; selfplay.status; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
