"""What a source's prompts lack is said before anything is sampled, by every command that looks."""

import json
from pathlib import Path
from typing import Any

import pytest
from scripted_run import write_recipe

import selfplay
from selfplay.cli import main
from selfplay.errors import DataError, RecipeError
from selfplay.judges.win_rate_scale import check_win_rate_scale
from selfplay.pool_checks import check_pool
from selfplay.prompts import load_pool
from selfplay.recipe_file import check_recipe
from selfplay.types import Completion, Prompt

GOLD_PAIRS = ("pairs={kind: gold_vs_completion}", "judge=null")
CORRECT = {"kind": "llm", "model": "policy", "template": "correctness"}
REGEX = {"kind": "regex", "pattern": "(.*)"}


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        pytest.param(["judge={kind: rouge_l}"], "judge: rouge_l compares with the gold answer", id="likeness"),
        pytest.param(
            ["judge={kind: verifier, checks: [{kind: any_of, checks: [{kind: numeric}]}]}"],
            "judge: verifier compares with the gold answer",
            id="a rule",
        ),
        pytest.param(
            ["evaluate.judge={kind: rouge_l}"], "evaluate.judge: rouge_l compares with the gold answer", id="the panel"
        ),
        pytest.param(GOLD_PAIRS, "pairs.kind gold_vs_completion needs a gold answer", id="pairs"),
        pytest.param(
            ["judge={kind: llm}", "pairs={kind: win_rates}"],
            "pairs.win_rate_from is scores, but judge.template additive asks about one completion at a time",
            id="win rates",
        ),
        pytest.param(["rounds=9"], "round 3 needs prompts 25 to 32", id="a pool that runs out"),
        pytest.param(["judge.checks=[{words: 3}]"], 'judge.checks: a check is a mapping with a "kind"', id="no kind"),
    ],
)
def test_every_command_says_what_prompts_lack_before_anything_is_sampled(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], sets: list[str], said: str
) -> None:
    path, out = write_recipe(tmp_path, tiny), tmp_path / "run"
    overrides = [part for one in sets for part in ("--set", one)]
    run = ["iterate", str(path), "--out", str(out), *overrides]
    for command in (["validate", str(path), *overrides], [*run, "--dry-run"], run):
        assert main(command) in (64, 65)
        assert said in " ".join(capsys.readouterr().err.split())
    assert not list(out.rglob("*.jsonl"))


def checked(folder: Path, golds: list[str | None], judge: dict[str, Any] | None, **sections: Any) -> None:
    rows = [{"prompt": f"Say {n}."} | ({"gold": gold} if gold is not None else {}) for n, gold in enumerate(golds)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = {"source": str(folder / "p.jsonl"), "deal": "same"}
    recipe = check_recipe({"model": "m", "prompts": prompts, "judge": judge, **sections}, "r")
    check_pool(recipe.by_source[""], load_pool(recipe.prompts, seed=0), judge_given=judge is None)


@pytest.mark.parametrize(
    "judge",
    [CORRECT, {"kind": "verifier", "checks": [{**REGEX, "match_gold": True}]}, {"kind": "rouge_l"}],
    ids=["a template", "a pattern", "likeness"],
)
def test_a_judge_that_compares_with_gold_answers_needs_some(tmp_path: Path, judge: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"none of 2 prompts has one \(the first: .*p\.jsonl:[12]\)"):
        checked(tmp_path, [None, None], judge)
    several = [judge, {"kind": "coin"}]
    both = {"kind": "combine", "how": "min", "normalize": "none", "judges": several}
    with pytest.raises(DataError, match="compares with the gold answer"):
        checked(tmp_path, [None, None], both)
    checked(tmp_path, [None, "1"], judge)  # how many may be without is max_unparsed's matter


API = {"kind": "api", "base_url": "https://judge.example/v1", "model": "m"}
RATES = {"kind": "win_rates"}


def rates_checked(judge: dict[str, Any], **pairs: Any) -> None:
    data = {"model": "m", "prompts": {"source": "p", "deal": "same"}, "judge": judge, "pairs": RATES | pairs}
    check_win_rate_scale(check_recipe(data, "r").by_source[""])


@pytest.mark.parametrize("judge", [{"kind": "llm", "template": "safety"}, API], ids=["llm", "api"])
def test_scores_of_a_template_about_one_completion_are_no_win_rates(tmp_path: Path, judge: dict[str, Any]) -> None:
    with pytest.raises(
        RecipeError, match=r"a pairwise template, such as pairwise_helpfulness, or say win_rate_from: order$"
    ):
        rates_checked(judge)
    both = {"kind": "combine", "how": "min", "judges": [judge, {**judge, "template": "pairwise_helpfulness"}]}
    with pytest.raises(RecipeError, match="win_rate_from: order, or normalize: rank"):
        rates_checked({**both, "normalize": "none"})
    rates_checked({**both, "normalize": "rank"})
    rates_checked({**judge, "template": "pairwise_helpfulness"})
    for other in ("order", "bradley_terry"):
        rates_checked(judge, win_rate_from=other)


def test_pairs_of_files_are_refused_where_scores_are_no_win_rates(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write_recipe(tmp_path, tiny, judge={"kind": "llm"}, pairs=RATES), tmp_path / "pairs.jsonl"
    files = ["--groups", str(tmp_path / "groups"), "--judgements", str(tmp_path / "judged"), "--out", str(out)]
    assert main(["pairs", str(path), *files]) == 64
    assert "its scores are no win rates" in " ".join(capsys.readouterr().err.split())


def test_a_judge_that_reads_none_needs_none(tmp_path: Path) -> None:
    (tmp_path / "t.md").write_text(
        "---\nname: t\nversion: 1\nmode: pointwise\nlabels: {yes: 1, no: 0}\n---\n[system]\n{gold}\n[user]\n{completion}"
    )
    own = {"kind": "llm", "template": str(tmp_path / "t.md"), "verdict": "labels"}
    with pytest.raises(DataError, match="compares with the gold answer"):
        checked(tmp_path, [None, None], own)
    replaced = {**own, "system_prompt": "Be strict."}  # in the place of the turn that shows the gold answer
    for judge in (replaced, {"kind": "verifier", "checks": [REGEX]}, {"kind": "llm"}, {"kind": "coin"}, None):
        checked(tmp_path, [None, None], judge)


def test_what_a_judge_of_the_users_own_reads_is_not_asked(tiny: Path, tmp_path: Path) -> None:
    def longer(prompt: Prompt, completion: Completion) -> float:
        return float(len(completion.text))

    path = write_recipe(tmp_path, tiny, rounds=1, judge={"kind": "rouge_l"})
    selfplay.iterate(path, tmp_path / "run", judge=selfplay.pointwise(longer))
    assert (tmp_path / "run" / "round-000" / "round.json").exists()
