"""What the README says to run is run, on a tiny model, and its file map is the tree."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

import selfplay
from selfplay.cli import app
from selfplay.errors import NoPairsError, UnparsedGateError
from selfplay.recipe_file import check_recipe, load_recipe, parse_yaml
from selfplay.recipe_filters import FilterRecipe
from selfplay.recipe_pairs import PairsRecipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for language, block in BLOCKS
    for line in block.splitlines()
    if not language and line.startswith(".venv/bin/selfplay ")
]
TINY = [
    "rounds=1",
    "generator.kind=transformers",
    "generator.max_tokens=60",
    "prompts.num_prompts=6",
    "evaluate.num_prompts=2",
    "evaluate.num_completions=1",
    "train.bf16=false",
]


@pytest.fixture
def checkout(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A folder like a checkout's: recipes and mini data. Returns the overrides that make a recipe tiny."""
    rows = [{"instruction": f"Count to {n}.", "input": "", "output": f"One to {n}."} for n in range(100)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "alpaca_en_demo.json").write_text(json.dumps(rows))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    return [*TINY, f"model={tiny}"]


def tiny_overrides(command: list[str], overrides: list[str], tmp_path: Path) -> list[str]:
    sets = list(overrides)
    if any("spin_mini" in word for word in command):
        sets += [f"prompts.source={tmp_path / 'data' / 'alpaca_en_demo.json'}"]
    if any("self_rewarding" in word for word in command):
        # the tiny tokenizer has no token for a whole word
        shipped = (ROOT / "selfplay" / "judges" / "templates" / "yes_no.md").read_text(encoding="utf-8")
        template = tmp_path / "y_n.md"
        template.write_text(shipped.replace("{yes: 1, Yes: 1, no: 0, No: 0}", "{y: 1, n: 0}").replace("0.01", "0.0"))
        sets += [f"judge.template={template}"]
    if any("quickstart" in word for word in command):
        sets += ["judge.score=share", "judge.truncated_fails=false"]
    return [word for one in sets for word in ("--set", one)]


def test_the_readmes_commands_run_in_its_order(checkout: list[str], tmp_path: Path) -> None:
    assert len(COMMANDS) >= 8
    for command in COMMANDS:
        takes_recipe = command[0] == "iterate"
        extra = tiny_overrides(command, checkout, tmp_path) if takes_recipe else []
        if command[0] == "validate":
            (tmp_path / "models").mkdir(exist_ok=True)
            (tmp_path / "models" / "smollm2-135m-instruct").symlink_to(checkout[-1].removeprefix("model="))
        result = CliRunner().invoke(app, [*command, *extra])
        # a random model may give a round without any pair, or none of its probability to a label; all before that has run
        assert result.exit_code == 0 or isinstance(result.exception, (NoPairsError, UnparsedGateError)), (
            f"{command}: {result.output}"
        )


def test_the_readmes_python_block_runs(checkout: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = (text for language, text in BLOCKS if language == "python")
    assert len(block.split("recipe =")[0].strip().splitlines()) <= 10

    def load(path: str) -> Any:
        return load_recipe(path, [*checkout, "judge.truncated_fails=false"])

    monkeypatch.setattr(selfplay, "load_recipe", load)
    monkeypatch.setattr("selfplay.pairs.eligible.usable", lambda group, *_, **__: list(range(len(group.completions))))
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert selfplay.status(tmp_path / "runs" / "shorter")["rounds"][0]["state"] == "done"


def test_the_readmes_pieces_of_recipes_are_valid() -> None:
    pieces = [parse_yaml(text, "README.md")[0] for language, text in BLOCKS if language == "yaml"]
    base = {"model": "m", "prompts": {"source": "p.jsonl", "deal": "same"}}
    recipes = [check_recipe({**({"model": "m"} if "sources" in p else base), **p}, "README.md") for p in pieces]
    judges = [recipe.judge.kind for recipe in recipes if recipe.judge is not None]
    assert judges == ["api"]
    (mixed,) = (recipe for recipe in recipes if recipe.sources is not None)
    counts = [view.prompts.num_prompts for view in mixed.by_source.values()]
    assert f"num_prompts: 96                # a round: {counts[0]}, {counts[1]} and {counts[2]}" in README
    assert [one.kind for recipe in recipes for one in recipe.pairs.filters] == ["mix_previous", "near_duplicates"]


def test_the_readmes_tables_name_every_strategy_and_filter() -> None:
    for union in (PairsRecipe, FilterRecipe):
        for model in get_args(get_args(union)[0]):
            (kind,) = get_args((get_args(model) or (model,))[0].model_fields["kind"].annotation)
            assert f"\n| `{kind}` |" in README


def test_the_file_map_names_what_is_there() -> None:
    names = re.findall(r"\b([\w]+\.py|[\w]+/)", README.split("## File map")[1])
    tree = {
        p.name + ("/" if p.is_dir() else "") for p in (ROOT / "selfplay").rglob("*") if "__pycache__" not in p.parts
    }
    tree |= {"selfplay/", "recipes/", "tests/", "data/", "vllm/", "invariants/", "faults/", "science/", "tiny.py"}
    assert set(names) <= tree
    modules = {p.name for p in (ROOT / "selfplay").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert modules <= set(names)


def test_every_make_target_in_the_readme_exists() -> None:
    listed = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True, check=True).stdout
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert f"make {target} " in listed or target in ("alone",), target
    assert sys.version_info >= (3, 11)
