"""compare-judges, calibrate and an endpoint as judge, on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from scripted_run import write_recipe
from scripted_server import Act, Asked, Server, http, says

from selfplay import store
from selfplay.cli import main
from selfplay.errors import RecipeError
from selfplay.labelled import calibration, chosen_place, labelled_group
from selfplay.preferences import Labelled, read_labelled
from selfplay.recipe_file import check_recipe
from selfplay.types import Completion, Group, Judgement, Message, Prompt, prompt_id

KEY = "sk-planted-0123456789"
ROWS = [{"prompt": f"Ask {n}?", "chosen": "a wren", "rejected": "I do not know"} for n in range(20)]


def recipe_in(folder: Path, judge: dict[str, Any]) -> Path:
    data = {"model": "m", "prompts": {"source": "p.jsonl", "deal": "same"}, "judge": judge}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def api(url: str, **fields: Any) -> dict[str, Any]:
    return {"kind": "api", "base_url": url, "model": "m", "max_retries": 0, **fields}


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def groups_in(folder: Path, count: int) -> Path:
    groups = []
    for n in range(count):
        messages = (Message("user", f"Ask {n}?"),)
        completions = tuple(Completion(text, tuple(text.encode())) for text in ("a wren", "an owl \x1b[31m", "no"))
        groups.append(Group(Prompt(prompt_id(messages), messages), (1,), completions))
    store.write_records(folder / "00000.jsonl", groups, Group)
    return folder


def judgements_in(folder: Path, groups: Path, scores: tuple[float | None, ...]) -> Path:
    rows = [Judgement(group.prompt.id, scores) for group in store.read_records(groups / "00000.jsonl", Group)]
    store.write_records(folder / "00000.jsonl", rows, Judgement)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_two_judges_are_compared_as_folders_or_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    groups = groups_in(tmp_path / "groups", 3)
    a = judgements_in(tmp_path / "a", groups, (2.0, 1.0, 0.0))
    b = judgements_in(tmp_path / "b", groups, (1.0, 2.0, 0.0))
    figures = json.loads(run(capsys, "compare-judges", a, b / "00000.jsonl", "--json"))
    assert figures["num_pairs"] == 9
    assert figures["agreement"] == pytest.approx(2 / 3)
    assert len(figures["disagreements"]) == 3
    said = run(capsys, "compare-judges", a, b, "--groups", groups, "--limit", 1)
    assert "Cohen's kappa                     0.333" in said
    assert said.count("completions 0 and 1: A says 2 and 1, B says 1 and 2, gap 1.00") == 1
    assert "1: an owl" in said
    assert "\x1b" not in said


def test_rounds_of_one_run_are_not_compared_for_their_completions_differ(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny, prompts={"source": "prompts.jsonl", "deal": "same"})
    run(capsys, "iterate", recipe, "--out", tmp_path / "run")
    first, second = (tmp_path / "run" / f"round-00{n}" / "judgements" for n in (0, 1))
    assert "both judged 32 prompts, but of none the same completions" in run(
        capsys, "compare-judges", first, second, code=65
    )
    run(
        capsys,
        "judge",
        recipe,
        "--groups",
        first.parent / "groups",
        "--out",
        tmp_path / "j",
        "--set",
        "judge={kind: coin}",
    )
    found = json.loads(run(capsys, "compare-judges", first, tmp_path / "j", "--json"))
    assert (found["num_prompts"], found["num_other_completions"], found["num_unknown"]) == (32, 0, 0)


def test_prompts_that_are_left_out_of_a_comparison_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Judgement(f"p{n}", (1.0, 2.0), completions_digest=digest) for n, digest in enumerate(("a", "b", ""))]
    for name, digest in (("one", "b"), ("other", "c")):
        kept = [rows[0], Judgement("p1", (2.0, 1.0), completions_digest=digest), rows[2]]
        store.write_records(tmp_path / name / "00000.jsonl", kept, Judgement)
    said = run(capsys, "compare-judges", tmp_path / "one", tmp_path / "other")
    assert "2 prompts judged by both (0 by one alone)" in said
    assert "left out: 1 prompts that both judged, but not the same completions of" in said
    assert "not known of 1 prompts whether the completions are the same" in said


def test_comparing_with_a_folder_that_is_not_there_is_a_data_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no such file or folder" in run(capsys, "compare-judges", tmp_path / "x", tmp_path / "y", code=65)


def test_a_judge_that_knows_is_calibrated_as_such_and_length_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_in(tmp_path, {"kind": "verifier", "checks": [{"kind": "contains", "any": ["wren"]}]})
    pairs = jsonl(tmp_path / "pairs.jsonl", [*ROWS, {"prompt": "x", "chosen": "", "rejected": "y"}])
    figures = json.loads(run(capsys, "calibrate", recipe, "--pairs", pairs, "--json"))
    assert figures["accuracy"] == 1.0
    assert figures["accuracy_interval"][0] > 0.8
    assert (figures["num_pairs"], figures["num_judged"], figures["num_dropped"]) == (20, 20, 1)
    assert figures["longer_accuracy"] == figures["tie_rate"] == figures["unparsed_rate"] == 0.0
    assert figures["swap_consistency"] is None
    assert not figures["includes_chance"]
    assert json.loads(run(capsys, "calibrate", recipe, "--pairs", pairs, "--json", "--limit", 4))["num_pairs"] == 4


def test_a_judge_of_places_ties_on_every_pair_and_its_interval_includes_chance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("def first(prompt, a, b): return 1.0\n")
    recipe = recipe_in(tmp_path, {"kind": "python", "target": "mine.py:first"})
    pairs = jsonl(tmp_path / "pairs.jsonl", ROWS)
    said = run(capsys, "calibrate", recipe, "--pairs", pairs, "--allow-code")
    assert "accuracy          0.500" in said
    assert "swap consistency  0.000" in said
    assert "ties              1.000" in said
    assert "includes chance" in said


def test_a_calibration_that_stopped_goes_on_and_asks_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = jsonl(tmp_path / "pairs.jsonl", ROWS)
    up = 12
    with Server(lambda asked: says("Score: 2") if asked.number < up else http(503)) as server:
        recipe = recipe_in(tmp_path, api(server.url, max_concurrency=1))
        said = run(capsys, "calibrate", recipe, "--pairs", pairs, "--out", tmp_path / "out", code=69)
        assert "the same command goes on" in said
        before, up = len(server.asked), 1000
        run(capsys, "calibrate", recipe, "--pairs", pairs, "--out", tmp_path / "out")
        assert len(server.asked) == before + 40 - 12


def test_the_calls_of_the_panels_are_counted_with_those_of_their_round(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def by_text(asked: Asked) -> Act:
        return says(f"Score: {sum(asked.text.encode()) % 6}")

    with Server(by_text) as server:
        judge = api(server.url, prompt_price=1.0, completion_price=1.0)
        out = tmp_path / "run"
        run(capsys, "iterate", write_recipe(tmp_path, tiny, rounds=1, judge=judge), "--out", out)
    found = json.loads(run(capsys, "status", out, "--json"))
    initial, first = found["initial"]["judge_usage"], found["rounds"][0]["judge_usage"]
    assert initial["num_calls"] == 8 * (2 + 1)
    assert initial["num_calls"] + first["num_calls"] == len(server.asked)
    assert first["cost"] == pytest.approx((first["prompt_tokens"] + first["completion_tokens"]) * 1e-6)
    assert f"the panel of the initial policy: {initial['num_calls']} calls" in run(capsys, "status", out)


def test_the_place_of_the_chosen_completion_tells_nothing(tmp_path: Path) -> None:
    rows, _ = read_labelled(str(jsonl(tmp_path / "pairs.jsonl", ROWS)))
    places = [chosen_place(row) for row in rows]
    assert 0 < sum(places) < len(places)
    for row, place in zip(rows, places, strict=True):
        assert labelled_group(row).completions[place].text == row.chosen
    first = [Judgement(row.prompt.id, (1.0, 0.0)) for row in rows]
    assert calibration(rows, first)["accuracy"] == places.count(0) / len(places)


def test_a_kept_calibration_is_not_taken_for_one_of_rows_with_other_checks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = recipe_in(tmp_path, {"kind": "verifier", "score": "all"}), tmp_path / "kept"
    for most, code in ((2, 0), (2, 0), (1, 64)):
        rows = [{**row, "checks": [{"kind": "words", "max": most}]} for row in ROWS]
        said = run(capsys, "calibrate", recipe, "--pairs", jsonl(tmp_path / "p.jsonl", rows), "--out", out, code=code)
    assert "holds the work of other inputs" in said


def test_ties_count_half_and_missing_verdicts_not_at_all() -> None:
    rows = [Labelled(Prompt(f"p{n}", ()), "long text", "text") for n in range(4)]
    scores: list[tuple[float | None, float | None]] = [(1.0, 1.0), (1.0, None), (None, None), (2.0, 2.0)]
    figures = calibration(rows, [Judgement(row.prompt.id, pair) for row, pair in zip(rows, scores, strict=True)])
    assert (figures["accuracy"], figures["tie_rate"], figures["unparsed_rate"]) == (0.5, 1.0, 0.5)
    assert figures["longer_accuracy"] == 1.0


def test_labelled_rows_have_the_gold_answer_and_the_checks_that_the_data_holds(tmp_path: Path) -> None:
    row = {**ROWS[0], "answer": "wren", "checks": [{"kind": "words", "max": 3}]}
    (found,), _ = read_labelled(
        str(jsonl(tmp_path / "p.jsonl", [row])), gold_column="answer", system_prompt="Be brief."
    )
    assert found.prompt.gold == "wren"
    assert found.prompt.checks == ({"kind": "words", "max": 3},)
    assert found.prompt.messages[0] == Message("system", "Be brief.")


def test_judging_by_an_endpoint_ends_with_69_where_it_is_down_and_a_key_is_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    groups, out = groups_in(tmp_path / "groups", 2), tmp_path / "judged"
    with Server(lambda asked: says(f"{KEY}\nScore: 2") if asked.number < 3 else http(500, KEY.encode())) as server:
        recipe = recipe_in(tmp_path, api(server.url, api_key_env="JUDGE_KEY", max_concurrency=1))
        monkeypatch.setattr("selfplay.judges.patience.MAX_FAILURES", 2)
        said = run(capsys, "judge", recipe, "--groups", groups, "--out", out, code=69)
        monkeypatch.undo()
        assert all(asked.headers["authorization"] == f"Bearer {KEY}" for asked in server.asked)
    assert "2 calls in a row got no reply; the last: HTTP 500" in said
    assert "judge: 5 calls (0 retries, 2 failed)" in said
    assert KEY not in said
    assert [json.loads(line)["reply"] is None for line in (out / "replies.log").read_text().splitlines()] == [
        *[False] * 3,
        *[True] * 2,
    ]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY.encode() not in written


def test_validate_tells_of_a_key_variable_that_is_not_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(tmp_path / "p.jsonl", [{"prompt": "x"}])
    recipe = recipe_in(tmp_path, api("https://judge.example/v1", api_key_env="JUDGE_KEY"))
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    assert "JUDGE_KEY is not set" in run(capsys, "validate", recipe, code=64)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    run(capsys, "validate", recipe)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"api_key": KEY}, 'judge.api_key: unknown key; did you mean "api_key_env"?'),
        ({"api_key_env": KEY}, "judge.api_key_env"),
        ({"base_url": f"https://user:{KEY}@judge.example/v1"}, "judge.base_url"),
        ({"base_url": f"https://judge.example/v1?key={KEY}"}, "judge.base_url"),
        ({"base_url": "http://169.254.169.254/v1"}, "link-local"),
        ({"base_url": "http://[fe80::1%25eth0]/v1"}, "link-local"),
        ({"base_url": "http://[::ffff:169.254.169.254]/v1"}, "link-local"),
        ({"base_url": "ftp://judge.example"}, "scheme"),
        ({"base_url": "judge.example/v1"}, "scheme"),
        ({"base_url": "http://judge.example:99999/v1"}, "no valid URL"),
        ({"model": ""}, "judge.model"),
        ({"prompt_price": 1.0}, "both prompt_price and completion_price"),
        ({"requests_per_minute": 0.0}, "judge.requests_per_minute"),
        ({"timeout": 0.0}, "judge.timeout"),
        ({"verdict": "guessed"}, "judge.verdict"),
        ({"verdict": "labels", "temperature": 0.1}, "labels draws nothing, so temperature changes nothing"),
        ({"constraint": "structured_outputs"}, "constraint is read with verdict: constrained alone"),
        ({"top_logprobs": 5}, "top_logprobs is read with verdict: labels alone"),
        ({"verdict": "labels", "top_logprobs": 21}, "judge.top_logprobs"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_senseless_endpoint_or_a_key_in_the_recipe_is_refused_without_showing_it(
    fields: dict[str, Any], words: str
) -> None:
    data = {"model": "m", "prompts": {"source": "p", "deal": "same"}, "judge": api("https://judge.example/v1") | fields}
    with pytest.raises(RecipeError) as caught:
        check_recipe(data, "r.yaml")
    assert words in str(caught.value)
    assert KEY not in str(caught.value)


def test_a_round_judged_by_an_endpoint_tells_its_audit_and_its_cost(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def longer(asked: Asked) -> Act:
        shown = asked.text.split("<<<completion")[1].split("<<<end")[0]
        return says(f"Score: {min(5, len(shown) // 20)}")

    with Server(longer) as server:
        judge = api(server.url, prompt_price=1.0, completion_price=1.0)
        coin, none = {"judge": {"kind": "coin"}}, {"canaries": 0}
        recipe = write_recipe(tmp_path, tiny, rounds=1, judge=judge, evaluate=coin, audit=none)
        out = tmp_path / "run"
        run(capsys, "iterate", recipe, "--out", out)
        asked = len(server.asked)
        run(capsys, "iterate", recipe, "--out", out, "--set", "judge.deadline=9", "--set", "judge.max_concurrency=1")
        said = run(capsys, "iterate", recipe, "--out", out, "--set", "judge.temperature=0.2", code=64)
        assert "judge.temperature: 0.7 -> 0.2" in said
        assert len(server.asked) == asked == 8 * 4
    done = store.read_json(out / "round-000" / "round.json")
    assert done["judge_usage"]["num_calls"] == asked
    assert done["audit"]["parse_rate"] == 1.0
    assert done["audit"]["length_correlation"] > 0
    assert sum(row[2] for row in done["audit"]["histogram"]) == asked
    assert json.loads((out / "metrics.jsonl").read_text())["audit"] == done["audit"]
    said = run(capsys, "status", out)
    row = next(line for line in said.split("audit of the judge")[1].splitlines() if line.startswith("0 "))
    assert row.split()[1] == "1.000"
    assert row.split()[-2:] == ["32", f"{asked * 12e-6:.4f}"]
