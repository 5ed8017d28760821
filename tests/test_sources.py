"""Several sources in one run: each prompt reaches the judge and the selector of its own source, and no row gets lost."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mixed_run import COMBINED, ROWS, SOURCES, write_mixed
from scripted_run import JUDGED, ok
from test_rounds import KilledError, commits, digests
from typer.testing import CliRunner

import selfplay
from selfplay import store
from selfplay.cli import app, main
from selfplay.errors import DataError, JudgeError, NoPairsError, RecipeError, UnparsedGateError
from selfplay.judges.llm import LLMJudge
from selfplay.metrics import compare
from selfplay.pairing import Pairing, make_pairs
from selfplay.pairs import make_pair
from selfplay.protocols import FilterContext, JudgeContext
from selfplay.recipe_file import check_recipe, dump_recipe, load_recipe, parse_yaml
from selfplay.recipe_values import split_by_weight
from selfplay.rounds import iterate
from selfplay.sources import load_pools
from selfplay.stages import Judging, judge_each, usage_of
from selfplay.types import Completion, Group, Judgement, Message, PreferencePair, Prompt, prompt_id

NAMES = ("gold", "open", "rules")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    return write_mixed(tmp_path_factory.mktemp("mixed"), tiny)


@pytest.fixture(scope="module")
def run(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 2 rounds; tests read it and leave it as it is."""
    folder = tmp_path_factory.mktemp("run") / "run"
    ok("iterate", mixed, "--out", folder)
    return folder


def data_of(mixed: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(mixed.read_text())
    return found


# how many


@given(st.integers(1, 5000), st.lists(st.floats(0.001, 1000), min_size=1, max_size=8))
def test_a_count_is_split_whole_and_each_part_is_less_than_one_from_its_share(count: int, weights: list[float]) -> None:
    parts = split_by_weight(count, weights)
    assert sum(parts) == count
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - count * weight / math.fsum(weights)) < 1 + 1e-6


def test_weights_are_decimal_numbers_and_of_equal_remainders_the_first_gets_one_more() -> None:
    assert split_by_weight(10, [0.1, 0.2, 0.7]) == [1, 2, 7]
    assert split_by_weight(10, [1.0, 1.0, 1.0]) == [4, 3, 3]
    assert split_by_weight(2, [1.0, 1.0, 1.0, 1.0]) == [1, 1, 0, 0]


def test_every_round_has_num_prompts_split_by_that_rounds_weights(mixed: Path) -> None:
    views = load_recipe(mixed).by_source
    counts = {name: view.prompts.num_prompts for name, view in views.items()}
    assert counts == {"gold": [3, 3], "rules": [6, 7], "open": [3, 2]}


# whose


def test_a_prompt_belongs_to_one_source_and_what_one_holds_out_no_other_trains_on(tmp_path: Path) -> None:
    def rows(name: str, texts: str) -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        return str(path)

    sources = {
        "one": {"prompts": {"source": rows("one", "abcdef"), "heldout": rows("held one", "xy")}},
        "two": {"prompts": {"source": rows("two", "defxghi"), "heldout": rows("held two", "yza")}},
    }
    recipe = check_recipe({"model": "m", "num_prompts": 2, "sources": sources}, "r")
    pools = load_pools(recipe)
    texts = {name: {p.text for p in pool.train} for name, pool in pools.items()}
    assert texts == {"one": set("bcdef"), "two": set("ghi")}
    assert {name: {p.text for p in pool.heldout} for name, pool in pools.items()} == {
        "one": set("xy"),
        "two": set("za"),
    }
    reasons = {name: Counter(drop.reason for drop in pool.drops) for name, pool in pools.items()}
    assert reasons["one"] == {"held out in source two": 1}
    assert reasons["two"] == {"also in source one": 3, "held out in source one": 2}
    for name, pool in pools.items():
        assert all(p.source.startswith(f"{name}:{tmp_path}") for p in (*pool.train, *pool.heldout))


def test_a_source_that_has_no_prompt_of_its_own_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n')
    sources = {name: {"prompts": {"source": str(path)}} for name in ("one", "two")}
    with pytest.raises(DataError, match=r"sources\.two: no prompt is left"):
        load_pools(check_recipe({"model": "m", "num_prompts": 2, "sources": sources}, "r"))


def test_a_pool_that_runs_out_names_its_source(mixed: Path, tmp_path: Path) -> None:
    recipe = load_recipe(mixed, ["rounds=30"])
    with pytest.raises(RecipeError, match=r"sources\.\w+\.prompts: round \d+ needs prompts .* the source's weight"):
        iterate(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "initial").exists()


# each to its own judge and selector


class Recorder:
    """Judge and selector of one source: remembers what it was shown; the longest text is chosen, the shortest rejected."""

    def __init__(self, name: str) -> None:
        self.identity = f"recorder {name}"
        self.judged: list[str] = []
        self.paired: list[str] = []

    def judge(self, groups: Sequence[Group], context: JudgeContext) -> list[Judgement]:
        self.judged += [group.prompt.id for group in groups]
        return [Judgement(g.prompt.id, tuple(float(len(c.text)) for c in g.completions)) for g in groups]

    def select(self, group: Group, judgement: Judgement | None) -> list[PreferencePair]:
        self.paired.append(group.prompt.id)
        order = sorted(range(len(group.completions)), key=lambda i: len(group.completions[i].text))
        if len(group.completions[order[0]].text) == len(group.completions[order[-1]].text):
            return []
        return [make_pair(group, chosen=order[-1], rejected=order[0], judgement=judgement)]


def group_of(n: int, lengths: Sequence[int]) -> Group:
    messages = (Message("user", f"prompt {n}"),)
    texts = ["x" * length for length in lengths]
    completions = tuple(Completion(text, (*map(ord, text), 1)) for text in texts)
    return Group(Prompt(prompt_id(messages), messages), (1, n), completions)


@given(
    owners=st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=24),
    lengths=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    judged=st.sets(st.sampled_from(["a", "b", "c"])),
    shared=st.booleans(),
)
def test_groups_of_each_source_reach_exactly_their_judge_and_selector_and_rows_are_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, owners: list[str], lengths: list[int], judged: set[str], shared: bool
) -> None:
    folder = tmp_path_factory.mktemp("round")
    groups = {
        name: [group_of(n, [(n % 3) * k + 1 for k in lengths]) for n, owner in enumerate(owners) if owner == name]
        for name in sorted(set(owners))
    }
    recorders = {name: Recorder(name) for name in groups}
    if shared:
        recorders["b"] = recorders["a"] = recorders.get("a", Recorder("a"))
    asked = [Judging(recorders[name], groups[name], folder / "j" / name, name) for name in groups if name in judged]
    found = dict(
        zip([name for name in groups if name in judged], judge_each(asked, JudgeContext(), _SILENT), strict=True)
    )
    pairings = {
        name: Pairing(recorders[name], own, found.get(name), (), FilterContext(), recorders[name].identity, 0.0)
        for name, own in groups.items()
    }
    try:
        selections = make_pairs(pairings, folder)
    except NoPairsError:
        return
    for name, own in groups.items():
        ids = [group.prompt.id for group in own]
        mine = {other for other in groups if recorders[other] is recorders[name]}
        assert Counter(recorders[name].judged) == Counter(
            group.prompt.id for other in mine if other in judged for group in groups[other]
        )
        assert Counter(recorders[name].paired) == Counter(g.prompt.id for other in mine for g in groups[other])
        selection = selections[name]
        assert {pair.prompt_id for pair in selection.pairs} | {drop.id for drop in selection.drops} == set(ids)
        assert selection.num_own_prompts(0) + len(selection.drops) == len(ids)
        assert {pair.source for pair in selection.pairs} <= {name}
        assert {pair.judge for pair in selection.pairs} <= {recorders[name].identity}
    assert make_pairs(pairings, folder) == selections  # read back


_SILENT = selfplay.progress.SILENT


class OwnModel(LLMJudge):
    """An llm judge with a model of its own, that scores by length and notes when it is opened and freed."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.model = name, log, name

    @property
    def identity(self) -> str:
        return self.name

    def __enter__(self) -> Any:
        self.log.append(f"open {self.name}")
        return self

    def close(self) -> None:
        self.log.append(f"free {self.name}")

    def count_verdicts(self, groups: Sequence[Group]) -> int:
        return len(groups)

    def judge(self, groups: Sequence[Group], context: JudgeContext) -> list[Judgement]:
        self.log.append(f"{self.name} {len(groups)}")
        return [Judgement(g.prompt.id, tuple(float(len(c.text)) for c in g.completions)) for g in groups]


def test_judges_with_models_are_opened_once_one_after_the_other_after_the_others(tmp_path: Path) -> None:
    from selfplay.judges.combine import Combine, Member

    log: list[str] = []
    big, small = OwnModel("big", log), OwnModel("small", log)

    class Rules(Recorder):
        def judge(self, groups: Sequence[Group], context: JudgeContext) -> list[Judgement]:
            log.append(f"rules {len(groups)}")
            return super().judge(groups, context)

    both = Combine([Member("big", big), Member("rules", Rules("r"))], how="min", normalize="none")
    groups = [[group_of(10 * s + n, [1, 2, 3]) for n in range(s + 1)] for s in range(4)]
    asked = [
        Judging(judge, own, tmp_path / str(n), "")
        for n, (judge, own) in enumerate(zip((big, small, both, big), groups, strict=True))
    ]
    found = judge_each(asked, JudgeContext(), _SILENT)
    assert log == ["rules 3", "open big", "big 1", "big 3", "big 4", "free big", "open small", "small 2", "free small"]
    assert [[j.prompt_id for j in judgements] for judgements in found] == [[g.prompt.id for g in own] for own in groups]
    log.clear()
    assert [list(one) for one in judge_each(asked, JudgeContext(), _SILENT)] == [list(one) for one in found]
    assert not [line for line in log if line[-1].isdigit()], "what is judged is not judged again"


class Paid(Recorder):
    """A judge that keeps what it paid for in the folder of its stage."""

    @contextmanager
    def stage(self, folder: Path, note: Any) -> Iterator[None]:
        yield
        store.rewrite(folder / "usage.json", json.dumps({"num_calls": len(self.judged), "cost": 0.5}).encode())


def test_every_source_and_member_keeps_its_replies_apart_and_their_cost_is_summed(tmp_path: Path) -> None:
    from selfplay.judges.combine import Combine, Member

    paid = Paid("paid")
    both = Combine([Member("paid", paid), Member("free", Recorder("free"))], how="min", normalize="none")
    groups = [[group_of(n, [1, 2])] for n in range(2)]
    judge_each(
        [Judging(paid, groups[0], tmp_path / "a", ""), Judging(both, groups[1], tmp_path / "b", "")],
        JudgeContext(),
        _SILENT,
    )
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("usage.json"))
    assert files == ["a/usage.json", "b/member-0/usage.json"]
    assert usage_of(tmp_path / "b") == {"num_calls": 2, "cost": 0.5}
    assert usage_of(tmp_path) == {"num_calls": 3, "cost": 1.0}
    assert usage_of(tmp_path / "c") is None


def test_members_scores_lie_beside_the_combined_ones(run: Path) -> None:
    folder = run / "round-000" / "judgements" / "open"
    files = ["member-0/00000.jsonl", "member-1/00000.jsonl", "00000.jsonl"]
    rules, coin, both = (store.read_records(folder / name, Judgement) for name in files)
    assert len(both) == len(rules) == len(coin) > 0
    for a, b, c in zip(rules, coin, both, strict=True):
        for k, note in enumerate(c.notes):
            assert f"verifier: {a.scores[k]:.6g}" in note
            assert f"coin: {b.scores[k]:.6g}" in note


# a whole run


def test_each_source_has_its_folders_its_judge_and_its_share_of_the_round(run: Path) -> None:
    identities = store.read_json(run / "run.json")["judge"]
    assert identities["gold"] is None
    assert identities["rules"] in identities["open"]
    for round in (0, 1):
        folder = run / f"round-00{round}"
        prompts = store.read_records(folder / "prompts.jsonl", Prompt)
        pairs = store.read_records(folder / "pairs.jsonl", PreferencePair)
        done = store.read_json(folder / "round.json")
        assert len(prompts) == 12 == done["counts"]["num_prompts"]
        for name in NAMES:
            groups = store.read_records(folder / "groups" / name / "00000.jsonl", Group)
            assert [g.prompt for g in groups] == [p for p in prompts if p.source.startswith(f"{name}:")]
            own = [pair for pair in pairs if pair.source == name]
            counts = done["sources"][name]["counts"]
            assert counts["num_prompts"] == len(groups)
            assert counts["num_pairs"] == len(own) > 0
            assert {pair.judge for pair in own} == {identities[name] or ""}
            fresh = {pair.prompt_id for pair in own if pair.origin_round == round}
            assert len(fresh) + sum(counts["num_prompts_without_pair"].values()) == len(groups)
        assert all((pair.chosen_index is None) == (pair.source == "gold") for pair in pairs)
        older = [pair for pair in pairs if pair.origin_round < round]
        assert {pair.source for pair in older} == ({"gold"} if round else set()), (
            "only that source mixes in the round before"
        )
        for key in ("num_prompts", "num_completions", "num_tokens", "num_pairs", "num_pairs_selected"):
            assert done["counts"][key] == sum(done["sources"][name]["counts"][key] for name in NAMES)
    assert not (run / "round-000" / "judgements" / "gold").exists()


def test_status_has_the_figures_of_every_source(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ok("status", run, "--json")
    found = json.loads(capsys.readouterr().out)
    held = {"gold", "rules"}
    assert found["initial"]["sources"].keys() == found["sources"].keys() == held
    assert found["gain"] is None, "scores of different judges have no mean"
    last = found["rounds"][-1]["sources"]
    assert last.keys() == set(NAMES)
    for name in held:
        change = last[name]["heldout_score"] - found["initial"]["sources"][name]["heldout_score"]
        assert found["sources"][name]["gain"] == pytest.approx(change)
    assert last["open"]["heldout_score"] is None
    assert last["gold"]["mean_score"] is None
    assert 0 < last["rules"]["mean_score"] < 1
    assert last["open"]["audit"]["num_scores"] == last["open"]["counts"]["num_completions"]
    assert found["rounds"][-1]["audit"] is None
    whole = store.read_json(run / "round-001" / "eval.json")
    assert whole["num_prompts"] == sum(own["num_prompts"] for own in whole["sources"].values())


def test_the_tables_show_every_source(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ok("status", run)
    said = capsys.readouterr().out
    panel, training = said.split("training, by source")
    assert panel.count("\n  gold") == panel.count("\n  rules") == 3
    for name in NAMES:
        assert len([line for line in training.splitlines() if line.split()[1:2] == [name]]) >= 2
    assert "0, rules" in training.split("audit of the judge")[1]
    assert "gain over the initial policy on rules, sampled" in training
    ok("show", run, "--round", 0, "--limit", 1)
    shown = capsys.readouterr().out
    assert shown.count("\ncompletion 0, ") == 3
    assert all(f"({name}:" in shown for name in NAMES)


def test_runs_of_several_sources_are_compared_source_by_source(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compare([run, run])
    assert found["sources"].keys() == {"gold", "rules"}
    assert found["sources"]["rules"]["gain"] == pytest.approx(selfplay.status(run)["sources"]["rules"]["gain"])
    ok("compare", run, run)
    assert "source rules" in capsys.readouterr().out


def test_one_source_of_a_mixture_is_played_as_a_recipe_without_sources(tiny: Path, tmp_path: Path) -> None:
    mixed = write_mixed(tmp_path, tiny, rounds=1, sources={"rules": SOURCES["rules"]})
    data = data_of(mixed)
    source = data.pop("sources")["rules"]
    alone = {"prompts": {**source["prompts"], "num_prompts": data.pop("num_prompts")}, "judge": source["judge"]}
    (tmp_path / "alone.yaml").write_text(json.dumps(data | alone))
    ok("iterate", mixed, "--out", tmp_path / "one")
    ok("iterate", tmp_path / "alone.yaml", "--out", tmp_path / "two")
    one, two = tmp_path / "one" / "round-000", tmp_path / "two" / "round-000"
    assert store.weights_digest(one / "policy") == store.weights_digest(two / "policy")
    assert (one / "judgements/rules/00000.jsonl").read_bytes() == (two / "judgements/00000.jsonl").read_bytes()
    ours, theirs = (store.read_records(folder / "pairs.jsonl", PreferencePair) for folder in (one, two))
    assert [dataclasses.replace(pair, source="") for pair in ours] == theirs
    ours_eval, theirs_eval = (store.read_json(folder / "eval.json") for folder in (one, two))
    assert ours_eval["sources"]["rules"] | {"kl": theirs_eval["kl"]} == theirs_eval
    assert "source" not in store.read_json_lines(two / "pairs.jsonl")[0]
    assert "sources" not in store.read_json(two / "round.json")
    assert not {"sources", "num_prompts"} & yaml.safe_load((tmp_path / "two" / "recipe.yaml").read_text()).keys()


# going on


POINTS = [
    "initial/heldout/rules/temperature/00000.jsonl",
    "initial/heldout/gold/greedy-judgements/00000.jsonl",
    "round-000/prompts.jsonl",
    "round-000/groups/rules/00000.jsonl",
    "round-000/judgements/open/member-1/00000.jsonl",
    "round-000/judgements/open/00000.jsonl",
    "round-000/judgements/rules/00000.jsonl",
    "initial/eval.json",
    "round-000/unusable.json",
    "round-001/pairs.jsonl",
    "round-001/round.json",
]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("point", POINTS)
def test_a_mixed_run_killed_anywhere_ends_as_an_undisturbed_one(
    mixed: Path, run: Path, tmp_path: Path, point: str, before: bool
) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        commits(monkeypatch, lambda path: path == out / point, before=before)
        with pytest.raises(KilledError):
            iterate(mixed, out)
    assert (out / point).exists() is not before
    iterate(mixed, out)
    assert digests(out) == digests(run)


def test_a_changed_source_is_refused_by_its_keys_and_what_changes_no_result_is_not(
    mixed: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["iterate", str(mixed), "--out", str(run), "--set", "sources.rules.judge.score=all"]) == 64
    assert "sources.rules.judge.score: 'share' -> 'all'" in capsys.readouterr().err
    data = data_of(mixed)
    for order, said in ((["rules", "gold", "open"], "in the order"), (["gold", "rules"], "sources.open")):
        changed = mixed.with_name("changed.yaml")
        changed.write_text(json.dumps(data | {"sources": {n: data["sources"][n] for n in order}}))
        assert main(["iterate", str(changed), "--out", str(run)]) == 64
        assert said in capsys.readouterr().err
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes((mixed.parent / "rules.jsonl").read_bytes())
    ok("iterate", mixed, "--out", run, "--set", f"sources.rules.prompts.source={moved}")


# the stages one by one, and other commands


def test_the_stages_one_by_one_write_the_bytes_of_a_round(run: Path, mixed: Path, tiny: Path, tmp_path: Path) -> None:
    groups, judgements, pairs = tmp_path / "groups", tmp_path / "judgements", tmp_path / "pairs.jsonl"
    ok("generate", mixed, "--model", tiny, "--out", groups)
    ok("judge", mixed, "--groups", groups, "--out", judgements)
    ok("pairs", mixed, "--groups", groups, "--judgements", judgements, "--out", pairs)
    ok("train", mixed, "--model", tiny, "--pairs", pairs, "--groups", groups, "--out", tmp_path / "train")
    ok("evaluate", mixed, "--model", tiny, "--out", tmp_path / "panel")
    first = run / "round-000"
    for ours, theirs in ((groups, first / "groups"), (judgements, first / "judgements")):
        files = sorted(path.relative_to(theirs) for path in theirs.rglob("0*.jsonl"))
        assert files == sorted(path.relative_to(ours) for path in ours.rglob("0*.jsonl"))
        for name in files:
            assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    assert pairs.read_bytes() == (first / "pairs.jsonl").read_bytes()
    assert store.weights_digest(tmp_path / "train" / "policy") == store.weights_digest(first / "policy")
    assert store.read_json(tmp_path / "panel" / "eval.json") == store.read_json(run / "initial" / "eval.json")


def test_later_pairs_mix_in_those_of_their_own_source(run: Path, mixed: Path, tmp_path: Path) -> None:
    first, second = run / "round-000", run / "round-001"
    inputs = ("--groups", second / "groups", "--judgements", second / "judgements", "--round", 1)
    ok("pairs", mixed, *inputs, "--previous", first / "pairs.jsonl", "--out", tmp_path / "pairs.jsonl")
    assert (tmp_path / "pairs.jsonl").read_bytes() == (second / "pairs.jsonl").read_bytes()


def test_groups_without_a_sources_folder_are_refused(run: Path, mixed: Path, tmp_path: Path) -> None:
    groups = run / "round-000" / "groups" / "rules"
    assert main(["judge", str(mixed), "--groups", str(groups), "--out", str(tmp_path / "j")]) == 65


def test_the_dry_run_tells_the_counts_of_every_source(mixed: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["iterate", str(mixed), "--out", str(tmp_path / "run"), "--dry-run"])
    assert result.exit_code == 0, result.output
    lines = [line.strip() for line in result.output.splitlines() if line.strip().startswith("source ")]
    counts = [int(line.split()[2]) for line in lines]
    assert len(lines) == 6
    assert sum(counts[:3]) == sum(counts[3:]) == 12
    assert "judge none, pairs gold_vs_completion -> mix_previous" in lines[0]
    assert "judge verifier + coin, pairs all_above_margin" in lines[2]


def test_validate_names_the_source_of_a_fault(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(mixed)]) == 0
    capsys.readouterr()
    for override, said in (
        ("sources.rules.prompts.source=/nowhere.jsonl", "sources.rules.prompts.source: /nowhere.jsonl: no such file"),
        ("sources.rules.judge.checks=[{kind: wrods}]", "sources.rules.judge.checks"),
        ("sources.open.judge=null", "sources.open: judge: missing"),
    ):
        assert main(["validate", str(mixed), "--set", override]) in (64, 65)
        assert said in capsys.readouterr().err


def test_calibrate_asks_whose_judge(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = tmp_path / "labelled.jsonl"
    pairs.write_text(
        json.dumps({"prompt": "p", "chosen": "The moon is in the sky at night, and so on.", "rejected": "No."}) + "\n"
    )
    assert main(["calibrate", str(mixed), "--pairs", str(pairs)]) == 64
    assert "--source" in capsys.readouterr().err
    for source in ("rules", "open"):
        ok("calibrate", mixed, "--pairs", pairs, "--source", source)
    assert "1 with both verdicts" in capsys.readouterr().out


# judges and selectors of the user's own


@selfplay.pointwise
def longer(prompt: Prompt, completion: Completion) -> float:
    return float(len(completion.text))


def test_own_parts_stand_in_for_those_of_the_source_that_they_name(mixed: Path, tmp_path: Path) -> None:
    own = Recorder("mine")
    out = tmp_path / "run"
    iterate(load_recipe(mixed, ["rounds=1"]), out, judge={"rules": longer}, selector={"rules": own})
    groups = store.read_records(out / "round-000" / "groups" / "rules" / "00000.jsonl", Group)
    assert own.paired == [group.prompt.id for group in groups]
    pairs = store.read_records(out / "round-000" / "pairs.jsonl", PreferencePair)
    assert {pair.judge for pair in pairs if pair.source == "rules"} == {longer.identity}
    assert longer.identity not in {pair.judge for pair in pairs if pair.source != "rules"}
    scores = store.read_json(out / "round-000" / "eval.json")["sources"]["rules"]["per_prompt"].values()
    assert all(score > 3 for score in scores), "the source's panel is judged by it too"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        pytest.param({"judge": longer}, "say whose judge it is, as in judge={'gold': ...}", id="unnamed judge"),
        pytest.param({"selector": Recorder("x")}, "say whose selector", id="unnamed selector"),
        pytest.param({"filters": []}, "say whose filters", id="unnamed filters"),
        pytest.param({"judge": {"rulse": longer}}, "no source 'rulse'; there are gold, rules, open", id="unknown"),
    ],
)
def test_own_parts_that_name_no_source_are_refused(mixed: Path, tmp_path: Path, given: Any, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        iterate(mixed, tmp_path / "run", **given)
    assert said in str(caught.value)


def test_own_parts_by_name_are_refused_where_there_are_no_sources(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    recipe = {"model": str(tiny), "prompts": {"source": str(tmp_path / "p.jsonl"), "deal": "same"}}
    with pytest.raises(RecipeError, match="this recipe has none: pass it alone"):
        iterate(check_recipe(recipe, "r"), tmp_path / "run", judge={"rules": longer})


# what stops a round


def test_too_many_missing_verdicts_of_one_source_stop_the_round_and_name_it(mixed: Path, tmp_path: Path) -> None:
    @selfplay.pointwise
    def sulky(prompt: Prompt, completion: Completion) -> float | None:
        return None

    with pytest.raises(UnparsedGateError, match=r"100\.0%.*of source open"):
        iterate(mixed, tmp_path / "run", judge={"open": sulky})
    assert not (tmp_path / "run/round-000/policy").exists()


def test_a_source_without_any_pair_is_an_alarm_and_no_stop(mixed: Path, tmp_path: Path) -> None:
    @selfplay.pointwise
    def indifferent(prompt: Prompt, completion: Completion) -> float | None:
        return 1.0

    iterate(load_recipe(mixed, ["rounds=1"]), tmp_path / "run", judge={"rules": indifferent})
    sources = store.read_json(tmp_path / "run" / "round-000" / "round.json")["sources"]
    assert sources["rules"]["counts"]["num_pairs"] == 0
    assert any("none of its 6 prompts gave a pair (tie" in alarm for alarm in sources["rules"]["audit"]["alarms"])
    assert sources["gold"]["counts"]["num_pairs"] > 0


def test_a_judge_that_fails_names_itself_and_what_the_others_judged_is_kept(mixed: Path, tmp_path: Path) -> None:
    @selfplay.pointwise
    def broken(prompt: Prompt, completion: Completion) -> float | None:
        raise ValueError("no")

    with pytest.raises(JudgeError, match="broken"):
        iterate(mixed, tmp_path / "run", judge={"open": broken})
    assert (tmp_path / "run" / "round-000" / "judgements" / "rules" / "00000.jsonl").is_file()


# what a recipe may say


def changed(source: str, **keys: Any) -> dict[str, Any]:
    return {"num_prompts": 12, "sources": {**SOURCES, source: {**SOURCES[source], **keys}}}


GOLD_PAIRS = {"kind": "gold_vs_completion"}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        pytest.param(
            {**changed("open"), "prompts": {"source": "p", "deal": "same"}}, "in sources.NAME.prompts", id="both"
        ),
        pytest.param({"sources": SOURCES}, "num_prompts: missing", id="no number"),
        pytest.param(
            {"num_prompts": 3, "prompts": {"source": "p", "deal": "same"}},
            "it is prompts.num_prompts",
            id="number alone",
        ),
        pytest.param({**changed("open"), "judge": JUDGED}, "in sources.NAME.judge", id="judge at the top"),
        pytest.param({**changed("open"), "pairs": {}}, "in sources.NAME.pairs", id="pairs at the top"),
        pytest.param(
            {**changed("open"), "evaluate": {"judge": JUDGED}},
            "sources.NAME.evaluate.judge",
            id="panel judge at the top",
        ),
        pytest.param(
            changed("gold", judge=JUDGED), "sources.gold: pairs.kind gold_vs_completion reads no scores", id="unread"
        ),
        pytest.param(
            changed("open", prompts={"source": "p", "num_prompts": 3}), "a source has a weight", id="number of a source"
        ),
        pytest.param(changed("open", weight=0), "sources.open.weight", id="no weight"),
        pytest.param(changed("open", weight=0.001), "gives it none of num_prompts", id="tiny weight"),
        pytest.param(
            changed("open", wieght=1.0), 'sources.open.wieght: unknown key; did you mean "weight"?', id="misspelt"
        ),
        pytest.param(
            changed("open", judge={**JUDGED, "socre": "all"}), "sources.open.judge.socre: unknown key", id="deep"
        ),
        pytest.param({"num_prompts": 3, "sources": {"Open ": SOURCES["open"]}}, "sources.Open", id="name"),
        pytest.param({"num_prompts": 3, "sources": {}}, "sources", id="none"),
    ],
)
def test_sources_without_sense_are_refused_at_load(data: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_recipe({"model": "m", **data}, "r")
    assert said in str(caught.value)


def test_a_loss_that_reads_win_rates_needs_them_of_every_source() -> None:
    recipe = check_recipe({"model": "m", **changed("open"), "train": {"loss_type": "sppo"}}, "r")
    with pytest.raises(RecipeError, match=r"sources\.gold: train\.loss_type: sppo reads win rates"):
        recipe.check_win_rates()
    api = {"kind": "api", "base_url": "https://judge.example/v1", "model": "m", "template": "pairwise_helpfulness"}
    sources = {"open": {"prompts": {"source": "p"}, "judge": api, "pairs": {"kind": "win_rates"}}}
    check_recipe(
        {"model": "m", "num_prompts": 2, "sources": sources, "train": {"loss_type": "sppo"}}, "r"
    ).check_win_rates()


def test_scores_without_a_judge_are_refused_by_source() -> None:
    recipe = check_recipe({"model": "m", **changed("rules", judge=None)}, "r")
    with pytest.raises(RecipeError, match=r"sources\.rules: judge: missing"):
        recipe.check_judged()


def test_a_mixed_recipe_reads_back_as_it_was_written(mixed: Path) -> None:
    recipe = load_recipe(mixed)
    data, _ = parse_yaml(dump_recipe(recipe), "r")
    assert check_recipe(data, "r") == recipe
    assert not {"prompts", "judge", "pairs"} & data.keys()
    assert data["sources"]["open"]["judge"]["judges"][0]["weight"] == COMBINED["judges"][0]["weight"]
    assert Path(data["sources"]["rules"]["prompts"]["source"]).is_absolute()
    assert set(ROWS) == data["sources"].keys()
