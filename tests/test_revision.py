"""A model of a hub at a revision: which one is fetched, and that a run keeps to it."""

import json
from pathlib import Path
from typing import Any

import pytest
from rewards import make_reward_model
from scripted_run import write_recipe
from tiny import make_tiny_model

from selfplay.errors import DataError, RecipeError
from selfplay.judges import make_judge
from selfplay.models import local_model, named_model
from selfplay.recipe import Recipe
from selfplay.recipe_file import check_recipe, load_recipe
from selfplay.rounds import iterate
from selfplay.single_train import TrainInputs, _reference
from selfplay.store import weights_digest

ID = "someone/some-model"


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Path]:
    """What a hub has of ID: the folder of each revision, whose weights differ."""
    folder = tmp_path_factory.mktemp("hub")
    return {name: make_tiny_model(folder / str(name), seed=seed) for seed, name in enumerate((None, "old"))}


@pytest.fixture
def hub(snapshots: dict[str | None, Path], monkeypatch: pytest.MonkeyPatch) -> dict[str | None, Path]:
    there = dict(snapshots)

    def fetch(model: str, *, revision: str | None = None, **_: Any) -> str:
        if model != ID or revision not in there:
            raise OSError(f"404: {model} {revision}")
        return str(there[revision])

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    return there


def recipe_of(**sections: Any) -> Recipe:
    data = {"model": ID, "judge": {"kind": "coin"}, "prompts": {"source": "p", "deal": "same"}}
    return check_recipe({**data, **sections}, "r.yaml")


def test_a_revision_is_what_is_fetched(hub: dict[str | None, Path]) -> None:
    assert local_model(ID) == hub[None]
    assert local_model(ID, "old") == hub["old"]
    with pytest.raises(DataError, match="some-model at the revision none: neither a folder here nor"):
        local_model(ID, "none")
    recipe = recipe_of(model_revision="old")
    assert named_model(recipe, ID) == hub["old"]
    assert named_model(recipe, str(hub[None])) == hub[None]


@pytest.mark.parametrize("judge", [{"kind": "llm"}, {"kind": "reward_model"}], ids=["llm", "reward_model"])
def test_a_judge_of_another_revision_is_another_judge(
    judge: dict[str, str], hub: dict[str | None, Path], tmp_path: Path
) -> None:
    if judge["kind"] == "reward_model":
        hub.update({name: make_reward_model(tmp_path / str(name), seed=seed) for seed, name in enumerate(hub)})
    opened: list[str] = []
    found = {}
    for revision in (None, "old"):
        asked = recipe_of(judge={**judge, "model": ID, "model_revision": revision}).judge
        assert asked is not None
        found[revision] = make_judge(asked, open_model=opened.append)
        assert weights_digest(hub[revision])[:12] in found[revision].identity
    assert found[None].identity != found["old"].identity


def test_a_reference_that_is_the_recipes_own_model_has_its_revision(
    hub: dict[str | None, Path], tmp_path: Path
) -> None:
    recipe = recipe_of(model_revision="old", train={"reference": ID})
    folders = [_reference(recipe, TrainInputs("", ""), hub[other]) for other in (None, "old")]
    assert folders == [str(hub["old"]), None]  # None: the policy's own weights


@pytest.mark.parametrize("model", ["/some/folder", "./folder", "~/folder"])
@pytest.mark.parametrize("where", ["model", "judge.model"])
def test_a_folder_has_no_revision(model: str, where: str) -> None:
    named = {"model": model, "model_revision": "old"}
    sections = named if where == "model" else {"judge": {"kind": "reward_model", **named}}
    with pytest.raises(
        RecipeError, match=rf"{where.removesuffix('model')}.*model_revision is old, but the model .* is a folder"
    ):
        recipe_of(**sections)


def test_the_policy_as_its_own_judge_has_no_revision() -> None:
    with pytest.raises(RecipeError, match="model_revision is old, but model: policy is the run's own"):
        recipe_of(judge={"kind": "llm", "model_revision": "old"})


def test_a_folder_beside_the_recipe_is_no_hub_id(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone" / "some-model").symlink_to(tiny)
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({"model": ID, "model_revision": "old", "judge": {"kind": "coin"}}))
    with pytest.raises(RecipeError, match=r"model_revision is old, but the model /.* is a folder"):
        load_recipe(path)


TOP = {"model": "m", "prompts": {"source": "p.jsonl", "deal": "same"}, "judge": {"kind": "coin"}}
SOURCE = {"prompts": {"source": "p.jsonl"}, "judge": {"kind": "coin"}}
MIXED = {"model": "m", "num_prompts": 2, "sources": {"a": SOURCE}}
JUDGE = "{kind: KIND, model: sub, model_revision: old}"
COMBINED = f"{{kind: combine, how: min, normalize: none, judges: [{{kind: coin}}, {JUDGE}]}}"


@pytest.mark.parametrize("kind", ["llm", "reward_model"])
@pytest.mark.parametrize(
    ("recipe", "given", "key"),
    [
        (TOP, f"judge={JUDGE}", "judge"),
        (TOP, f"judge={COMBINED}", "judge.judges.1"),
        (TOP, f"evaluate.judge={JUDGE}", "evaluate.judge"),
        (MIXED, f"sources.a.evaluate.judge={JUDGE}", "sources.a.evaluate.judge"),
    ],
    ids=["judge", "one of several", "panel", "source"],
)
def test_which_model_is_a_folder_is_said(
    kind: str, recipe: dict[str, Any], given: str, key: str, tmp_path: Path
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    with pytest.raises(RecipeError, match=rf"^{key}\.model_revision is old, but the model /.* is a folder"):
        load_recipe(tmp_path / "r.yaml", [given.replace("KIND", kind)])


def test_a_run_keeps_to_the_weights_of_its_revision(hub: dict[str | None, Path], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, hub["old"], rounds=1)
    at = ("model=" + ID, "train.reference=" + ID, "model_revision=old")
    iterate(load_recipe(path, at), tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "run.json").read_text())
    assert kept["model"] == kept["reference"] == weights_digest(hub["old"])
    assert "model_revision: old" in (tmp_path / "run" / "recipe.yaml").read_text()
    # the same weights under another name are the same run
    iterate(load_recipe(path, [f"train.reference={hub['old']}"]), tmp_path / "run")
    with pytest.raises(RecipeError, match="was started with another model"):
        iterate(load_recipe(path, at[:2]), tmp_path / "run")
