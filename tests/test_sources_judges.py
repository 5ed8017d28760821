"""The judges of several sources: their canaries, whether each is trusted, and the small recipe that ships, on a tiny model."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from mixed_run import SOURCES, write_mixed
from rewards import make_reward_model
from scripted_run import JUDGED, ok
from test_rounds import KilledError, commits, digests
from tiny import make_tiny_model

from selfplay import store
from selfplay.cli import main
from selfplay.errors import RecipeError
from selfplay.recipe import Recipe
from selfplay.recipe_file import check_recipe
from selfplay.rounds import iterate
from selfplay.trust import ACCURACY
from selfplay.types import PreferencePair

RECIPES = Path(__file__).parent.parent / "recipes"
ONE_ROUND: dict[str, Any] = {"rounds": 1, "num_prompts": 8, "evaluate": {"num_completions": 1, "greedy": False}}


def read_by(*judges: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "combine", "how": "weighted_mean", "normalize": "rank", "judges": list(judges)}


# canaries


def recipe_of(**sections: Any) -> Recipe:
    sources = {**SOURCES, "open": {**SOURCES["open"], "judge": read_by(JUDGED, {"kind": "llm"})}}
    return check_recipe({"model": "m", "num_prompts": 12, "sources": sources, **sections}, "r")


def test_canaries_are_counted_of_every_source_and_of_judges_beside_others() -> None:
    by_default, asked, off = recipe_of(), recipe_of(audit={"canaries": 2}), recipe_of(audit={"canaries": 0})
    counts = [{name: view.num_canaries for name, view in one.by_source.items()} for one in (by_default, asked, off)]
    assert counts == [
        {"gold": 0, "rules": 0, "open": 4},
        {"gold": 0, "rules": 2, "open": 2},
        {"gold": 0, "rules": 0, "open": 0},
    ]
    assert [one.num_canaries for one in (by_default, asked, off)] == [4, 4, 0]


def test_canaries_are_refused_where_no_source_has_a_judge() -> None:
    with pytest.raises(RecipeError, match=r"audit\.canaries: pairs\.kind gold_vs_completion has no judge"):
        recipe_of(sources={"gold": SOURCES["gold"]}, audit={"canaries": 2})


def test_each_source_with_a_judge_sees_canaries_and_a_run_killed_there_ends_as_an_undisturbed_one(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = write_mixed(tmp_path, tiny, **ONE_ROUND, audit={"canaries": 1})
    whole, out = tmp_path / "whole", tmp_path / "run"
    ok("iterate", mixed, "--out", whole, "--dry-run")
    said = capsys.readouterr().out
    assert "audit      rules: 4 canaries for each of 1 prompts" in said
    assert "audit      open: 4 canaries for each of 1 prompts, 8 completions to judge x 2 verdicts" in said
    iterate(mixed, whole)
    folder = whole / "round-000" / "canaries"
    assert sorted(path.name for path in folder.iterdir()) == ["open", "rules"]
    assert (folder / "open" / "judgements" / "member-1" / "00000.jsonl").is_file()
    sources = store.read_json(whole / "round-000" / "round.json")["sources"]
    assert [bool(sources[name]["audit"].get("canaries")) for name in ("gold", "rules", "open")] == [False, True, True]
    ok("status", whole)
    assert "round 0, open, canaries that lost: " in capsys.readouterr().out
    point = out / "round-000" / "canaries" / "open" / "verdicts.jsonl"
    with pytest.MonkeyPatch.context() as monkeypatch:
        commits(monkeypatch, lambda path: path == point, before=True)
        with pytest.raises(KilledError):
            iterate(mixed, out)
    iterate(mixed, out)
    assert digests(out) == digests(whole)


# trust


@pytest.fixture(scope="module")
def coin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model whose held-out figures include chance."""
    folder = make_reward_model(tmp_path_factory.mktemp("coin") / "model")
    figures = {"accuracy": 0.5, "accuracy_interval": [0.4, 0.6], "weights": store.weights_digest(folder)}
    (folder / ACCURACY).write_text(json.dumps(figures))
    return folder


@pytest.mark.parametrize("place", ["judge", "evaluate.judge"])
@pytest.mark.parametrize("together", [False, True], ids=["alone", "among others"])
def test_a_reward_model_at_chance_is_refused_in_any_source_before_anything_is_sampled(
    coin: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, together: bool
) -> None:
    asked: dict[str, Any] = {"kind": "reward_model", "model": str(coin)}
    if together:
        asked = {**read_by(JUDGED, asked), "normalize": "none"}
    changed = {"judge": asked} if place == "judge" else {"evaluate": {"judge": asked}}
    sources = {**SOURCES, "rules": {**SOURCES["rules"], **changed}}
    mixed, out = write_mixed(tmp_path, tiny, **ONE_ROUND, sources=sources), tmp_path / "run"
    run = ["iterate", str(mixed), "--out", str(out)]
    for command in (["validate", str(mixed)], [*run, "--dry-run"], run):
        assert main(command) == 64
        said = " ".join(capsys.readouterr().err.split())
        assert f"sources.rules: {place}.model" in said
        assert "not shown to be better than a coin" in said
    assert not list(out.rglob("groups"))


@pytest.mark.parametrize("command", ["judge", "evaluate"])
def test_a_judge_that_does_not_open_is_told_with_its_source_where_a_stage_runs_alone(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "mine.py").write_text("import absent_package\n\n\ndef score(prompt, completion):\n    return 1.0\n")
    sources = {**SOURCES, "rules": {**SOURCES["rules"], "judge": {"kind": "python", "target": "mine.py:score"}}}
    mixed = write_mixed(tmp_path, tiny, **ONE_ROUND, sources=sources)
    ok("generate", mixed, "--model", tiny, "--out", tmp_path / "groups")
    inputs = ["--groups", str(tmp_path / "groups")] if command == "judge" else ["--model", str(tiny)]
    assert main([command, str(mixed), *inputs, "--allow-code", "--out", str(tmp_path / "out")]) == 69
    said = " ".join(capsys.readouterr().err.split())
    assert "sources.rules" in said
    assert "absent_package" in said


def test_every_source_tells_how_good_its_judge_is_on_labelled_pairs(
    coin: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled = tmp_path / "labelled.jsonl"
    rows = [{"prompt": f"Ask {n}?", "chosen": "the thing and the end", "rejected": "zzz qqq"} for n in range(4)]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = {"kind": "reward_model", "model": str(coin), "calibration": str(labelled), "allow_chance": True}
    sources = {
        "open": {**SOURCES["open"], "judge": read_by(JUDGED, reward)},
        "rules": SOURCES["rules"],
    }
    mixed, out = write_mixed(tmp_path, tiny, **ONE_ROUND, sources=sources), tmp_path / "run"
    ok("iterate", mixed, "--out", out)
    capsys.readouterr()
    found = store.read_json(out / "round-000" / "round.json")["sources"]
    assert found["open"]["audit"]["calibration"][0]["num_pairs"] == 4
    assert found["rules"]["audit"]["calibration"] is None
    ok("status", out)
    said = capsys.readouterr().out
    assert f"judge of open on {labelled}: accuracy" in said
    assert "judge of rules on" not in said


def test_validate_reads_the_rows_of_a_source_beside_one_that_it_can_not_read(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt"], ["Tell me of tables."]])
    sources = {**SOURCES, "open": {**SOURCES["open"], "prompts": {"source": "table.csv"}}}
    mixed = write_mixed(tmp_path, tiny, sources=sources)
    assert main(["validate", str(mixed)]) == 0
    with (tmp_path / "rules.jsonl").open("a") as rows:
        rows.write(json.dumps({"prompt": "Say it.", "checks": [{"kind": "wrods"}]}) + "\n")
    capsys.readouterr()
    assert main(["validate", str(mixed)]) == 65
    assert "rules.jsonl" in capsys.readouterr().err


# the recipe that ships


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """mixed_mini with few and short prompts, and a policy of random weights that has yes and no as other tokens."""
    folder = tmp_path_factory.mktemp("mini")
    model = make_tiny_model(folder / "model", max_position_embeddings=4096)
    data = yaml.safe_load((RECIPES / "mixed_mini.yaml").read_text())
    for name in ("alpaca", "dpo"):
        asked = [{"instruction": f"Tell me of {name} {n}.", "input": "", "output": f"The sky {n}."} for n in range(40)]
        (folder / f"{name}.json").write_text(json.dumps(asked))
    (folder / "says.md").write_text(
        "---\nname: says\nversion: 1\nmode: pointwise\nlabels: {the: 1, and: 0}\nmin_label_mass: 0.0\n---\n"
        "[user]\n{prompt}\n{completion}"
    )
    sources = data["sources"]
    sources["gold"]["prompts"]["source"] = "alpaca.json"
    sources["open"]["prompts"]["source"] = "dpo.json"
    sources["open"]["judge"]["judges"][0]["template"] = "says.md"
    for key, part in (("source", "train"), ("heldout", "heldout")):
        sources["rules"]["prompts"][key] = str(RECIPES / "data" / f"quickstart_{part}.jsonl")
    data |= {"model": str(model), "rounds": 1, "num_prompts": 8}
    data["generator"] |= {"kind": "transformers", "num_completions": 2, "max_tokens": 8}
    data["evaluate"] |= {"num_prompts": 1, "num_completions": 1}
    data["train"] |= {"num_train_epochs": 1, "bf16": False, "learning_rate": 1e-5}
    for name in ("gold", "rules", "open"):  # what random weights say ends nowhere, and passes no rule
        sources[name]["pairs"]["truncated"] = "rejected" if name == "gold" else "judged"
    path = folder / "mini.yaml"
    path.write_text(json.dumps(data))
    return path, model


def test_the_small_recipe_of_several_sources_plays_a_round_with_the_policy_among_its_judges(
    mini: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe, _ = mini
    ok("validate", recipe)
    ok("iterate", recipe, "--out", tmp_path / "run")
    done = store.read_json(tmp_path / "run" / "round-000" / "round.json")
    assert {name: own["counts"]["num_prompts"] for name, own in done["sources"].items()} == {
        "gold": 2,
        "rules": 4,
        "open": 2,
    }
    assert done["sources"]["gold"]["counts"]["num_pairs"] > 0
    assert done["sources"]["open"]["audit"]["parse_rate"] == 1
    assert done["sources"]["open"]["audit"]["canaries"]
    assert store.read_json(tmp_path / "run" / "round-000" / "eval.json")["sources"].keys() == done["sources"].keys()


def test_its_stages_one_by_one_ask_for_the_policy_that_judges(
    mini: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, model = mini
    groups, judged, pairs = tmp_path / "groups", tmp_path / "judged", tmp_path / "pairs.jsonl"
    ok("generate", recipe, "--model", model, "--out", groups)
    assert main(["judge", str(recipe), "--groups", str(groups), "--out", str(judged)]) == 64
    assert "name it with --model" in capsys.readouterr().err
    ok("judge", recipe, "--groups", groups, "--out", judged, "--model", model)
    assert sorted(path.name for path in judged.iterdir() if path.is_dir()) == ["open", "rules"]
    ok("pairs", recipe, "--groups", groups, "--judgements", judged, "--out", pairs)
    assert "gold" in {pair.source for pair in store.read_records(pairs, PreferencePair)}
