"""Recipes: what is read, what is refused and how it is said."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from selfplay.errors import RecipeError
from selfplay.recipe import Recipe
from selfplay.recipe_file import check_recipe, dump_recipe, load_recipe, parse_yaml
from selfplay.recipe_judges import VerifierRecipe
from selfplay.recipe_pairs import BestVsWorstRecipe
from selfplay.recipe_prompts import PromptsRecipe
from selfplay.recipe_values import Section, at_round
from selfplay.train.settings import settings_at

SMALL = """\
model: m
prompts:
  source: p.jsonl
  deal: same
judge: {kind: verifier}
"""


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
    assert f"pairs.zzz: unknown key; allowed: {', '.join(BestVsWorstRecipe.model_fields)}" in said


@given(st.data())
def test_every_key_misspelt_by_one_edit_is_refused_by_name(data: st.DataObject) -> None:
    section = data.draw(st.sampled_from(["prompts", "chat", "generator", "pairs", "train", "evaluate"]))
    model = {"pairs": BestVsWorstRecipe, "prompts": PromptsRecipe}.get(section, Recipe.model_fields[section].annotation)
    fields = list(model.model_fields)  # type: ignore[union-attr]
    key = data.draw(st.sampled_from(fields))
    at = data.draw(st.integers(0, len(key) - 1))
    wrong = data.draw(
        st.sampled_from([key[:at] + key[at + 1 :], key[:at] + "q" + key[at:], key[:at] + "q" + key[at + 1 :]])
    )
    given_data = small()
    given_data[section] = {**given_data.get(section, {}), wrong: None}
    with pytest.raises(RecipeError, match="unknown key") as caught:
        check_recipe(given_data, "r.yaml")
    assert f"{section}.{wrong}" in str(caught.value)


def test_a_required_key_that_is_missing_is_named(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, text="judge: {kind: python}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert "model: missing" in str(caught.value)
    assert "judge.target: missing" in str(caught.value)


def test_keys_about_prompts_without_prompts_are_refused_and_columns_are_not() -> None:
    with pytest.raises(RecipeError, match=r"prompts: source is missing, and without prompts num_prompts, deal would"):
        check_recipe({"model": "m", "prompts": {"num_prompts": 3, "deal": "same", "turns": "last"}}, "r.yaml")
    assert check_recipe({"model": "m", "prompts": {"system_prompt": "x"}}, "r.yaml").prompts.source is None


@pytest.mark.parametrize("heldout", [True, 0, 1.5, {"split": ""}, {"spit": "test"}, []], ids=repr)
def test_a_held_out_part_is_a_file_a_share_or_a_split(heldout: Any) -> None:
    prompts = {"source": "some/set", "deal": "same", "heldout": heldout}
    with pytest.raises(RecipeError, match=r"^r\.yaml: prompts\.heldout[.a-z]*: ") as caught:
        check_recipe({"model": "m", "prompts": prompts}, "r.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["5e-7", "5E-7", "0.5e-6", ".0000005", "+5e-7", "5.0e-07"])
def test_a_rate_in_any_notation_is_a_number(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, f"train: {{learning_rate: {text}}}\n").train.learning_rate == 5e-7


@pytest.mark.parametrize(
    "text",
    [
        ".nan",
        ".inf",
        "-.inf",
        "nan",
        "1e999",
        "-1e-6",
        "0",
        "'5e-7'",
        '"1"',
        "true",
        "null",
        "[]",
        "[1e-6, -1]",
        "1e-6x",
    ],
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
        ("train", "loss_type", "dpo"),
        ("train", "loss_type", "[]"),
        ("train", "label_smoothing", "0.5"),
        ("train", "reference_logps", "vllm"),
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": {"source": "p"}}, "num_prompts"),
        ({"generator": {"num_completions": 1}}, "at least 2"),
        ({"generator": {"num_completions": [4, 1]}}, "at least 2"),
        ({"pairs": {"kind": "gold_vs_completion"}}, "remove the judge"),
        ({"pairs": {"kind": "gold_vs_completion", "min_margin": 1}, "judge": None}, "pairs.min_margin: unknown key"),
        ({"pairs": {"kind": "gold_vs_completion", "max_unparsed": 0.1}, "judge": None}, "pairs.max_unparsed: unknown"),
        ({"pairs": {"kind": "best_vs_random", "length_rho": 0.1}}, "pairs.length_rho: unknown key"),
        ({"pairs": {"kind": "best_vs_worst", "k": 2}}, "pairs.k: unknown key"),
        ({"pairs": {"kind": "top_k_vs_bottom_k"}}, "pairs.k: missing"),
        ({"pairs": {"kind": "top_k_vs_bottom_k", "k": [2, 3]}}, "pairs.k is 3, but 4 completions"),
        ({"pairs": {"kind": "top_k_vs_bottom_k", "k": 2}, "generator": {"num_completions": [4, 3]}}, "k is 2, but 3"),
        ({"pairs": {"kind": "all_above_margin"}}, "pairs.min_margin: missing"),
        ({"pairs": {"length_rho": 0.5}}, "pairs.length_rho"),
        ({"pairs": {"kind": "correct_vs_incorrect"}, "generator": {"num_completions": 1}}, "at least 2"),
        ({"pairs": {"kind": "win_rates"}}, "verifier judge are no win rates: say order"),
        ({"pairs": {"kind": "best_of_all"}}, "pairs.kind: there is no kind 'best_of_all'; allowed: 'best_vs_worst'"),
        ({"pairs": 3}, "pairs"),
        ({"pairs": {"filters": [{}]}}, "pairs.filters.0.kind: missing"),
        (
            {"pairs": {"filters": [{"kind": "x"}]}},
            "pairs.filters.0.kind: there is no kind 'x'; allowed: 'mix_previous'",
        ),
        (
            {"pairs": {"filters": [{"kind": "near_duplicates", "ngrams": 2}]}},
            'filters.0.ngrams: .*did you mean "ngram"',
        ),
        ({"pairs": {"filters": [{"kind": "mix_previous", "window": 0}]}}, r"pairs\.filters\.0\.window: Input"),
        ({"pairs": {"filters": [{"kind": "mix_previous", "weights": [1, 2]}]}}, "reaches back 1 rounds only"),
        ({"pairs": {"filters": [{"kind": "mix_previous"}, {"kind": "mix_previous"}]}}, "mix_previous is there twice"),
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
    rpo = {"kind": "correct_vs_incorrect", "add_gold": True}
    with pytest.raises(RecipeError, match="correct_vs_incorrect reads scores"):
        check_recipe(small(judge=None, pairs=rpo), "r.yaml").check_judged()
    # beside the gold answer one completion is enough
    check_recipe(small(pairs=rpo, generator={"num_completions": 1}), "r.yaml").check_judged()


def test_the_panel_asks_its_own_judge_or_the_runs() -> None:
    prompts = {"source": "p.jsonl", "deal": "same", "heldout": 0.1}
    own = check_recipe(small(prompts=prompts, evaluate={"judge": {"kind": "coin"}}), "r.yaml")
    assert own.heldout_judge is own.evaluate.judge
    shared = check_recipe(small(), "r.yaml")
    assert isinstance(shared.heldout_judge, VerifierRecipe)


def test_a_warmup_ratio_of_one_or_more_is_refused() -> None:
    for ratio in (1, 1.5, [0.1, 2]):
        with pytest.raises(RecipeError, match="a ratio is below 1"):
            check_recipe(small(train={"warmup_ratio": ratio}), "r.yaml")


@pytest.mark.parametrize("field", ["temperature: 1.0", "top_p: 0.5", "max_tokens: 9"])
def test_a_judge_that_draws_no_text_has_nothing_to_say_about_drawing(tmp_path: Path, field: str) -> None:
    judge = f"judge={{kind: llm, template: yes_no, verdict: labels, {field}}}"
    with pytest.raises(RecipeError, match=field.split(":")[0]):
        load_recipe(recipe_file(tmp_path), [judge])
    drawn = load_recipe(recipe_file(tmp_path), [judge.replace("labels", "parse")])
    assert load_recipe(recipe_file(tmp_path, text=dump_recipe(drawn))) == drawn
    labels = load_recipe(recipe_file(tmp_path), ["judge={kind: llm, template: yes_no, verdict: labels}"])
    assert load_recipe(recipe_file(tmp_path, text=dump_recipe(labels))) == labels


def test_the_readme_names_every_field_that_may_be_a_list() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    named = text.split("These may be a list with one value per round")[1].split("Any value can be set")[0]
    found = set()
    waiting: list[Any] = [Recipe]
    while waiting:
        section = waiting.pop()
        for name, field in section.model_fields.items():
            whole = [field.annotation, *field.metadata]
            if "per round" in repr(whole):
                found.add(name)
            waiting += [
                part for part in _parts(field.annotation) if isinstance(part, type) and issubclass(part, Section)
            ]
    assert set(re.findall(r"`(\w+)`", named)) == found


def _parts(annotation: Any) -> list[Any]:
    """A type, and all that stands in its brackets."""
    return [annotation, *(found for part in get_args(annotation) for found in _parts(part))]
