"""Recipes: what is read, what is refused and how it is said."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from selfplay.errors import RecipeError
from selfplay.recipe import LLMJudgeRecipe, PythonJudgeRecipe, Recipe, VerifierRecipe, at_round
from selfplay.recipe_file import check_recipe, differences, dump_recipe, load_recipe, parse_yaml
from selfplay.train.settings import settings_at

SMALL = """\
model: m
prompts:
  source: p.jsonl
  deal: same
judge: {kind: verifier}
"""
LEVELS: dict[str, list[str]] = {
    "": ["model: m", "rounds: 2", "seed: 1"],
    "prompts": ["source: p.jsonl", "num_prompts: 4", "max_prompt_length: 9"],
    "generator": ["num_completions: 2", "temperature: 1.0"],
    "judge": ["kind: verifier", "score: all"],
    "pairs": ["min_margin: 0.1"],
    "train": ["learning_rate: 5e-7", "beta: 0.1"],
    "evaluate": ["num_completions: 2"],
}


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


@pytest.mark.parametrize(
    ("extra", "path", "near"),
    [
        ("train: {learning_rat: 1}\n", "train.learning_rat", "learning_rate"),
        ("train: {num_train_epoch: 1}\n", "train.num_train_epoch", "num_train_epochs"),
        ("generator: {max_token: 9}\n", "generator.max_token", "max_tokens"),
        ("evaluate: {judge: {kind: verifier, scor: all}}\n", "evaluate.judge.scor", "score"),
        ("round: 3\n", "round", "rounds"),
        ("chat: {reasoning_tag: [a, b]}\n", "chat.reasoning_tag", "reasoning_tags"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path: Path, extra: str, path: str, near: str) -> None:
    said = fault(tmp_path, extra)
    assert f"{path}: unknown key" in said
    assert f'did you mean "{near}"?' in said
    assert "recipe.yaml:6:" in said


def test_a_key_like_no_other_is_refused_with_all_that_are_allowed(tmp_path: Path) -> None:
    said = fault(tmp_path, "pairs: {zzz: 1}\n")
    assert "pairs.zzz: unknown key; allowed: kind, min_margin, max_pairs_per_prompt, max_unparsed" in said


@given(st.data())
def test_every_key_misspelt_by_one_edit_is_refused_by_name(data: st.DataObject) -> None:
    section = data.draw(st.sampled_from(["prompts", "chat", "generator", "pairs", "train", "evaluate"]))
    fields = list(Recipe.model_fields[section].annotation.model_fields)  # type: ignore[union-attr]
    key = data.draw(st.sampled_from(fields))
    at = data.draw(st.integers(0, len(key) - 1))
    wrong = data.draw(st.sampled_from([key[:at] + key[at + 1 :], key[:at] + "q" + key[at:], key[:at] + "q" + key[at + 1 :]]))
    given_data = small()
    given_data[section] = {**given_data.get(section, {}), wrong: None}
    with pytest.raises(RecipeError, match="unknown key") as caught:
        check_recipe(given_data, "r.yaml")
    assert f"{section}.{wrong}" in str(caught.value)


def test_every_fault_has_its_line_and_all_are_listed(tmp_path: Path) -> None:
    said = fault(tmp_path, "train:\n  beta: -1\n\n  batch_size: 2.5\nseed: x\n").splitlines()
    assert len(said) == 3
    found = {line.split(": ")[1]: line for line in said}
    assert "recipe.yaml:7:" in found["train.beta"]
    assert "recipe.yaml:9:" in found["train.batch_size"]
    assert "found 2.5" in found["train.batch_size"]
    assert "recipe.yaml:10:" in found["seed"]


def test_a_required_key_that_is_missing_is_named(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, text="prompts: {deal: same}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert "model: missing" in str(caught.value)
    assert "prompts.source: missing" in str(caught.value)


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


@pytest.mark.parametrize("text", ["5e-7", "5E-7", "0.5e-6", ".0000005", "+5e-7", "5.0e-07"])
def test_a_rate_in_any_notation_is_a_number(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, f"train: {{learning_rate: {text}}}\n").train.learning_rate == 5e-7


@pytest.mark.parametrize(
    "text",
    [".nan", ".inf", "-.inf", "nan", "1e999", "-1e-6", "0", "'5e-7'", '"1"', "true", "null", "[]", "[1e-6, -1]", "1e-6x"],
)
def test_what_is_no_positive_number_is_refused_as_a_rate(tmp_path: Path, text: str) -> None:
    assert "train.learning_rate" in fault(tmp_path, f"train: {{learning_rate: {text}}}\n")


@pytest.mark.parametrize(
    ("section", "key", "text"),
    [
        ("train", "batch_size", "'8'"),
        ("train", "batch_size", "8.0"),
        ("train", "batch_size", "true"),
        ("train", "shuffle", "1"),
        ("train", "shuffle", "yes"),
        ("train", "loss_type", "hinge"),
        ("train", "loss_type", "[]"),
        ("train", "warmup_steps", "-0.1"),
        ("train", "adam_beta2", "1.0"),
        ("generator", "top_p", "0"),
        ("generator", "top_p", "1.5"),
        ("generator", "num_completions", "0"),
        ("generator", "stop", "END"),
        ("generator", "gpu_memory_utilization", "2"),
        ("pairs", "max_unparsed", "1.2"),
        ("pairs", "kind", "random"),
        ("prompts", "heldout", "1.5"),
        ("prompts", "max_prompt_length", "0"),
        ("chat", "reasoning_tags", "[a]"),
        ("evaluate", "temperature", "0"),
    ],
)
def test_values_out_of_range_or_of_another_type_are_refused_with_their_path(section: str, key: str, text: str) -> None:
    data = small()
    data[section] = {**data.get(section, {}), **parse_yaml(f"{key}: {text}", "x")[0]}
    with pytest.raises(RecipeError, match=rf"{section}\.{key}"):
        check_recipe(data, "r.yaml")


def test_a_list_gives_one_value_a_round_and_the_last_repeats(tmp_path: Path) -> None:
    recipe = load(tmp_path, "train: {learning_rate: [3e-6, 2e-6], beta: 0.2, num_train_epochs: [2, 1]}\n")
    rates = [settings_at(recipe.train, r, bf16=False).learning_rate for r in range(4)]
    assert rates == [3e-6, 2e-6, 2e-6, 2e-6]
    assert [settings_at(recipe.train, r, bf16=False).beta for r in range(2)] == [0.2, 0.2]
    assert [at_round(recipe.train.num_train_epochs, r) for r in range(3)] == [2, 1, 1]


def test_a_list_of_losses_is_no_list_of_rounds(tmp_path: Path) -> None:
    recipe = load(tmp_path, "train: {loss_type: [sigmoid, sft], loss_weights: [1, 0.2]}\n")
    assert settings_at(recipe.train, 1, bf16=False).loss_type == ["sigmoid", "sft"]
    assert settings_at(recipe.train, 1, bf16=False).loss_weights == [1, 0.2]
    assert "loss_weights has 1 values for 2 losses" in fault(
        tmp_path, "train: {loss_type: [sigmoid, sft], loss_weights: [1]}\n"
    )
    assert settings_at(load(tmp_path).train, 0, bf16=True).loss_weights == [1.0]


def test_warmup_ratio_is_the_old_name_of_warmup_steps(tmp_path: Path) -> None:
    assert load(tmp_path, "train: {warmup_ratio: 0.1}\n").train.warmup_steps == 0.1
    assert load(tmp_path, "train: {warmup_ratio: [0.1, 0]}\n").train.warmup_steps == [0.1, 0]
    assert "keep one" in fault(tmp_path, "train: {warmup_ratio: 0.1, warmup_steps: 3}\n")
    assert "warmup" in fault(tmp_path, "train: {warmup_ratio: -0.1}\n")


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


def test_a_hub_id_stays_as_it_is(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, text=SMALL.replace("model: m", "model: some/model").replace("p.jsonl", "some/data"))
    recipe = load_recipe(path)
    assert (recipe.model, recipe.prompts.source) == ("some/model", "some/data")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": {"source": "p"}}, "num_prompts"),
        ({"generator": {"num_completions": 1}}, "at least 2"),
        ({"generator": {"num_completions": [4, 1]}}, "at least 2"),
        ({"pairs": {"kind": "gold_vs_completion"}}, "remove the judge"),
        ({"train": {"schedule_scope": "run"}}, "train: .*needs max_steps"),
        ({"train": {"max_steps": 0}}, "train: max_steps is 0"),
        ({"train": {"max_steps": [3, -2]}}, "train: max_steps is -2"),
        ({"model": "  "}, "model"),
        ({"judge": {"kind": "oracle"}}, "judge"),
        ({"judge": {"kind": "python", "target": "no colon"}}, "judge.target"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        check_recipe(small(**changes), "r.yaml")


def test_a_selector_of_scores_needs_a_judge_and_spin_needs_none() -> None:
    unjudged = check_recipe(small(judge=None), "r.yaml")
    with pytest.raises(RecipeError, match="gold_vs_completion"):
        unjudged.check_judged()
    check_recipe(small(judge=None, pairs={"kind": "gold_vs_completion"}), "r.yaml").check_judged()
    check_recipe(small(), "r.yaml").check_judged()


def test_the_panel_asks_its_own_judge_or_the_runs() -> None:
    own = check_recipe(small(evaluate={"judge": {"kind": "coin"}}), "r.yaml")
    assert own.heldout_judge is own.evaluate.judge
    shared = check_recipe(small(), "r.yaml")
    assert isinstance(shared.heldout_judge, VerifierRecipe)


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


TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.sampled_from(["5e-7", "1e5", "1.5e3", "yes", "on", "null", "~", "0x1f", "1_000", "2026-01-01", "1:30", "=", "<<"]),
)


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
