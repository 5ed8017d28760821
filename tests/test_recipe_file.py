"""Recipe files: strict YAML in, line and path of every fault out, and back to YAML."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from selfplay.commands.recipes import files_of
from selfplay.errors import RecipeError
from selfplay.recipe import Recipe
from selfplay.recipe_file import check_recipe, differences, dump_recipe, load_recipe, parse_yaml
from selfplay.recipe_filters import PythonFilterRecipe
from selfplay.recipe_judges import ApiJudgeRecipe, LLMJudgeRecipe, PythonJudgeRecipe

SMALL = """\
model: m
prompts:
  source: p.jsonl
  deal: same
judge: {kind: verifier}
"""
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.sampled_from(
        ["5e-7", "1e5", "1.5e3", "yes", "on", "null", "~", "0x1f", "1_000", "2026-01-01", "1:30", "=", "<<"]
    ),
)


def recipe_file(folder: Path, extra: str = "", *, text: str = SMALL) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text + extra)
    return path


def load(folder: Path, extra: str = "", *overrides: str) -> Recipe:
    return load_recipe(recipe_file(folder, extra), overrides)


def fault(folder: Path, extra: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(folder, extra, *overrides)
    return str(caught.value)


def small(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(SMALL)
    return data | changes


def test_a_fault_in_a_listed_filter_has_its_line(tmp_path: Path) -> None:
    said = fault(
        tmp_path, "pairs:\n  filters:\n    - {kind: exact_duplicates}\n    - kind: cap_per_prompt\n      max_pair: 2\n"
    )
    assert "recipe.yaml:10: pairs.filters.1.max_pair: unknown key" in said
    assert 'did you mean "max_pairs"?' in said


def test_a_filter_program_is_found_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.py").touch()
    (one,) = load(tmp_path, "pairs: {filters: [{kind: python, target: 'mine.py:f'}]}\n").pairs.filters
    assert one == PythonFilterRecipe(kind="python", target=f"{tmp_path / 'mine.py'}:f")


def test_every_fault_has_its_line_and_all_are_listed(tmp_path: Path) -> None:
    said = fault(tmp_path, "train:\n  beta: -1\n\n  batch_size: 2.5\nseed: x\n").splitlines()
    assert len(said) == 3
    found = {line.split(": ")[1]: line for line in said}
    assert "recipe.yaml:7:" in found["train.beta"]
    assert "recipe.yaml:9:" in found["train.batch_size"]
    assert "found 2.5" in found["train.batch_size"]
    assert "recipe.yaml:10:" in found["seed"]


@pytest.mark.parametrize(
    ("extra", "key", "first"),
    [("rounds: 2\nrounds: 3\n", "rounds", 6), ("train:\n  beta: 0.1\n  beta: 0.2\n", "train.beta", 7)],
)
def test_a_key_given_twice_is_refused_with_both_lines(tmp_path: Path, extra: str, key: str, first: int) -> None:
    assert f"recipe.yaml:{first + 1}: {key} is given twice (first on line {first})" in fault(tmp_path, extra)


@pytest.mark.parametrize(
    "extra",
    [
        "a: &x [1]\nb: *x\n",
        "train: &t {beta: 0.1}\nother:\n  <<: *t\n",
        "model2: !!python/object/apply:os.system ['true']\n",
        "train: {beta: 0.1\n",
        "? [a, b]\n: 1\n",
        "train: !!set {beta}\n",
        "x: " + "[" * 400 + "\n",
        "\tmodel: x\n",
        "x: 1" + "0" * 5000 + "\n",
        "x: 2026-13-45\n",
    ],
)
def test_yaml_that_is_more_than_plain_values_is_refused(tmp_path: Path, extra: str) -> None:
    assert "recipe.yaml" in fault(tmp_path, extra)


@pytest.mark.parametrize("text", ["", "- a\n", "just text\n", "3\n"])
def test_a_recipe_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match="mapping"):
        load_recipe(recipe_file(tmp_path, text=text))


def test_a_file_that_can_not_be_read_is_a_recipe_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"binary\.yaml"):
        load_recipe(tmp_path / "binary.yaml")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + SMALL.replace("\n", "\r\n").encode())
    assert load_recipe(path).prompts.deal == "same"


def test_overrides_replace_values_and_make_sections(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        "train: {beta: 0.3, batch_size: 2}\n",
        "train.learning_rate=1e-6",
        "train.beta=[0.1, 0.2]",
        "evaluate.greedy=false",
        "model=other",
        "judge={kind: coin}",
        "prompts.system_prompt=a = b",
    )
    assert recipe.train.learning_rate == 1e-6
    assert recipe.train.beta == [0.1, 0.2]
    assert recipe.train.batch_size == 2
    assert recipe.evaluate.greedy is False
    assert recipe.model == "other"
    assert recipe.judge is not None
    assert recipe.judge.kind == "coin"
    assert recipe.prompts.system_prompt == "a = b"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.learning_rate", "key.subkey=value"),
        ("=3", "key.subkey=value"),
        ("train..beta=1", "key.subkey=value"),
        ("model.name=x", "model holds a value"),
        ("train.beta=*x", "aliases"),
        ("train.beta=[1", "not valid YAML"),
        ("train.learnin_rate=1", 'did you mean "learning_rate"'),
        ("train.beta=nan", "train.beta"),
    ],
)
def test_a_wrong_override_is_refused(tmp_path: Path, override: str, words: str) -> None:
    assert words in fault(tmp_path, "", override)


def test_paths_are_read_from_the_recipes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "recipes"
    (folder / "m").mkdir(parents=True)
    for name in ("p.jsonl", "held.jsonl", "judge.md", "judges.py", "template.jinja"):
        (folder / name).touch()
    text = """\
model: m
prompts: {source: p.jsonl, heldout: held.jsonl, deal: same}
chat: {chat_template: template.jinja}
judge: {kind: llm, model: policy, template: judge.md}
evaluate: {judge: {kind: python, target: "judges.py:f"}}
"""
    recipe_file(folder, text=text)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("recipes/recipe.yaml")
    assert recipe.model == str(folder / "m")
    assert recipe.prompts.source == str(folder / "p.jsonl")
    assert recipe.prompts.heldout == str(folder / "held.jsonl")
    assert recipe.chat.chat_template == str(folder / "template.jinja")
    assert isinstance(recipe.judge, LLMJudgeRecipe)
    assert (recipe.judge.model, recipe.judge.template) == ("policy", str(folder / "judge.md"))
    assert isinstance(recipe.evaluate.judge, PythonJudgeRecipe)
    assert recipe.evaluate.judge.target == f"{folder / 'judges.py'}:f"


def test_every_file_beside_a_recipe_goes_with_its_copy(tmp_path: Path) -> None:
    names = {"p.jsonl", "held.jsonl", "labelled.jsonl", "drops.py"}
    for name in names:
        (tmp_path / name).touch()
    text = """\
model: m
prompts: {source: p.jsonl, heldout: {source: held.jsonl}, deal: same}
judge: {kind: coin}
pairs: {kind: best_vs_worst, filters: [{kind: exact_duplicates}, {kind: python, target: "drops.py:f"}]}
audit: {calibration: labelled.jsonl}
"""
    found = files_of(load_recipe(recipe_file(tmp_path, text=text)), tmp_path)
    assert sorted(path.name for path in found) == sorted(names)


@pytest.mark.parametrize("kind", ["llm", "api"])
def test_a_shipped_template_is_not_shadowed_by_what_lies_beside_the_recipe(tmp_path: Path, kind: str) -> None:
    (tmp_path / "safety").mkdir()
    (tmp_path / "additive").write_text("mine")
    address = ", base_url: https://judge.example/v1, model: m" if kind == "api" else ""

    def template(asked: str) -> str:
        judge = load(tmp_path, "", f"judge={{kind: {kind}, template: {asked}{address}}}").judge
        assert isinstance(judge, LLMJudgeRecipe | ApiJudgeRecipe)
        return judge.template

    assert (template("safety"), template("additive")) == ("safety", "additive")
    assert template("./additive") == str(tmp_path / "additive")
    assert template("mine.md") == str(tmp_path / "mine.md"), "never one of the folder that the command runs in"


def test_a_hub_id_stays_as_it_is(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, text=SMALL.replace("model: m", "model: some/model").replace("p.jsonl", "some/data"))
    recipe = load_recipe(path)
    assert (recipe.model, recipe.prompts.source) == ("some/model", "some/data")


def test_differences_name_dotted_keys_and_both_values() -> None:
    old = check_recipe(small(), "r.yaml")
    new = check_recipe(small(rounds=4, train={"learning_rate": [1e-6, 1e-7]}, judge={"kind": "coin"}), "r.yaml")
    found = differences(old, new)
    assert "rounds: 3 -> 4" in found
    assert "train.learning_rate: 5e-07 -> [1e-06, 1e-07]" in found
    assert "judge.kind: 'verifier' -> 'coin'" in found
    assert differences(old, old) == []
    assert {line.split(":")[0] for line in found} >= {"rounds", "train.learning_rate", "judge.kind"}
    assert not any(line.startswith(("prompts", "pairs", "generator", "evaluate")) for line in found)


@given(
    TEXTS,
    st.lists(st.fixed_dictionaries({"kind": st.just("contains"), "any": st.lists(TEXTS, min_size=1)}), max_size=2),
    st.floats(1e-12, 1e3),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
)
def test_a_dumped_recipe_reads_back_equal(text: str, checks: list[Any], rate: float, counts: list[int]) -> None:
    recipe = check_recipe(
        small(
            description=text,
            judge={"kind": "verifier", "checks": checks},
            train={"learning_rate": [rate, rate / 3], "num_train_epochs": counts},
            prompts={"source": "p", "deal": "same", "system_prompt": text},
        ),
        "r.yaml",
    )
    data, _ = parse_yaml(dump_recipe(recipe), "dump")
    assert check_recipe(data, "dump") == recipe


def test_a_fault_of_an_override_is_reported_as_the_overrides_own(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\nprompts: {source: p.jsonl, deal: same}\ntrain:\n  beta: 0.1\n  batch_size: zero\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["train.beta=-1"])
    lines = str(caught.value).splitlines()
    assert any(line.startswith("--set train.beta=-1: train.beta:") for line in lines), lines
    assert any(line.startswith(f"{path}:5: train.batch_size:") for line in lines), lines
