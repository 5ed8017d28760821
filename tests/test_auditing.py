"""What a round's judge is asked beside the real completions: the labelled pairs of `audit.calibration`, every round."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from mixed_run import SOURCES, write_mixed
from scripted_run import JUDGED, ok, write_recipe
from scripted_server import Act, Asked, Server, says
from test_rounds import KilledError, commits, digests

from selfplay import store
from selfplay.auditing import audit_judge
from selfplay.cli import main
from selfplay.errors import DataError, RecipeError, UnparsedGateError
from selfplay.judges.lift import pointwise
from selfplay.judges.python import own_judge
from selfplay.labelled import labelled_alarms
from selfplay.models import load_chat
from selfplay.progress import Reporter
from selfplay.protocols import JudgeContext
from selfplay.recipe_file import check_recipe, load_recipe
from selfplay.rounds import iterate
from selfplay.run import Round
from selfplay.types import Completion, Group, Judgement, Message, PreferencePair, Prompt

CHOSEN, REJECTED = "the moon and the sky again", "zzz qqq xxx"
ROWS = [{"prompt": f"Ask {n}?", "chosen": f"{CHOSEN} {n}", "rejected": f"{REJECTED} {n}"} for n in range(12)]
KNOWS = {"kind": "verifier", "checks": [{"kind": "contains", "any": ["moon", "sky"]}, {"kind": "words", "min": 9}]}


def labelled_in(folder: Path, rows: Sequence[dict[str, Any]] = ROWS, name: str = "labelled.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def round_json(run: Path, index: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = store.read_json(run / f"round-{index:03d}" / "round.json")
    return found


class Forgetful:
    """Prefers what people preferred in round 0, and its opposite from round 1 on."""

    identity = "forgetful"

    def __init__(self) -> None:
        self.seen: list[Completion] = []

    def judge(self, groups: Sequence[Group], context: JudgeContext) -> list[Judgement]:
        sign = 1 if context.round == 0 else -1
        self.seen += [c for group in groups for c in group.completions]
        return [
            Judgement(
                g.prompt.id, tuple(sign * (sum(c.text.encode()) % 97 + 100 * ("moon" in c.text)) for c in g.completions)
            )
            for g in groups
        ]


def test_a_judge_that_loses_what_it_knew_is_seen_in_the_round_where_it_does(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled = labelled_in(tmp_path)
    recipe = write_recipe(tmp_path, tiny, audit={"calibration": labelled}, evaluate={"judge": {"kind": "coin"}})
    judge = Forgetful()
    iterate(recipe, tmp_path / "run", judge=own_judge(judge))
    found = [round_json(tmp_path / "run", index)["audit"] for index in (0, 1)]
    assert [one["labelled"]["accuracy"] for one in found] == [1.0, 0.0]
    assert found[0]["labelled"]["accuracy_interval"][0] > 0.7
    assert [any("below chance" in alarm for alarm in one["alarms"]) for one in found] == [False, True]
    assert all(completion.token_ids for completion in judge.seen), "labelled ones look like real ones"
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["audit"]["labelled"] for row in metrics] == [one["labelled"] for one in found]
    capsys.readouterr()
    ok("status", tmp_path / "run")
    said = capsys.readouterr().out
    assert f"round 0, judge on {tmp_path / labelled}: accuracy 1.000 [0.758, 1.000], 12 of 12 pairs" in said
    assert "round 1: ALARM: the judge's accuracy on 12 of 12 labelled pairs, 0.000" in said


def test_labelled_pairs_change_no_judgement_no_pair_and_no_policy(tmp_path: Path, tiny: Path) -> None:
    recipe = write_recipe(tmp_path, tiny, rounds=1, judge=KNOWS)
    ok("iterate", recipe, "--out", tmp_path / "without")
    ok("iterate", recipe, "--out", tmp_path / "with", "--set", f"audit.calibration={labelled_in(tmp_path)}")
    without, with_them = tmp_path / "without" / "round-000", tmp_path / "with" / "round-000"
    assert round_json(tmp_path / "with")["audit"]["labelled"]["num_judged"] == len(ROWS)
    assert round_json(tmp_path / "without")["audit"]["labelled"] is None
    for name in ("groups/00000.jsonl", "judgements/00000.jsonl", "pairs.jsonl", "policy/model.safetensors"):
        assert (without / name).read_bytes() == (with_them / name).read_bytes(), name
    pairs = store.read_records(with_them / "pairs.jsonl", PreferencePair)
    trained = {side[-1].content for pair in pairs for side in (pair.chosen, pair.rejected)}
    assert trained.isdisjoint(row[key] for row in ROWS for key in ("chosen", "rejected"))


def test_a_run_killed_among_labelled_pairs_ends_as_an_undisturbed_one_and_asks_nothing_twice(
    tmp_path: Path, tiny: Path
) -> None:
    def by_text(asked: Asked) -> Act:
        return says(f"Score: {sum(asked.text.encode()) % 6}")

    with Server(by_text) as server:
        judge = {"kind": "api", "base_url": server.url, "model": "m", "max_concurrency": 1}
        recipe = write_recipe(
            tmp_path,
            tiny,
            rounds=1,
            judge=judge,
            evaluate={"judge": {"kind": "coin"}},
            audit={"canaries": 0, "calibration": labelled_in(tmp_path)},
        )
        iterate(recipe, tmp_path / "whole")
        count = len(server.asked)
        assert count == 8 * 4 + 2 * len(ROWS)
        assert round_json(tmp_path / "whole")["judge_usage"]["num_calls"] == count
        point = tmp_path / "run" / "round-000" / "calibration" / "figures.json"
        with pytest.MonkeyPatch.context() as monkeypatch:
            commits(monkeypatch, lambda path: path == point, before=True)
            with pytest.raises(KilledError):
                iterate(recipe, tmp_path / "run")
        iterate(recipe, tmp_path / "run")
        assert len(server.asked) == 2 * count
    own = {"replies.log", "replies.log.sha256", "usage.json"}
    first, second = (
        {name: digest for name, digest in digests(tmp_path / run).items() if Path(name).name not in own}
        for run in ("whole", "run")
    )
    assert first == second


def test_another_file_on_a_run_that_goes_on_is_that_of_the_rounds_to_come(tmp_path: Path, tiny: Path) -> None:
    labelled_in(tmp_path), labelled_in(tmp_path, ROWS[:5], "other.jsonl")
    recipe = write_recipe(tmp_path, tiny, rounds=1, judge=KNOWS, audit={"calibration": "labelled.jsonl"})
    ok("iterate", recipe, "--out", tmp_path / "run")
    ok("iterate", recipe, "--out", tmp_path / "run", "--set", "rounds=2", "--set", "audit.calibration=other.jsonl")
    counts = [round_json(tmp_path / "run", index)["audit"]["labelled"]["num_pairs"] for index in (0, 1)]
    assert counts == [12, 5]


def test_each_source_names_the_labelled_pairs_of_its_own_judge(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = {**SOURCES, "open": {**SOURCES["open"], "audit": {"calibration": labelled_in(tmp_path)}}}
    sections = {"rounds": 1, "num_prompts": 8, "evaluate": {"num_completions": 1, "greedy": False}}
    mixed, out = write_mixed(tmp_path, tiny, sources=sources, **sections), tmp_path / "run"
    ok("iterate", mixed, "--out", out, "--dry-run")
    assert (
        "audit      open: 12 labelled pairs, 24 completions to judge x 2 verdicts, beside 8" in capsys.readouterr().out
    )
    ok("iterate", mixed, "--out", out)
    found = round_json(out)["sources"]
    assert found["open"]["audit"]["labelled"]["num_pairs"] == 12
    assert found["rules"]["audit"]["labelled"] is found["gold"]["audit"]["labelled"] is None
    assert (out / "round-000" / "calibration" / "open").is_dir()
    at_top = yaml.safe_load(mixed.read_text()) | {"audit": {"calibration": "labelled.jsonl"}}
    with pytest.raises(RecipeError, match=r"audit\.calibration: with sources each has its own, in sources\.NAME"):
        check_recipe(at_top, "r")
    silent = {**SOURCES, "gold": {**SOURCES["gold"], "audit": {"calibration": "labelled.jsonl"}}}
    with pytest.raises(
        RecipeError, match=r"sources\.gold: audit\.calibration: pairs\.kind gold_vs_completion has no judge"
    ):
        check_recipe(at_top | {"audit": {}, "sources": silent}, "r")


@pytest.mark.parametrize("num_prompts", [0, 1], ids=["none", "one"])
def test_a_source_that_a_round_deals_no_prompt_is_asked_about_no_labelled_pair(
    tmp_path: Path, tiny: Path, num_prompts: int
) -> None:
    recipe = load_recipe(write_recipe(tmp_path, tiny, audit={"calibration": labelled_in(tmp_path)}))
    judge, (view,) = Forgetful(), recipe.by_source.values()
    run = SimpleNamespace(
        folder=tmp_path, recipe=recipe, report=Reporter(quiet=True), chat=load_chat(str(tiny), recipe.chat)
    )
    source: Any = SimpleNamespace(name="rules", recipe=view, judge=judge, num_canaries=0)
    groups = [Group(Prompt("p", (Message("user", "Ask?"),)), (), (Completion("moon"),))] * num_prompts
    audit_judge(Round(cast("Any", run), 0), source, groups, JudgeContext(), [])
    assert len(judge.seen) == 2 * len(ROWS) * num_prompts
    assert (tmp_path / "round-000").exists() == bool(num_prompts)


@pytest.mark.parametrize(
    ("sections", "rows", "said"),
    [
        pytest.param(
            {"judge": None, "pairs": {"kind": "gold_vs_completion"}},
            ROWS,
            "has no judge that could be tested",
            id="SPIN",
        ),
        pytest.param({"judge": {"kind": "verifier"}}, ROWS, "none of 12 prompts has checks", id="no checks"),
        pytest.param({"judge": {"kind": "rouge_l"}}, ROWS, "none of 12 labelled pairs has one", id="no gold"),
        pytest.param({}, None, "audit.calibration: ", id="no file"),
        pytest.param({}, [{"prompt": "a", "completion": "b"}], "no column 'chosen'", id="no pairs"),
    ],
)
def test_labelled_pairs_that_mean_nothing_are_refused_before_anything_is_sampled(
    tmp_path: Path,
    tiny: Path,
    capsys: pytest.CaptureFixture[str],
    sections: dict[str, Any],
    rows: list[dict[str, Any]] | None,
    said: str,
) -> None:
    if rows is not None:
        labelled_in(tmp_path, rows)
    recipe = write_recipe(tmp_path, tiny, audit={"calibration": "labelled.jsonl"}, **sections)
    prompts = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    with_gold = [row | {"gold": "The sky.", "checks": [{"kind": "words", "min": 1}]} for row in prompts]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in with_gold))
    out = tmp_path / "run"
    run = ["iterate", str(recipe), "--out", str(out)]
    for command in (["validate", str(recipe)], [*run, "--dry-run"], run):
        assert main(command) in (64, 65)
        assert said in " ".join(capsys.readouterr().err.split())
    assert not list(out.rglob("groups"))


def test_without_anybody_to_test_labelled_pairs_are_refused(tmp_path: Path, tiny: Path) -> None:
    labelled_in(tmp_path)
    recipe = load_recipe(write_recipe(tmp_path, tiny, rounds=1, judge=None, audit={"calibration": "labelled.jsonl"}))
    with pytest.raises(RecipeError, match=r"audit\.calibration: there is no judge to test"):
        iterate(recipe, tmp_path / "run", selector=selfplay_selector())


def selfplay_selector() -> Any:
    class Nothing:
        def select(self, group: Group, judgement: Judgement | None) -> list[PreferencePair]:
            return []

    return Nothing()


@pytest.mark.parametrize(
    ("interval", "accuracy", "said"),
    [
        ([0.45, 0.8], 0.63, "is not shown to be better than chance"),
        ([0.5, 0.8], 0.65, "is not shown to be better than chance"),
        ([0.1, 0.4], 0.2, "is below chance"),
        ([0.0, 1.0], None, "its accuracy is not known"),
        ([0.51, 0.8], 0.7, None),
    ],
    ids=["includes", "touches", "below", "unknown", "above"],
)
def test_an_accuracy_that_is_not_shown_to_beat_chance_is_an_alarm(
    interval: list[float], accuracy: float | None, said: str | None
) -> None:
    figures = {"accuracy": accuracy, "accuracy_interval": interval, "num_judged": 30, "num_pairs": 40}
    alarms = labelled_alarms(figures)
    assert len(alarms) == (said is not None)
    assert said is None or said in alarms[0]
    assert labelled_alarms(None) == []


# several judges


def combined(url: str, **fields: Any) -> dict[str, Any]:
    api = {"kind": "api", "base_url": url, "model": "m", "num_verdicts": 4, **fields}
    return {"kind": "combine", "how": "weighted_mean", "normalize": "rank", "judges": [api, JUDGED]}


def test_a_combination_says_of_each_member_how_far_it_agrees_with_itself(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wavering(asked: Asked) -> Act:
        return says(f"Score: {asked.body['seed'] % 2}")

    with Server(wavering) as server:
        sections: dict[str, Any] = {"rounds": 1, "evaluate": {"judge": {"kind": "coin"}}, "audit": {"canaries": 0}}
        recipe = write_recipe(tmp_path, tiny, judge=combined(server.url), **sections)
        ok("iterate", recipe, "--out", tmp_path / "run")
    found = round_json(tmp_path / "run")["audit"]
    assert found["members"]["api"]["num_repeated"] == found["num_repeated"] == 32
    assert found["members"]["verifier"]["num_repeated"] == 0
    assert found["members"]["verifier"]["self_agreement"] is None
    assert found["self_agreement"] == found["members"]["api"]["self_agreement"] < 0.8
    assert found["self_reliability"] == found["members"]["api"]["self_reliability"] < 0.5
    assert [alarm.partition(":")[0] for alarm in found["alarms"] if "is noise" in alarm] == ["api"]
    assert found["num_asked"] == 32 * 4 + 32
    capsys.readouterr()
    ok("status", tmp_path / "run")
    assert "round 0, api: parsed 1.000, self agrees 0." in capsys.readouterr().out


def test_a_member_whose_verdicts_can_not_be_read_stops_the_round_though_all_together_they_can(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def mumbling(asked: Asked) -> Act:
        return says("Score: 3" if asked.body["seed"] % 5 else "Who knows?")

    bound = ("--set", "pairs.max_unparsed=0.17")
    with Server(mumbling) as server:
        judges = combined(server.url, num_verdicts=3)
        judges["judges"] = [judges["judges"][0], JUDGED, {**JUDGED, "score": "all"}, {"kind": "coin"}]
        sections: dict[str, Any] = {"rounds": 1, "evaluate": {"judge": {"kind": "coin"}}, "audit": {"canaries": 0}}
        recipe = write_recipe(tmp_path, tiny, judge=json.loads(json.dumps(judges)), **sections)  # YAML without aliases
        with pytest.raises(UnparsedGateError, match="of judge api, one of combine:") as caught:
            iterate(load_recipe(recipe, ["pairs.max_unparsed=0.17"]), tmp_path / "run")
    assert "x no line" in str(caught.value)
    folder = tmp_path / "run" / "round-000"
    asked = ("pairs", recipe, "--groups", folder / "groups", "--judgements", folder / "judgements")
    capsys.readouterr()
    assert main([str(part) for part in (*asked, "--out", tmp_path / "pairs.jsonl", *bound)]) == 76
    assert "of judge member-0, one of combine:" in " ".join(capsys.readouterr().err.split())


def test_a_file_that_is_gone_when_the_round_comes_is_a_data_error(tmp_path: Path, tiny: Path) -> None:
    @pointwise
    def deleting(prompt: Prompt, completion: Completion) -> float:
        (tmp_path / "labelled.jsonl").unlink(missing_ok=True)
        return -len(completion.text)

    recipe = write_recipe(tmp_path, tiny, rounds=1, audit={"calibration": labelled_in(tmp_path)})
    with pytest.raises(DataError, match="labelled"):
        iterate(recipe, tmp_path / "run", judge=deleting)
