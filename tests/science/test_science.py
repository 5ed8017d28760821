"""The experiments' own arithmetic, and their smallest arms on a tiny model from data to table."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import curves
import judges
import play as player
import pytest
import rounds
import spin
import spin_table
from figures import Gain, at_kl, dose_residual, gain
from lab import HERE, ROOT, Item, Lab, read_plan
from noisy import Flipped, shortest
from run import main
from splits import by_rows, by_subject

from selfplay import store
from selfplay.errors import DataError
from selfplay.progress import Reporter
from selfplay.types import Completion, Group, Judgement, Message, Prompt, prompt_id

WORDS = {"kind": "words", "min": 3}
TINY = {
    "generator.kind": "transformers",
    "generator.max_tokens": 12,
    "prompts.num_prompts": 4,
    "evaluate.num_prompts": 3,
    "evaluate.num_completions": 1,
    "evaluate.max_tokens": 12,
    "train.bf16": False,
    "train.max_steps": 2,
}


def group(text: str, *texts: str) -> Group:
    messages = (Message("user", text),)
    prompt = Prompt(prompt_id(messages), messages, checks=(WORDS,))
    return Group(prompt, (7, 8), tuple(Completion(one, (9,)) for one in texts))


def groups(count: int) -> list[Group]:
    return [group(f"Prompt {n}.", "one two three", "one", "a b c d") for n in range(count)]


def lab_of(id: str, folder: Path, model: Path, files: dict[str, str], **extra: Any) -> Lab:
    plan = read_plan(id) | {"seeds": [0]}
    places = {"here": str(HERE), "heldout": str(ROOT / "recipes" / "data" / "quickstart_heldout.jsonl"), **files}
    return Lab(
        id, plan, folder / id, str(model), {"data": str(folder / id / "data")} | places, TINY | extra, Reporter(True)
    )


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_exactly_the_stated_share_of_verdicts_is_flipped_whatever_the_order_of_groups(share: float) -> None:
    asked = groups(20)
    noisy = Flipped(share).judge(asked, rounds_context())
    changed = sum(a != b for one in noisy for a, b in zip(one.scores, (1.0, 0.0, 1.0), strict=True))
    assert changed == round(share * 60)
    backwards = Flipped(share).judge(asked[::-1], rounds_context())[::-1]
    assert [one.scores for one in backwards] == [one.scores for one in noisy]


def test_a_flipped_verdict_flips_no_other_group_of_its_prompt() -> None:
    asked = [group("Prompt.", f"one two three {n}", "one") for n in range(50)]
    passing = [one.scores[0] for one in Flipped(0.2).judge(asked, rounds_context())]
    assert passing.count(0.0) in (9, 10), "10 of 51 texts are flipped, and one of them fails in every group"


def rounds_context() -> Any:
    from selfplay import JudgeContext

    return JudgeContext()


def test_the_shorter_text_wins() -> None:
    one = groups(1)[0]
    scores = [shortest(one.prompt, completion) for completion in one.completions]
    assert max(scores) == scores[1]


@pytest.mark.parametrize(
    ("interval", "verdict", "within"),
    [
        ((0.06, 0.2), "higher", "fails"),
        ((0.01, 0.04), "higher", "holds"),
        ((-0.04, 0.04), "inconclusive", "holds"),
        ((-0.02, 0.08), "inconclusive", "inconclusive"),
        ((-0.2, -0.1), "lower", "fails"),
    ],
    ids=["above", "above but small", "null", "wide", "below"],
)
def test_a_verdict_is_what_the_whole_interval_says(interval: tuple[float, float], verdict: str, within: str) -> None:
    found = Gain(0.0, interval)
    assert (found.verdict, found.within(0.05)) == (verdict, within)


def test_scores_at_a_matched_kl_lie_on_the_line_between_the_points_around_it() -> None:
    curve = [(0.4, {"a": 1.0, "b": 0.0}), (0.0, {"a": 0.0, "b": 0.0}), (0.1, {"a": 0.5, "b": 1.0})]
    assert at_kl(curve, 0.025) == {"a": 0.125, "b": 0.25}
    assert at_kl(curve, 0.325) == pytest.approx({"a": 0.875, "b": 0.25})
    assert at_kl(curve, 0.4) == {"a": 1.0, "b": 0.0}
    with pytest.raises(AssertionError, match="within both curves"):
        at_kl(curve, 0.5)


def test_a_mean_curve_ends_where_the_shortest_one_does() -> None:
    steep = [(0.0, {"a": 0.0, "b": 0.0}), (0.02, {"a": 0.5, "b": 0.1})]
    bent = [(0.0, {"a": 0.0}), (0.04, {"a": 0.2}), (0.01, {"a": 0.2})]
    kls, means = curves.mean_curve([steep, bent])
    assert (kls[0], kls[-1]) == (0.0, 0.02)
    assert (means[0], means[-1]) == pytest.approx((0.0, (0.3 + 0.2) / 2))


def test_a_curve_without_points_and_an_experiment_without_curves_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for id, reason in (("C", "no arm has a seed with all of its points"), ("B", "which only C has")):
        assert main([id, "--plot", str(tmp_path / "kl.svg"), "--out", str(tmp_path)]) == 1
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "kl.svg").exists()


def test_a_gain_in_proportion_to_accuracy_leaves_no_residual() -> None:
    base = [{str(n): 0.0 for n in range(30)}] * 2
    rules, arm = ([{str(n): share * (n % 3) for n in range(30)}] * 2 for share in (0.4, 0.2))
    half = dose_residual(base, rules, base, arm, 0.75)
    assert half is not None
    assert half.mean == pytest.approx(0.0)
    assert half.within(0.05) == "holds"
    none = dose_residual(base, rules, base, arm, 0.5)
    assert none is not None
    assert none.verdict == "higher"
    assert gain([], []) is None


def test_a_coin_that_improves_breaks_the_metric() -> None:
    plan = read_plan("B")
    assert judges.verdict(plan, "coin", Gain(0.1, (0.02, 0.2)), None) == "improves: the metric is broken"
    assert judges.verdict(plan, "coin", Gain(0.0, (-0.04, 0.04)), None).endswith("within 0.05 of 0: holds")


def test_splits_share_no_prompt_and_no_subject_and_do_not_move() -> None:
    rows = [{"instruction": f"Say {n % 50}.", "input": "", "output": str(n)} for n in range(60)]
    parts = by_rows(rows, {"train": 8, "dev": 1, "test": 2})
    asked = [row["instruction"] for part in parts.values() for row in part]
    assert sorted(asked) == sorted(set(asked))
    assert len(asked) == 50
    assert by_rows(rows[::-1], {"train": 8, "dev": 1, "test": 2})["dev"][0]["instruction"] == asked[len(parts["train"])]
    prompts = store_rows(ROOT / "recipes" / "data" / "quickstart_train.jsonl")
    cut = by_subject(prompts, read_plan("B")["data"]["subjects"])
    assert {name: len(part) for name, part in cut.items()} == {"play": 120, "judge": 72, "dev": 96}
    subjects = [{row["checks"][0]["words"][0] for row in part} for part in cut.values()]
    assert not subjects[0] & subjects[1]
    assert not subjects[0] & subjects[2]


def store_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_stop_leaves_whole_comparisons() -> None:
    items = Lab("C", read_plan("C"), Path("out"), "model", {}).items()
    first = next(item for item in items if item.point == "beta 0.3")
    before = {(item.arm, item.seed) for item in items[: items.index(first)]}
    assert before >= {(arm, seed) for arm in ("offline", "prior", "initial", "rejection_sampling") for seed in range(3)}
    assert [item.seed for item in items[:5]] == [0] * 5


def test_every_recipe_of_every_arm_is_one_that_selfplay_takes(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}"} for n in range(700)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    named = ["--instructions", str(tmp_path / "rows.json"), "--embeddings", str(tiny), "--model", str(tiny)]
    heldout = str(ROOT / "recipes" / "data" / "quickstart_heldout.jsonl")
    assert main(["--dry-run", "--out", str(tmp_path), "--ifeval", heldout, *named]) == 0
    said = capsys.readouterr().out
    assert all(f"{id} {arm}/" in said for id, arm in (("A", "spin"), ("B", "self"), ("C", "initial")))


def test_a_file_that_was_not_named_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["A", "--prepare", "--out", str(tmp_path)]) == 1
    assert "--instructions" in capsys.readouterr().err


@pytest.mark.slow
def test_spin_and_its_controls_are_played_to_the_table(tiny: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(33)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    files = {"instructions": str(tmp_path / "rows.json"), "embeddings": str(tiny)}
    judge = {"evaluate.judge": {"kind": "rouge_l"}, "pairs.truncated": "rejected"}
    lab = lab_of("A", tmp_path, tiny, files, **judge)
    lab.plan["sft"]["most_epochs"] = 1
    lab.plan["trial"]["rates"] = [1e-4, 1e-3]
    spin.prepare(lab)
    for item in lab.items():
        player.play(lab, item)
    assert all(lab.done(item) for item in lab.items())
    chosen = store.read_json(lab.folder(Item("spin", 0, "only")) / "done.json")
    assert str(chosen["rate"]) in {str(float(rate)) for rate in chosen["tried"]}
    assert not list(lab.out.glob("spin/**/policy"))
    table = spin_table.table(lab)
    assert "not run" not in table
    assert table.count("| spin | 0 |") == 1


def test_the_coin_is_played_to_the_table_and_is_not_played_again(tiny: Path, tmp_path: Path) -> None:
    lab = lab_of("B", tmp_path, tiny, {}, **{"pairs.truncated": "judged", "rounds": 1})
    judges.prepare(lab, data_only=True)
    rows = [{"prompt": f"Say {n}.", "chosen": "One two three.", "rejected": "No", "checks": [WORDS]} for n in range(40)]
    store.write_json_lines(lab.out / "unseen.jsonl", rows)
    judges.measure_judges(lab, lambda arm: arm != "self")
    found = store.read_json(lab.out / "accuracy.json")
    assert found["rules"]["accuracy"] == 1.0
    assert 0.6 < found["flipped"]["accuracy"] < 1.0
    assert found["shortest"]["accuracy"] == 0.0
    for arm in ("base", "coin"):
        player.play(lab, Item(arm, 0, "only"))
    table = judges.table(lab)
    assert "| coin | 0 |" in table
    assert "| coin | 0.500 [0.352, 0.648] | 1 | +0.000" in table
    assert len({line.count("|") for line in table.split("\n\n")[0].splitlines()}) == 1
    written = {path: path.stat().st_mtime_ns for path in lab.out.rglob("*")}
    player.play(lab, Item("coin", 0, "only"))
    assert {path: path.stat().st_mtime_ns for path in lab.out.rglob("*")} == written


def test_the_judge_is_taught_as_many_yes_as_no(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = [(one, Judgement(one.prompt.id, (1.0, 0.0, 1.0))) for one in groups(3)]
    monkeypatch.setattr(judges, "judged_groups", lambda *_: judged)
    lab = lab_of("B", tmp_path, tiny, {}, **{"train.max_length": 2048})
    assert (judges.yes_no_policy(lab) / "config.json").exists()
    said = [row["messages"][-1]["content"] for row in store.read_json_lines(lab.out / "yes-no" / "questions.jsonl")]
    assert sorted(said) == ["no"] * 3 + ["yes"] * 3


def test_the_policy_that_judges_itself_is_taught_measured_and_played_to_the_table(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = [(one, Judgement(one.prompt.id, (1.0, 0.0, 1.0))) for one in groups(3)]
    monkeypatch.setattr(judges, "judged_groups", lambda *_: judged)
    says = tmp_path / "says.md"  # the tiny model has these two words as tokens, and yes and no as letters
    says.write_text(
        "---\nname: says\nversion: 1\nmode: pointwise\nlabels: {the: 1, and: 0}\n---\n[user]\n{prompt}\n{completion}"
    )
    lab = lab_of("B", tmp_path, tiny, {}, **{"train.max_length": 2048, "pairs.truncated": "judged", "rounds": 1})
    lab.plan["arms"]["self"]["set"]["judge"]["template"] = str(says)
    judges.prepare(lab, data_only=True)
    rows = [{"prompt": f"Say {n}.", "chosen": "One two three.", "rejected": "No"} for n in range(4)]
    store.write_json_lines(lab.out / "unseen.jsonl", rows)
    judges.measure_judges(lab, lambda arm: arm == "self")
    for arm in ("self_start", "self"):
        player.play(lab, Item(arm, 0, "only"))
    own = lab.folder(Item("self", 0, "only"))
    (run,) = (path.parent for path in own.rglob("run.json"))
    taught = store.weights_digest(judges.yes_no_policy(lab))
    assert store.read_json(run / "run.json")["model"] == taught != store.weights_digest(tiny)
    assert store.read_json(run / "run.json")["judge"].startswith("llm:policy ")
    assert store.read_json(run / "round-000" / "round.json")["counts"]["num_pairs"] > 0
    table = judges.table(lab)
    assert "| self | 0 | not run" not in table
    dose = next(line for line in table.splitlines() if line.startswith("| self | 0.") or line.startswith("| self | 1."))
    assert dose.split("|")[3].strip() == "1"


@pytest.mark.slow
def test_rounds_and_offline_are_played_to_the_tables_at_a_matched_kl(tiny: Path, tmp_path: Path) -> None:
    heldout = str(ROOT / "recipes" / "data" / "quickstart_heldout.jsonl")
    lab = lab_of("C", tmp_path, tiny, {"ifeval": heldout}, **{"judge": {"kind": "coin"}, "pairs.truncated": "judged"})
    lab.plan["arms"]["prior"]["set"]["rounds"] = 2
    for arm in ("offline", "prior"):
        lab.plan["arms"][arm]["points"] = {"beta 0.1": {"train.beta": 0.1}, "beta 0.3": {"train.beta": 0.3}}
    judges.prepare(lab)
    temperature = Item("temperature", 0, "only")
    with pytest.raises(DataError, match="play them first"):
        player.play(lab, temperature)
    for item in [*only(lab, "base", "offline", "prior", "rejection_sampling"), temperature]:
        player.play(lab, item)
    done = lab.done(temperature)
    assert done is not None
    assert 0.2 <= done["panel"]["evaluate.temperature"] <= 1.2
    assert len(list((lab.out / "offline-pairs").iterdir())) == 1
    table = rounds.table(lab)
    assert len({line.count("|") for line in table.split("\n\n")[0].splitlines()}) == 1
    line = next(line for line in table.splitlines() if line.startswith("| prior - offline | 1 |"))
    assert "not run" not in line
    pictures = [tmp_path / "first" / "kl.svg", tmp_path / "kl.svg"]
    for picture in pictures:
        curves.draw(lab, picture)
    assert "rejection_sampling, 1 seed<" in pictures[0].read_text()
    assert "initial" not in pictures[0].read_text(), "an arm that was not played has no curve"
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def only(lab: Lab, *arms: str) -> Sequence[Item]:
    return [item for item in lab.items() if item.arm in arms]
