"""The recipes of papers say where each value is from, and recipes/README.md says of each recipe what is in it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from selfplay.judges.questions import Questions, check_asked
from selfplay.judges.template import load_template
from selfplay.recipe_file import load_recipe, parse_yaml

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.yaml"))}
PAPERS = [name for name in RECIPES if not name.endswith("_mini") and name != "quickstart"]
# No value of a paper: what the recipe is called, its seed, and how a data set calls its parts.
PLUMBING = ("description", "seed", "name", "split", "prompt_column", "gold_column")
# What every training has, so that no default of ours stands where a paper's value belongs.
STATED = ("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "beta", "batch_size")
MARK = re.compile(r"\[([a-z])\]")
# Papers of which the values here are from secondary accounts.
QUOTED = {"self_rewarding": "n", "semi_online": "n", "mixed": "wo"}


def header_of(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.startswith("#"))


def value_lines(text: str) -> Iterator[tuple[str, str]]:
    """(key, comment) of the lines that set a value; a list's items belong to the key above them."""
    for line in text.splitlines():
        setting, _, comment = line.partition(" #")
        found = re.match(r"\s*(?:- )?\{?(\w+): *(.*)", setting)
        if line.startswith("#") or found is None or not found[2]:
            continue
        yield found[1], comment


@pytest.mark.parametrize("name", PAPERS)
def test_every_value_of_a_papers_recipe_says_where_it_is_from(name: str) -> None:
    lines = list(value_lines(RECIPES[name]))
    assert len(lines) > 20
    assert [key for key, comment in lines if key not in PLUMBING and not MARK.search(comment)] == []


@pytest.mark.parametrize("name", PAPERS)
def test_every_mark_is_explained_and_used(name: str) -> None:
    header = header_of(RECIPES[name])
    used = set(MARK.findall("".join(comment for _, comment in value_lines(RECIPES[name]))))
    explained = set(re.findall(r"\[([a-z])\] [a-zA-Z]", header))
    assert used <= explained
    assert set(QUOTED.get(name, "")) <= used


@pytest.mark.parametrize("name", PAPERS)
def test_what_training_is_like_is_written_out_in_a_papers_recipe(name: str) -> None:
    train = parse_yaml(RECIPES[name], name)[0]["train"]
    assert [key for key in STATED if key not in train] == []


@pytest.mark.parametrize("name", QUOTED)
def test_secondary_sources_are_called_so(name: str) -> None:
    header = header_of(RECIPES[name])
    assert "secondary accounts" in header
    assert "[p]" not in RECIPES[name]


@pytest.mark.parametrize("name", PAPERS)
def test_a_header_says_what_becomes_of_cut_completions_and_long_prompts(name: str) -> None:
    header, recipe = header_of(RECIPES[name]), load_recipe(FOLDER / f"{name}.yaml")
    kept = {view.pairs.model_dump()["truncated"] for view in recipe.by_source.values()}
    assert ("max_tokens cuts" in header) == (kept != {"rejected"})  # as SPIN's paper has it
    short = "max_prompt_length" in RECIPES[name]
    assert ("more than max_prompt_length tokens" in header) == short


def test_the_judge_of_sppo_asks_for_one_letter_and_reads_its_probability() -> None:
    judge = load_recipe(FOLDER / "sppo.yaml").judge
    assert judge is not None
    assert judge.kind == "llm"
    template = load_template(judge.template, Path())
    check_asked(Questions(template, judge.num_verdicts), verdict=judge.verdict, temperature=0.0)
    assert (judge.verdict, template.head.mode, template.head.labels) == ("labels", "pairwise", {"A": 1, "B": 0})
    assert template.head.parse is None  # no line of reasons before it, which would leave the letters no probability


# recipes/README.md


def rows_of(first: str) -> dict[str, list[str]]:
    """The rows of the table of README.md whose first column is called so: recipe -> its cells, all rows of a name together."""
    found: dict[str, list[str]] = {}
    inside = False
    for line in (FOLDER / "README.md").read_text().splitlines():
        inside = line.startswith(first) or (inside and line.startswith("|"))
        if inside and (name := re.match(r"\| `(\w+)`", line)):
            found.setdefault(name[1], []).append(line)
    return found


LISTED = rows_of("| recipe | paper")


def nodes(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value inside a recipe."""
    yield key, value
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield from nodes(inner, f"{key}.{name}")
    for inner in value if isinstance(value, list) else ():
        yield from nodes(inner, key)


def stands(shown: Any, value: Any) -> bool:
    """Whether a value holds what the table shows of it."""
    if isinstance(shown, dict) and isinstance(value, dict):
        return all(key in value and stands(part, value[key]) for key, part in shown.items())
    return bool(shown == value)


def test_every_recipe_is_listed() -> None:
    assert set(LISTED) == set(RECIPES)
    assert set(rows_of("| recipe | seed")) <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_the_keys_that_the_table_shows_stand_in_the_recipe(name: str) -> None:
    (row,) = LISTED[name]
    inside = list(nodes(parse_yaml(RECIPES[name], name)[0]))
    for part in row.split("|")[3].split(", "):
        for token in re.findall(r"`([^`]+)`", part):
            if ": " not in token:
                key = [value for at, value in inside if at.endswith(f".{token}")]
                assert token in RECIPES or token in RECIPES[name], token
                assert "per-round" not in part or any(isinstance(value, list) for value in key), token
                continue
            for key, shown in parse_yaml(token, token)[0].items():
                assert any(at.endswith(f".{key}") and stands(shown, value) for at, value in inside), token
