"""Messages and figures of several sources name the right one, whatever it is called."""

from pathlib import Path
from typing import Any

import pytest
from mixed_run import SOURCES, write_mixed
from scripted_run import JUDGED, ok

from selfplay.changes import refused
from selfplay.cli import main
from selfplay.errors import DataError, RecipeError
from selfplay.metrics import compare
from selfplay.recipe import Recipe
from selfplay.recipe_file import check_recipe

OPEN: dict[str, Any] = {"prompts": {"source": "p.jsonl"}, "judge": JUDGED}
KEYS = ["weight", "prompts", "judge", "judges", "pairs", "evaluate"]


def recipe(name: str, **keys: Any) -> Recipe:
    return check_recipe({"model": "m", "num_prompts": 4, "sources": {name: {**OPEN, **keys}}}, "r")


@pytest.mark.parametrize("name", KEYS)
def test_a_source_with_the_name_of_a_key_is_read_as_any_other(name: str) -> None:
    for keys, said in (
        ({"wieght": 2.0}, f'sources.{name}.wieght: unknown key; did you mean "weight"?'),
        (
            {"prompts": {"source": "p", "turn": "last"}},
            f'sources.{name}.prompts.turn: unknown key; did you mean "turns"?',
        ),
        ({"judge": {**JUDGED, "socre": "all"}}, f'sources.{name}.judge.socre: unknown key; did you mean "score"?'),
    ):
        with pytest.raises(RecipeError) as caught:
            recipe(name, **keys)
        assert said in str(caught.value)


@pytest.mark.parametrize("name", KEYS)
def test_a_change_of_a_source_with_the_name_of_a_key_is_seen(name: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    changed = recipe(name, weight=2.0, judge={"kind": "coin"})
    assert {line.partition(":")[0] for line in refused(recipe(name), changed, tmp_path)} >= {
        f"sources.{name}.weight",
        f"sources.{name}.judge.kind",
    }


def test_a_member_of_a_combination_may_have_a_weight_and_a_misspelt_one_is_told_so() -> None:
    members = [{"kind": "coin", "wieght": 2.0}, JUDGED]
    with pytest.raises(RecipeError, match=r'judge\.judges\.0\.wieght: unknown key; did you mean "weight"\?'):
        recipe("a", judge={"kind": "combine", "how": "min", "normalize": "none", "judges": members})


NO_LABELS = '---\nname: t\nversion: 1\nmode: pointwise\nparse: {line: "Score: <n>", min: 0, max: 5}\n---\n'


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        pytest.param(["rounds=30"], "sources.gold.prompts: round 11 needs", id="a pool that runs out"),
        pytest.param(["sources.rules.prompts.prompt_column=asked"], "sources.rules: ", id="a column"),
        pytest.param(
            ["sources.rules.prompts.split=test"], "sources.rules: prompts.name and prompts.split", id="a split"
        ),
        pytest.param(
            ["sources.rules.judge={kind: reward_model, model: MODEL}"], "sources.rules: judge.model: ", id="a judge"
        ),
        pytest.param(
            ["sources.rules.evaluate.judge={kind: reward_model, model: MODEL}"],
            "sources.rules: evaluate.judge.model: ",
            id="a panel judge",
        ),
        pytest.param(
            ["sources.rules.evaluate.judge={kind: llm, model: MODEL, template: t.md, verdict: labels}"],
            "sources.rules: evaluate.judge.template: t has no `labels`",
            id="a panel judge's template",
        ),
        pytest.param(
            ["sources.rules.evaluate.judge={kind: python, target: 'my_judges.py:f'}"],
            "sources.rules: evaluate.judge.target 'my_judges.py:f' is a program",
            id="a panel judge's program",
        ),
    ],
)
def test_an_error_names_its_source_once_and_its_key(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    (tmp_path / "t.md").write_text(f"{NO_LABELS}[user]\n{{prompt}}\n{{completion}}\n")
    sets = [part for one in overrides for part in ("--set", one.replace("MODEL", str(tiny)))]
    assert main(["iterate", str(write_mixed(tmp_path, tiny)), "--out", str(tmp_path / "run"), *sets]) in (64, 65, 77)
    error = " ".join(capsys.readouterr().err.partition("error: ")[2].split())
    assert error.startswith(said)
    assert error.count("sources.") == 1


def test_validate_says_of_a_pool_that_runs_out_what_a_run_would_beside_a_source_that_it_does_not_read(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "table.csv").write_text("prompt\nTell me of tables.\n")
    mixed = write_mixed(
        tmp_path, tiny, rounds=30, sources={**SOURCES, "open": {**SOURCES["open"], "prompts": {"source": "table.csv"}}}
    )
    assert main(["validate", str(mixed)]) == 64
    said = capsys.readouterr().err
    assert "sources.gold.prompts: round 11 needs" in said
    assert "Lower num_prompts, the source's weight or rounds" in said


def test_runs_are_compared_on_the_sources_whose_panel_is_scored_and_the_others_are_named(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spin = {key: part for key, part in SOURCES["gold"].items() if key != "evaluate"}
    mixed, out = write_mixed(tmp_path, tiny, rounds=1, sources={**SOURCES, "gold": spin}), tmp_path / "run"
    ok("iterate", mixed, "--out", out)
    found = compare([out, out])
    assert found["sources"].keys() == {"rules"}
    assert found["unscored"] == ["gold"]
    capsys.readouterr()
    ok("compare", out, out)
    assert "source gold: nobody scores its panel" in capsys.readouterr().out
    (out / "round-000" / "eval.json").unlink()
    with pytest.raises(DataError, match="source gold: no judged panel after a round"):
        compare([out, out])
