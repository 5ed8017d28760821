"""The section `train`: a field that nothing reads is refused, and one that something reads has its value written out."""

import json
from pathlib import Path
from typing import Any

import pytest

from selfplay.commands.validate import check
from selfplay.errors import DataError, RecipeError
from selfplay.losses import LOSSES
from selfplay.recipe import Recipe
from selfplay.recipe_file import check_recipe, differences, dump_recipe, load_recipe, parse_yaml
from selfplay.recipe_train import READS, TrainRecipe
from selfplay.train.settings import settings_at


def recipe_of(**sections: Any) -> Recipe:
    data: dict[str, Any] = {"model": "m", "judge": {"kind": "coin"}, "prompts": {"source": "p", "deal": "same"}}
    return check_recipe({**data, **sections}, "r.yaml")


def train_of(**train: Any) -> TrainRecipe:
    return recipe_of(train=train).train


def test_every_loss_has_a_function_and_says_what_it_reads() -> None:
    assert set(LOSSES) == set(READS)
    for name in LOSSES:
        assert train_of(loss_type=name).losses == [name]


@pytest.mark.parametrize(
    ("loss_type", "wanted"),
    [
        ("sigmoid", {"beta": 0.1, "label_smoothing": 0.0, "reference": "prior", "reference_logps": "trainer"}),
        ("hinge", {"beta": 0.1, "reference": "prior", "reference_logps": "trainer"}),
        ("simpo", {"beta": 0.1, "label_smoothing": 0.0, "simpo_gamma": 0.5}),
        ("sft", {}),
        (["hinge", "sft"], {"beta": 0.1, "reference": "prior", "reference_logps": "trainer"}),
    ],
    ids=str,
)
def test_what_a_loss_reads_has_a_value_and_what_it_ignores_has_none(loss_type: Any, wanted: dict[str, Any]) -> None:
    fields = ("beta", "label_smoothing", "simpo_gamma", "reference", "reference_logps", "ref_model_mixup_alpha")
    found = train_of(loss_type=loss_type)
    assert {name: getattr(found, name) for name in fields} == {name: wanted.get(name) for name in fields}


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (
            {"loss_type": "hinge", "label_smoothing": 0.1},
            "label_smoothing is 0.1, but loss_type hinge.*: sigmoid, simpo",
        ),
        ({"simpo_gamma": 1.0}, "simpo_gamma is 1.0, but loss_type sigmoid does not read it.*: simpo"),
        ({"loss_type": "sft", "beta": 0.1}, "beta is 0.1, but loss_type sft"),
        ({"loss_type": ["simpo", "sft"], "reference": "initial"}, r"reference is initial, but loss_type simpo \+ sft"),
        ({"loss_type": "simpo", "reference_logps": "engine"}, "reference_logps is engine, but loss_type simpo"),
        ({"ref_model_mixup_alpha": 0.3}, "reference: ema alone reads"),
        ({"reference": "initial", "reference_logps": "engine"}, "but reference is initial. Say reference: prior"),
        ({"reference": "ema", "reference_logps": "engine"}, "but reference is ema"),
        ({"reference": " "}, "not an empty text"),
        ({"reference": "ema", "lora": {"r": 4}}, "ema mixes full weights"),
        ({"loss_type": ["sigmoid", "sigmoid"]}, "names a loss twice"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_setting_that_would_change_nothing_is_refused_with_what_to_change(train: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe_of(train=train)


def test_engine_logps_of_a_generator_that_gives_none_are_refused() -> None:
    with pytest.raises(RecipeError, match="scripted generator gives no logps"):
        recipe_of(train={"reference_logps": "engine"}, generator={"kind": "scripted"})


def test_win_rates_that_no_selector_would_give_are_refused() -> None:
    recipe_of(train={"loss_type": "sppo_hard"}).check_win_rates()
    recipe_of(train={"loss_type": "sppo"}, pairs={"kind": "win_rates", "win_rate_from": "order"}).check_win_rates()
    with pytest.raises(RecipeError, match=r"pairs\.kind best_vs_worst doesn't give.*sppo_hard"):
        recipe_of(train={"loss_type": ["sft", "sppo"]}).check_win_rates()


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo", "sft", ["sigmoid", "sft"]], ids=str)
def test_a_recipe_written_out_reads_as_itself(loss_type: Any) -> None:
    recipe = recipe_of(train={"loss_type": loss_type, "beta": None})
    again = check_recipe(parse_yaml(dump_recipe(recipe), "x")[0], "x")
    assert again == recipe
    assert differences(recipe, again) == []


def test_an_ema_has_trl_s_share_unless_the_recipe_says_another() -> None:
    assert train_of(reference="ema").ref_model_mixup_alpha == 0.6
    assert train_of(reference="ema", ref_model_mixup_alpha=0.25).ref_model_mixup_alpha == 0.25


def test_the_losses_numbers_reach_the_settings() -> None:
    settings = settings_at(train_of(loss_type="simpo", beta=[2.0, 10.0], simpo_gamma=3.0), 1, bf16=False)
    assert settings.loss_numbers == {"beta": 10.0, "label_smoothing": 0.0, "simpo_gamma": 3.0}
    assert settings.reference_logps is None


def write(folder: Path, reference: str, model: Path) -> Path:
    (folder / "p.jsonl").write_text('{"prompt": "Say hi."}\n')
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: {model}\nprompts: {{source: p.jsonl, deal: same}}\njudge: {{kind: coin}}\n"
        f"train: {{reference: {reference}}}\n"
    )
    return path


def test_a_reference_s_path_is_read_from_the_recipe_s_folder(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "old").symlink_to(tiny)
    for text in ("old", "./old"):
        recipe = load_recipe(write(tmp_path, text, tiny))
        assert Path(recipe.train.reference_path or "") == tiny.resolve()
        check(recipe)
    assert load_recipe(write(tmp_path, "someone/some-model", tiny)).train.reference_path == "someone/some-model"
    for kind in ("prior", "initial", "ema"):
        assert load_recipe(write(tmp_path, kind, tiny)).train.reference_path is None


def test_a_reference_that_is_not_there_is_found_before_any_work(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'initital' is none of prior, initial, ema.*did you mean \"initial\""):
        load_recipe(write(tmp_path, "initital", tiny))
    with pytest.raises(RecipeError, match="no such folder beside the recipe"):
        load_recipe(write(tmp_path, "checkpoint", tiny))
    with pytest.raises(DataError, match=r"train\.reference: model .*no such folder"):
        check(load_recipe(write(tmp_path, "./checkpoint", tiny)))
