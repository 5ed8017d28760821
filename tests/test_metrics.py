"""A gain that a panel's judge said too little about is shown as such, wherever it is shown."""

import json
from pathlib import Path
from typing import Any

import pytest
from mixed_run import SOURCES, write_mixed
from scripted_run import ok, write_recipe

SILENT = """
def silent(prompt, completion):
    return None if sum(completion.text.encode()) % 5 < 3 else float(len(completion.text))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A round whose panel is judged by a function that has no verdict on about 60 % of what it sees."""
    folder = tmp_path_factory.mktemp("silent")
    (folder / "mine.py").write_text(SILENT)
    judge = {"kind": "python", "target": "mine.py:silent"}
    recipe = write_recipe(folder, tiny, rounds=1, evaluate={"num_completions": 4, "judge": judge})
    ok("iterate", recipe, "--out", folder / "run", "--allow-code")
    return folder / "run"


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    ok(*arguments)
    return capsys.readouterr().out


def figures(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    return json.loads(said(capsys, *arguments, "--json"))


def test_a_gain_over_few_verdicts_is_an_alarm_beside_it_in_status_and_compare(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = figures(capsys, "status", run)
    shares = found["initial"]["unjudged"], found["rounds"][0]["unjudged"]
    assert all(0.3 < share < 0.9 for share in shares)
    lines = said(capsys, "status", run).splitlines()
    assert lines[1].endswith("no verdict")
    assert lines[2].endswith(f"{shares[0]:.3f}")
    for name in ("sampled", "greedy"):
        at = next(n for n, line in enumerate(lines) if line.startswith(f"gain over the initial policy, {name}"))
        assert lines[at + 1].startswith("ALARM: the panel's judge gave no verdict on ")
        assert "not to be trusted" in lines[at + 1]
    assert f"{shares[0]:.1%} of what the initial policy and {shares[1]:.1%}" in found["gain_alarm"]
    beside = said(capsys, "compare", run, run)
    assert f"run: no verdict on a share of {shares[0]:.3f} -> {shares[1]:.3f}" in beside
    assert beside.count("run, sampled: ALARM: the panel's judge gave no verdict") == 2
    assert beside.count("ALARM: 2 of these gains are not to be trusted, nor is their mean") == 2
    assert figures(capsys, "compare", run)["runs"][0]["gain_alarm"] == found["gain_alarm"]


def test_a_panel_alone_says_it_too(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path) -> None:
    recipe = run.parent / "recipe.yaml"
    alone = said(capsys, "evaluate", recipe, "--model", tiny, "--out", tmp_path, "--allow-code")
    assert alone.splitlines()[1].endswith("no verdict")
    assert "ALARM: the judge of the panel gave no verdict on " in alone
    wide = ("--set", "pairs.max_unparsed=1.0")
    assert "ALARM" not in said(capsys, "evaluate", recipe, "--model", tiny, "--out", tmp_path, "--allow-code", *wide)


def test_within_max_unparsed_the_share_is_shown_and_no_alarm(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = run.parent / "recipe.yaml"
    ok("iterate", recipe, "--out", run, "--allow-code", "--set", "pairs.max_unparsed=1.0")
    found = figures(capsys, "status", run)
    assert found["initial"]["unjudged"] > 0.3
    assert found["gain_alarm"] is found["greedy_gain_alarm"] is None
    assert "no verdict" in said(capsys, "status", run)
    ok("iterate", recipe, "--out", run, "--allow-code")


def test_a_panel_that_was_judged_whole_says_nothing_of_it(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ok("iterate", write_recipe(tmp_path, tiny, rounds=1), "--out", tmp_path / "run")
    assert figures(capsys, "status", tmp_path / "run")["initial"]["unjudged"] == 0
    assert "no verdict" not in said(capsys, "status", tmp_path / "run")
    assert "no verdict" not in said(capsys, "compare", tmp_path / "run")


def test_each_source_has_an_alarm_of_its_own(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(SILENT)
    silent = {"judge": {"kind": "python", "target": "mine.py:silent"}}
    sources = {**SOURCES, "rules": {**SOURCES["rules"], "evaluate": silent}}
    sections = {"rounds": 1, "num_prompts": 8, "evaluate": {"num_completions": 2, "greedy": False}}
    mixed, out = write_mixed(tmp_path, tiny, sources=sources, **sections), tmp_path / "run"
    ok("iterate", mixed, "--out", out, "--allow-code")
    found = figures(capsys, "status", out)["sources"]
    assert found["rules"]["gain_alarm"] is not None
    assert found["gold"]["gain_alarm"] is None
    lines = said(capsys, "status", out).splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("gain over the initial policy on rules"))
    assert lines[at + 1].startswith("ALARM: ")
