"""Modules import only what stands before them, and what must start fast loads no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "selfplay"
# Lowest first; a name with a slash is a folder, inside which order is free. Beside the design's list: prompts are measured
# in tokens, so chat stands below them; a round's note is its line of metrics, so metrics stand below rounds; a judge may
# open a model, so models stand below judges.
ORDER = (
    "collection",
    "digests",
    "errors",
    "faults",
    "types",
    "protocols",
    "recipe_values",
    "targets",
    "recipe_schedule",
    "recipe_chat",
    "recipe_reward",
    "recipe_audit",
    "recipe_judges",
    "recipe_filters",
    "recipe_pairs",
    "recipe_train",
    "recipe_prompts",
    "recipe",
    "recipe_paths",
    "recipe_file",
    "adapters",
    "store",
    "model_files",
    "lock",
    "versions",
    "changes",
    "records",
    "scratch",
    "progress",
    "chat",
    "data_rows",
    "prompt_rows",
    "lazy_prompts",
    "prompts",
    "sources",
    "preferences",
    "generators/",
    "models",
    "judges/",
    "filters/",
    "pairs/",
    "losses",
    "train/",
    "evaluate",
    "agreement",
    "labelled",
    "pool_checks",
    "recipe_checks",
    "self_agreement",
    "canaries",
    "audit",
    "accounting",
    "stages",
    "pairing",
    "trust",
    "panel",
    "metrics",
    "parts",
    "run",
    "auditing",
    "rounds",
    "single",
    "single_pairs",
    "single_against",
    "single_evaluate",
    "calibrate",
    "single_train",
    "train_reward",
    "report_measure",
    "report",
    "report_texts",
    "report_compare",
    "plan_source",
    "plan_machine",
    "plan_models",
    "plan_memory",
    "plan",
    "gguf",
    "mini_data",
    "tasks",
    "commands/",
    "cli",
    "__init__",
    "__main__",
)
HEAVY = ("torch", "transformers", "vllm", "datasets", "accelerate", "trl", "openai", "httpx2")


def layer_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return parts[0] if len(parts) == 1 else f"{parts[0]}/"


def layer_named(module: str) -> str | None:
    """The layer of a dotted name under selfplay; None where it is no module but a name of the package itself."""
    name = module.split(".")[1]
    if (PACKAGE / name).is_dir():
        return f"{name}/"
    return name if (PACKAGE / f"{name}.py").is_file() else None


def imported(file: Path) -> set[str]:
    """Layers that a file imports, wherever in the file. The package itself is none: its names are looked up late."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            assert node.module is not None
            names |= {f"selfplay.{a.name}" for a in node.names} if node.module == "selfplay" else {node.module}
    found = {layer_named(name) for name in names if name.startswith("selfplay.")}
    return {layer for layer in found if layer is not None}


def test_every_module_has_its_place_in_the_order() -> None:
    layers = {layer_of(file) for file in PACKAGE.rglob("*.py")}
    assert len(layers) > 15
    assert layers <= set(ORDER)


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_imports_only_lower_layers(file: Path) -> None:
    own = ORDER.index(layer_of(file))
    assert {name for name in imported(file) if ORDER.index(name) > own} == set()


def test_the_front_door_and_its_lookups_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "from selfplay import store, rounds\nimport selfplay\n"
        "def f():\n    import selfplay.train.loop\n    from selfplay.judges.lift import pointwise\n"
    )
    assert imported(file) == {"store", "rounds", "train/", "judges/"}


@pytest.mark.parametrize(
    "module",
    [
        "selfplay",
        "selfplay.recipe_file",
        "selfplay.judges.verifier",
        "selfplay.judges.lift",
        "selfplay.pairs",
        "selfplay.filters",
        "selfplay.prompts",
    ],
)
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
