"""A judge that compares measures a policy by its win rate against the initial policy."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from mixed_run import SOURCES, write_mixed
from rich.console import Console
from scripted_run import ok
from test_pairs import group_of
from test_plan import printed
from test_rounds import AnyPair, KilledError, changed, commits, digests, length, rig
from typer.testing import CliRunner

import selfplay
from selfplay import store
from selfplay.cli import app
from selfplay.errors import DataError, JudgeError, RecipeError, StorageError
from selfplay.judges.against import Against, compares, measuring
from selfplay.judges.api import ApiJudge
from selfplay.judges.coin import Coin
from selfplay.judges.combine import Combine, Member
from selfplay.judges.llm import LLMJudge
from selfplay.judges.python import LoadedJudge
from selfplay.judges.template import load_template
from selfplay.judges.timed import TimedJudge
from selfplay.judges.unparsed import Counted, count_verdicts, unparsed
from selfplay.metrics import compare, status
from selfplay.plan import make_plan
from selfplay.protocols import JudgeContext
from selfplay.recipe_judges import ApiJudgeRecipe
from selfplay.report import print_run
from selfplay.report_compare import print_comparison
from selfplay.report_texts import print_compared
from selfplay.rounds import iterate
from selfplay.types import Completion, Group, Judgement, Prompt

__all__ = ["rig"]


@selfplay.pairwise
def longer(prompt: Prompt, a: Completion, b: Completion) -> float | None:
    """Says nothing of "?" and the first of what holds a "!"."""
    if "?" in (a.text, b.text):
        return None
    if "!" in a.text + b.text:
        return 1.0
    return (1 + (len(a.text) > len(b.text)) - (len(a.text) < len(b.text))) / 2


class Recorder:
    """A judge that compares, and remembers what it was asked."""

    identity, compares = "recorder", True

    def __init__(self, score: float = 0.25) -> None:
        self.asked: list[tuple[list[list[str]], int]] = []
        self.score = score

    def count_verdicts(self, groups: Sequence[Group]) -> int:
        return 2 * len(groups)

    def judge(self, groups: Sequence[Group], context: JudgeContext) -> list[Judgement]:
        self.asked.append(([[c.text for c in group.completions] for group in groups], context.seed))
        context.progress(2 * len(groups))
        return [Judgement(group.prompt.id, (self.score, 1 - self.score)) for group in groups]


def test_each_completion_is_scored_by_the_opponents_in_its_place() -> None:
    mine, theirs = group_of(["aaa", "b", "cc", "?", "d!"]), group_of(["aa", "bb", "cc", "d", "e"])
    (found,) = Against(longer, [theirs]).judge([mine], JudgeContext())
    assert found.scores == (1.0, 0.0, 0.5, None, 0.5)
    assert "no comparison got a verdict in both orders" in found.notes[3]
    assert found.notes[4] == "1 of 1 comparisons changed with the order"
    assert (found.num_compared, found.num_flipped) == (4, 1)


def test_fewer_opponents_are_met_again() -> None:
    (found,) = Against(longer, [group_of(["aa", "bbbb"])]).judge([group_of(["ccc", "ddd", "eee"])], JudgeContext())
    assert found.scores == (1.0, 0.0, 1.0)


def test_verdicts_that_were_asked_for_and_could_not_be_read_are_counted() -> None:
    @selfplay.pairwise
    def silent(prompt: Prompt, a: Completion, b: Completion) -> float | None:
        return None if "?" in a.text else 0.75

    (found,) = Against(silent, [group_of(["aa", "bb"])]).judge([group_of(["?", "b"])], JudgeContext())
    assert count_verdicts([found]) == Counted(num_asked=4, num_unparsed=1, num_completions=2, num_unscored=1)
    assert unparsed(found).total() == 1
    # one that doesn't count says two win rates for each comparison
    (found,) = Against(Recorder(), [group_of(["aa", "bb"])]).judge([group_of(["a", "b"])], JudgeContext())
    assert count_verdicts([found]).num_asked == 4


def test_every_place_is_asked_about_with_a_seed_of_its_own_and_counted() -> None:
    recorder, told = Recorder(), list[int]()
    mine = [group_of(["a", "b"], id="p"), group_of(["c", "d"], id="q")]
    theirs = [group_of(["C", "D", "E"], id="q"), group_of(["A", "B", "X"], id="p")]
    judge = Against(recorder, theirs)
    judge.judge(mine, JudgeContext(seed=7, progress=told.append))
    assert [texts for texts, _ in recorder.asked] == [[["a", "A"], ["c", "C"]], [["b", "B"], ["d", "D"]]]
    assert len({seed for _, seed in recorder.asked}) == 2
    assert told == [4, 8]
    assert judge.count_verdicts(mine) == 8
    assert judge.identity == "recorder against the initial policy"


def test_an_opponent_that_is_not_there_and_a_score_that_is_no_probability_are_errors() -> None:
    mine = group_of(["a", "b"])
    for theirs in ([group_of(["A", "B"], id="q")], []):
        with pytest.raises(StorageError, match="lacks completions to compare with"):
            Against(longer, theirs).judge([mine], JudgeContext())
    with pytest.raises(JudgeError, match=r"completion 0: 3\.0 is no probability"):
        Against(Recorder(3.0), [mine]).judge([mine], JudgeContext())


def test_judges_say_whether_they_compare(tmp_path: Path) -> None:
    def asked(template: str) -> list[Any]:
        recipe = ApiJudgeRecipe(kind="api", base_url="http://localhost/v1", model="m", template=template)
        made = load_template(template, Path())
        return [LLMJudge(made), ApiJudge(made, recipe)]

    comparing = [longer, LoadedJudge(longer, "python:"), TimedJudge(LoadedJudge(longer, ""), 1.0), Recorder()]
    comparing += asked("pairwise_helpfulness")
    scoring = [Coin(), length, LoadedJudge(length, ""), TimedJudge(LoadedJudge(Coin(), ""), 1.0), *asked("additive")]
    assert [compares(one) for one in comparing] == [True] * 6
    assert [compares(one) for one in scoring] == [False] * 6
    assert not compares(None)


def test_only_judges_of_one_kind_measure_together() -> None:
    def combined(*judges: Any) -> Combine:
        return Combine([Member("j", judge) for judge in judges], how="weighted_mean", normalize="none")

    both, mixed = combined(longer, Recorder()), combined(longer, Coin())
    assert compares(both)
    assert not compares(mixed)
    assert measuring(both, named=True) is both
    assert measuring(mixed, named=False) is None
    with pytest.raises(RecipeError, match=r"evaluate\.judge: some of the judges that are combined compare"):
        measuring(mixed, named=True)
    assert measuring(None, named=False) is None


# runs

PREFERS = """
from pathlib import Path

def prefers(prompt, a, b):
    with (Path(__file__).parent / "calls.log").open("a") as log:
        log.write(f"{a.text!r} {b.text!r}\\n")
    if "q" in a.text + b.text:
        return None
    return (1 + (a.text > b.text) - (a.text < b.text)) / 2
"""


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A panel's judge that compares: what sorts later is better, and a q is no verdict."""
    folder = tmp_path_factory.mktemp("judge")
    (folder / "my.py").write_text(PREFERS)
    judge = {"kind": "python", "target": f"{folder / 'my.py'}:prefers"}
    return {"evaluate": {"num_completions": 3, "num_completions_between": 2, "judge": judge}}


def play(rig: dict[str, Any], sections: dict[str, Any], out: Path) -> dict[str, Any]:
    return iterate(changed(rig, **sections), out, judge=length, selector=AnyPair(), allow_code=True)


@pytest.fixture(scope="module")
def played(rig: dict[str, Any], sections: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    calls = calls_of(sections)
    calls.unlink(missing_ok=True)
    play(rig, sections, out)
    (out.parent / "calls.log").write_text(calls.read_text())
    return out


def calls_of(sections: dict[str, Any]) -> Path:
    return Path(sections["evaluate"]["judge"]["target"].partition(":")[0]).with_name("calls.log")


def completions(folder: Path, draw: str) -> dict[str, list[str]]:
    groups = store.read_records(folder / "heldout" / draw / "00000.jsonl", Group)
    return {group.prompt.id: [c.text for c in group.completions] for group in groups}


@pytest.mark.parametrize(("index", "count"), [(0, 2), (1, 3)], ids=["between", "last"])
@pytest.mark.parametrize(("draw", "key"), [("temperature", "per_prompt"), ("greedy", "per_prompt_greedy")])
def test_a_panel_s_score_is_the_win_rate_against_the_initial_policy(
    played: Path, draw: str, key: str, index: int, count: int
) -> None:
    mine, theirs = completions(played / f"round-{index:03d}", draw), completions(played / "initial", draw)
    expected = {}
    for id, texts in mine.items():
        assert len(texts) == (count if draw == "temperature" else 1)
        rates = [(1 + (a > b) - (a < b)) / 2 for a, b in zip(texts, theirs[id], strict=False) if "q" not in a + b]
        if rates:
            expected[id] = pytest.approx(sum(rates) / len(rates))
    figures = store.read_json(played / f"round-{index:03d}" / "eval.json")
    assert figures[key] == expected
    assert figures["win_rate_against"] == "initial policy"
    assert figures["num_unjudged"] == sum(
        "q" in a + b
        for id, texts in completions(played / f"round-{index:03d}", "temperature").items()
        for a, b in zip(texts, completions(played / "initial", "temperature")[id], strict=False)
    )


def test_the_initial_policy_scores_a_half_and_nobody_is_asked(played: Path) -> None:
    figures = store.read_json(played / "initial" / "eval.json")
    assert (figures["heldout_score"], figures["heldout_interval"], figures["heldout_greedy"]) == (0.5, [0.5, 0.5], 0.5)
    assert not list((played / "initial").rglob("*-judgements"))
    last = status(played)["rounds"][-1]
    assert last["heldout_score"] != 0.5, "else the tests here show nothing"
    assert status(played)["gain"] == pytest.approx(last["heldout_score"] - 0.5)


def test_a_plan_counts_the_verdicts_that_a_run_asks_for(
    rig: dict[str, Any], sections: dict[str, Any], played: Path, tmp_path: Path
) -> None:
    num_calls = len((played.parent / "calls.log").read_text().splitlines())
    recipe = changed(rig, **sections)
    # 4 prompts, 3 completions of the last policy, 2 of the one between, and both greedy
    told = f"panels: 28 comparisons with completions of the initial policy, {num_calls} verdicts"
    assert told in " ".join(printed(make_plan(recipe, tmp_path / "run")).split())
    assert num_calls == 2 * 28
    assert "comparisons" not in printed(make_plan(changed(rig), tmp_path / "run"))
    several = {**sections["evaluate"], "judge": {"kind": "llm", "model": rig["model"], "num_verdicts": 3}}
    several["judge"]["template"] = "pairwise_helpfulness"
    assert "28 comparisons with completions of the initial policy, 168" in " ".join(
        printed(make_plan(changed(rig, evaluate=several), tmp_path / "run")).split()
    )


@pytest.mark.parametrize("draw", ["temperature", "greedy"])
def test_a_run_killed_while_it_compares_ends_as_an_undisturbed_one(
    rig: dict[str, Any], sections: dict[str, Any], played: Path, tmp_path: Path, draw: str
) -> None:
    out = tmp_path / "run"
    point = out / "round-000" / "heldout" / f"{draw}-judgements" / "00000.jsonl"
    with pytest.MonkeyPatch.context() as monkeypatch:
        commits(monkeypatch, lambda path: path == point, before=True)
        with pytest.raises(KilledError):
            play(rig, sections, out)
    play(rig, sections, out)
    assert digests(out) == digests(played)


def test_reports_call_it_a_win_rate(played: Path) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=110)
    print_run(played, status(played), console)
    print_comparison(compare([played, played]), console)
    print_compared(played, status(played), console)
    said = " ".join(stream.getvalue().split())
    assert said.count("score: win rate against the initial policy") == 2
    assert "policy of round 1, win rate" in said
    assert "initial policy, score" not in said
    assert "win rate against the initial policy 0." in selfplay.metrics.one_line(played, 1)


def test_win_rates_and_scores_are_not_compared(played: Path, rig: dict[str, Any], tmp_path: Path) -> None:
    iterate(changed(rig, evaluate={"judge": {"kind": "coin"}}), tmp_path / "run", judge=length, selector=AnyPair())
    with pytest.raises(DataError, match="some are win rates"):
        compare([played, tmp_path / "run"])


def test_one_source_may_be_compared_and_others_scored(sections: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    rules = {**SOURCES["rules"], "evaluate": {"judge": sections["evaluate"]["judge"]}}
    mixed = write_mixed(tmp_path, tiny, sources={**SOURCES, "rules": rules}, rounds=1)
    ok("iterate", mixed, "--out", tmp_path / "run", "--allow-code")
    for folder in ("initial", "round-000"):
        figures = store.read_json(tmp_path / "run" / folder / "eval.json")
        measured = {name: own.get("win_rate_against") for name, own in figures["sources"].items()}
        assert measured == {"gold": None, "rules": "initial policy"}
        assert (figures["sources"]["rules"]["heldout_score"] == 0.5) == (folder == "initial")
        assert figures["sources"]["gold"]["heldout_score"] != 0.5
    stream = io.StringIO()
    print_run(tmp_path / "run", status(tmp_path / "run"), Console(file=stream, width=110))
    print_compared(tmp_path / "run", status(tmp_path / "run"), Console(file=stream, width=200))
    said = " ".join(stream.getvalue().split())
    assert "score of rules: win rate against the initial policy" in said
    assert "score of gold" not in said
    assert "policy of round 0, score" in said
    assert "policy of round 0, win rate" in said


def test_a_model_that_compares_is_opened_for_the_panel(rig: dict[str, Any], tmp_path: Path) -> None:
    # "the" and "and" are single tokens of the tiny tokenizer
    (tmp_path / "which.md").write_text(
        "---\nname: which\nversion: 1\nmode: pairwise\nlabels: {the: 1, and: 0}\n---\n"
        "[user]\n{completion_a}\n{completion_b}\n"
    )
    judge = {"kind": "llm", "model": rig["model"], "template": str(tmp_path / "which.md"), "verdict": "labels"}
    iterate(changed(rig, rounds=1, evaluate={"judge": judge}), tmp_path / "run", judge=length, selector=AnyPair())
    (judgements,) = (tmp_path / "run/round-000/heldout/temperature-judgements").glob("*.jsonl")
    found = store.read_records(judgements, Judgement)
    assert [len(one.scores) for one in found] == [2] * 4
    assert all(one.num_compared == 2 for one in found)
    assert store.read_json(tmp_path / "run/run.json")["heldout_judge"].endswith("against the initial policy")


def test_a_combination_of_both_kinds_leaves_the_panel_without_a_score(rig: dict[str, Any], tmp_path: Path) -> None:
    mixed = Combine([Member("longer", longer), Member("length", length)], how="min", normalize="none")
    iterate(changed(rig, rounds=1), tmp_path / "run", judge=mixed, selector=AnyPair())
    assert store.read_json(tmp_path / "run/round-000/eval.json")["heldout_score"] is None


# one model alone


@pytest.fixture(scope="module")
def recipe(rig: dict[str, Any], sections: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump({**rig, "evaluate": sections["evaluate"]}))
    return path


def evaluated(*arguments: object) -> str:
    """What `selfplay evaluate` says, refused."""
    found = CliRunner().invoke(app, ["evaluate", *map(str, arguments), "--allow-code"])
    assert found.exit_code != 0
    return str(found.exception)


def test_a_policy_alone_is_compared_with_the_panel_that_is_named(
    rig: dict[str, Any], recipe: Path, played: Path, tmp_path: Path
) -> None:
    policy = ("--model", played / "round-001" / "policy")
    ok("evaluate", recipe, "--model", rig["model"], "--out", tmp_path / "start", "--allow-code")
    start = store.read_json(tmp_path / "start" / "eval.json")
    assert start == store.read_json(played / "initial" / "eval.json")
    for name, against in (("a", played / "initial"), ("b", tmp_path / "start")):
        ok("evaluate", recipe, *policy, "--out", tmp_path / name, "--against", against, "--allow-code")
        assert store.read_json(tmp_path / name / "eval.json") == store.read_json(played / "round-001" / "eval.json")


def test_a_policy_without_anything_to_compare_with_is_refused(recipe: Path, played: Path, tmp_path: Path) -> None:
    said = evaluated(recipe, "--model", played / "round-001" / "policy", "--out", tmp_path / "out")
    assert "--against: RUN/initial of a run" in said
    assert "evaluate.judge" in said
    assert not (tmp_path / "out" / "heldout").exists()


def test_an_opponent_that_would_do_nothing_or_is_another_s_is_refused(
    rig: dict[str, Any], recipe: Path, played: Path, tmp_path: Path
) -> None:
    out, policy = ("--out", tmp_path / "out"), ("--model", played / "round-001" / "policy")
    opponent = ("--against", played / "initial")
    assert "not compared with itself" in evaluated(recipe, "--model", rig["model"], *out, *opponent)
    scored = ("--set", "evaluate.judge={kind: coin}")
    assert "no judge of this panel compares" in evaluated(recipe, *policy, *out, *opponent, *scored)
    assert "neither RUN/initial" in evaluated(recipe, *policy, *out, "--against", played / "round-000")
    cooler = ("--set", "evaluate.temperature=0.5", "--set", "evaluate.kl=false")
    assert "differ in:\n  sampling" in evaluated(recipe, *policy, *out, *opponent, *cooler)
    # of another model: the panel of the round's policy
    ok("evaluate", recipe, *policy, "--out", tmp_path / "own", *scored)
    assert "differ in:\n  model" in evaluated(recipe, *policy, *out, "--against", tmp_path / "own")
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"prompt": "Tell me of another thing."}) + "\n")
    others = ("--set", f"prompts.heldout={held}")
    assert "holds no completions of these prompts" in evaluated(recipe, *policy, *out, *opponent, *others)


def test_a_combination_that_would_add_win_rates_to_scores_is_refused_before_any_work(
    rig: dict[str, Any], tmp_path: Path
) -> None:
    pairwise = {"kind": "llm", "model": rig["model"], "template": "pairwise_helpfulness"}
    mixed = {"kind": "combine", "how": "min", "normalize": "none", "judges": [pairwise, {"kind": "coin"}]}
    for act in (make_plan, lambda recipe, out: iterate(recipe, out)):
        with pytest.raises(RecipeError, match=r"evaluate\.judge: some of the judges that are combined compare"):
            act(changed(rig, evaluate={"judge": mixed}), tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**rig, "evaluate": {"judge": mixed}}))
    found = CliRunner().invoke(app, ["validate", str(tmp_path / "recipe.yaml")])
    assert found.exit_code == 64
