"""A stage that asks an endpoint: what a question without a reply becomes, when the stage stops, and what is asked again."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_server import BOMB, Act, Asked, Server, endless, http, says, silent

from selfplay.errors import JudgeError
from selfplay.judges.api import ApiJudge
from selfplay.judges.patience import MAX_FAILURES, MAX_TRIED
from selfplay.judges.template import load_template
from selfplay.progress import SILENT
from selfplay.protocols import JudgeContext
from selfplay.recipe_judges import ApiJudgeRecipe
from selfplay.stages import judge_groups, usage_of
from selfplay.types import Completion, Group, Judgement, Message, Prompt, prompt_id

SHARD = 4
REFUSALS = {
    "400": http(400, b'{"error": {"message": "too long"}}'),
    "413": http(413),
    "422": http(422),
    "garbage": http(200, b"<html>"),
    "other JSON": http(200, b'{"choices": []}'),
    "bomb": BOMB,
    "endless body": endless,
}
PASSING = {
    "503": http(503),
    "409": http(409),
    "redirect": http(307, Location="http://127.0.0.1:1/v1"),
    "forbidden": http(403, b"flagged"),
    "503 in a body of 200": http(200, b'{"error": {"code": 503, "message": "no upstream"}}'),
    "compressed 503": http(503, b"x", Content_Encoding="gzip"),
}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfplay.stages.SHARD_PROMPTS", SHARD)


def groups_of(count: int) -> list[Group]:
    messages = [(Message("user", f"ask <{n}>"),) for n in range(count)]
    return [Group(Prompt(prompt_id(m), m), (1,), (Completion("a wren"), Completion("an owl"))) for m in messages]


def start(folder: Path, url: str, groups: Sequence[Group], **fields: Any) -> list[Judgement]:
    """What one process does: the judgements of the stage in `folder`."""
    data = {"kind": "api", "base_url": url, "model": "m", "max_retries": 0, "max_concurrency": 1} | fields
    recipe = ApiJudgeRecipe.model_validate(data)
    judge = ApiJudge(load_template(recipe.template, Path()), recipe, pause=0.001)
    return list(judge_groups(judge, groups, JudgeContext(seed=7), folder, SILENT, "judging"))


def stops(folder: Path, url: str, groups: Sequence[Group], words: str, **fields: Any) -> None:
    with pytest.raises(JudgeError, match=words):
        start(folder, url, groups, **fields)


def bad_at(fault: Act, *places: int) -> Callable[[Asked], Act]:
    return lambda asked: fault if any(f"<{n}>" in asked.text for n in places) else says("Score: 3")


def times(server: Server) -> Counter[str]:
    return Counter(asked.text for asked in server.asked)


@pytest.mark.parametrize("fault", [*REFUSALS.values(), *PASSING.values()], ids=[*REFUSALS, *PASSING])
def test_a_shard_whose_only_question_has_no_reply_ends_where_others_of_its_stage_do(tmp_path: Path, fault: Act) -> None:
    with Server(bad_at(fault, 4)) as server:
        judgements = start(tmp_path, server.url, groups_of(SHARD + 1))
    assert [j.scores for j in judgements] == [(3.0, 3.0)] * SHARD + [(None, None)]
    assert all(judgements[-1].notes)


@pytest.mark.parametrize("fault", REFUSALS.values(), ids=REFUSALS.keys())
def test_a_process_that_is_refused_the_only_question_left_ends_the_stage(tmp_path: Path, fault: Act) -> None:
    with Server(bad_at(fault, 4)) as server:
        start(tmp_path, server.url, groups_of(SHARD))
        assert start(tmp_path, server.url, groups_of(SHARD + 1))[-1].scores == (None, None)


@pytest.mark.parametrize("fault", [*PASSING.values(), silent], ids=[*PASSING, "silence"])
def test_a_process_that_only_asks_in_vain_stops_until_the_third_one_gives_up(tmp_path: Path, fault: Act) -> None:
    groups = groups_of(SHARD + 1)
    with Server(bad_at(fault, 4)) as server:
        start(tmp_path, server.url, groups[:SHARD])
        for _ in range(MAX_TRIED - 1):
            stops(tmp_path, server.url, groups, "none of 2 calls", timeout=0.3 if fault is silent else 60.0)
        judgements = start(tmp_path, server.url, groups, timeout=0.3 if fault is silent else 60.0)
    assert judgements[-1].scores == (None, None)
    assert all(judgements[-1].notes)


@pytest.mark.parametrize("count", [1, 2 * SHARD])
def test_a_server_that_was_down_from_the_start_costs_no_verdict_however_often_it_was_tried(
    tmp_path: Path, count: int
) -> None:
    up = False
    with Server(lambda asked: says("Score: 3") if up else http(503)) as server:
        for _ in range(MAX_TRIED + 2):
            stops(tmp_path, server.url, groups_of(count), "got a reply that can be used|in a row got no reply")
        assert not list(tmp_path.glob("*.jsonl"))
        up = True
        assert [j.scores for j in start(tmp_path, server.url, groups_of(count))] == [(3.0, 3.0)] * count


def test_a_server_that_dies_between_two_processes_costs_no_verdict(tmp_path: Path) -> None:
    groups, up = groups_of(SHARD + 2), True
    with Server(lambda asked: says("Score: 3") if up else http(503)) as server:
        start(tmp_path, server.url, groups[:SHARD])
        up = False
        stops(tmp_path, server.url, groups, "none of 4 calls")
        up = True
        assert [j.scores for j in start(tmp_path, server.url, groups)] == [(3.0, 3.0)] * (SHARD + 2)


def test_a_server_that_dies_across_shards_stops_the_stage(tmp_path: Path) -> None:
    def script(asked: Asked) -> Act:
        return says("Score: 3") if asked.number < 5 else http(503)

    with Server(script) as server:
        stops(tmp_path, server.url, groups_of(5 * SHARD), f"{MAX_FAILURES} calls in a row")
        assert len(server.asked) == 5 + MAX_FAILURES


@pytest.mark.parametrize("status", [401, 402, 404])
def test_a_key_or_a_model_that_is_gone_in_the_middle_stops_at_once_and_keeps_the_replies(
    tmp_path: Path, status: int
) -> None:
    gone = True

    def script(asked: Asked) -> Act:
        return http(status, b"gone") if gone and asked.number >= 3 else says("Score: 3")

    with Server(script) as server:
        stops(tmp_path, server.url, groups_of(2), f"HTTP {status}")
        assert len(server.asked) == 4
        gone = False
        start(tmp_path, server.url, groups_of(2))
        assert len(server.asked) == 5


@pytest.mark.parametrize("fault", REFUSALS.values(), ids=REFUSALS.keys())
def test_a_killed_process_asks_nothing_twice_that_was_refused(tmp_path: Path, fault: Act) -> None:
    alive = False

    def script(asked: Asked) -> Act:
        return http(401) if not alive and "<3>" in asked.text else bad_at(fault, 1)(asked)

    with Server(script) as server:
        stops(tmp_path, server.url, groups_of(SHARD), "HTTP 401")
        before, alive = len(server.asked), True
        judgements = start(tmp_path, server.url, groups_of(SHARD))
        assert all("<3>" in asked.text for asked in server.asked[before:])
    assert [j.scores for j in judgements] == [(3.0, 3.0), (None, None), (3.0, 3.0), (3.0, 3.0)]
    assert all(judgements[1].notes)


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_what_may_pass_is_asked_again_by_the_next_process(tmp_path: Path, fault: Act) -> None:
    alive = False

    def script(asked: Asked) -> Act:
        if alive:
            return says("Score: 3")
        return http(401) if "<3>" in asked.text else bad_at(fault, 1)(asked)

    with Server(script) as server:
        stops(tmp_path, server.url, groups_of(SHARD), "HTTP 401")
        alive = True
        assert [j.scores for j in start(tmp_path, server.url, groups_of(SHARD))] == [(3.0, 3.0)] * SHARD


def test_a_server_that_refuses_everything_stops_the_stage_and_is_asked_again_when_it_is_mended(tmp_path: Path) -> None:
    groups, mended = groups_of(2 * SHARD), False
    with Server(lambda asked: says("Score: 3") if mended else http(400, b"no such field")) as server:
        stops(tmp_path, server.url, groups, "none of 8 calls .*HTTP 400")
        assert len(server.asked) == 2 * SHARD
        mended = True
        assert [j.scores for j in start(tmp_path, server.url, groups)] == [(3.0, 3.0)] * (2 * SHARD)
        assert set(times(server).values()) == {1, 2}


def test_a_stage_of_which_everything_is_refused_ends_too(tmp_path: Path) -> None:
    with Server(lambda asked: http(400, b"too long")) as server:
        for _ in range(MAX_TRIED - 1):
            stops(tmp_path, server.url, groups_of(1), "none of 2 calls .*HTTP 400")
        assert start(tmp_path, server.url, groups_of(1))[0].scores == (None, None)
        assert len(server.asked) == 2 * MAX_TRIED


def test_credit_that_runs_out_as_a_refusal_stops_the_stage_and_costs_no_shard_that_it_met_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfplay.stages.SHARD_PROMPTS", MAX_FAILURES)
    groups, credit = groups_of(2 * MAX_FAILURES), 2 * MAX_FAILURES

    def script(asked: Asked) -> Act:
        return says("Score: 3") if asked.number < credit else http(400, b"no credit")

    with Server(script) as server:
        stops(tmp_path, server.url, groups, f"none of {2 * MAX_FAILURES} calls .*HTTP 400")
        credit = 10**6
        assert [j.scores for j in start(tmp_path, server.url, groups)] == [(3.0, 3.0)] * len(groups)


def test_many_refused_questions_of_one_prompt_are_no_lack_of_credit(tmp_path: Path) -> None:
    *groups, last = groups_of(SHARD + 1)
    long = replace(last, completions=tuple(Completion(f"wren {n}") for n in range(3 * MAX_FAILURES)))
    with Server(bad_at(http(400, b"too long"), SHARD)) as server:
        assert start(tmp_path, server.url, [*groups, long])[-1].scores == (None,) * 3 * MAX_FAILURES


def test_forbidding_everything_stops_at_once_and_one_question_only_that(tmp_path: Path) -> None:
    with Server(bad_at(http(403, b"flagged"), 1)) as server:
        judgements = start(tmp_path / "one", server.url, groups_of(3))
        assert [j.scores for j in judgements] == [(3.0, 3.0), (None, None), (3.0, 3.0)]
        assert "HTTP 403" in judgements[1].notes[0]
    with Server(lambda asked: http(403, b"no")) as server:
        stops(tmp_path / "all", server.url, groups_of(3), "HTTP 403")
        assert len(server.asked) == 1


def test_a_missing_list_of_log_probabilities_is_a_refusal(tmp_path: Path) -> None:
    labels = "---\nname: t\nversion: 1\nmode: pointwise\nlabels: {yes: 1, no: 0}\n---\n[user]\n{prompt}{completion}"
    (tmp_path / "t.md").write_text(labels)
    top = {"top_logprobs": [{"token": "yes", "logprob": -0.01}, {"token": "no", "logprob": -5.0}]}
    choice = {"message": {"content": "yes"}, "logprobs": {"content": [top]}}
    good = http(200, json.dumps({"choices": [choice]}).encode())
    for _ in range(2):
        with Server(lambda asked: says("yes") if "<4>" in asked.text else good) as server:
            fields = {"template": str(tmp_path / "t.md"), "verdict": "labels", "max_tokens": 256}
            judgements = start(tmp_path / "out", server.url, groups_of(SHARD + 1), **fields)
        assert "no log-probabilities" in judgements[-1].notes[0]
        assert [j.scores.count(None) for j in judgements] == [0] * SHARD + [2]


def test_tokens_of_a_reply_that_cannot_be_read_are_counted_and_calls_without_any_shown(tmp_path: Path) -> None:
    usage = {"prompt_tokens": 1000, "completion_tokens": 50}
    billed = {
        "<1>": http(200, json.dumps({"choices": [], "usage": usage}).encode()),
        "<2>": http(200, json.dumps({"choices": [{"message": {"content": 5}}], "usage": usage}).encode()),
        "<3>": silent,
    }

    def script(asked: Asked) -> Act:
        return next((act for word, act in billed.items() if word in asked.text), says("Score: 3", tokens=(1000, 50)))

    prices = {"prompt_price": 2.0, "completion_price": 10.0, "timeout": 0.3, "max_retries": 1}
    with Server(script) as server:
        start(tmp_path, server.url, groups_of(SHARD), **prices)
        asked = len(server.asked)
    assert asked == 2 * 3 + 2 * 2
    assert usage_of(tmp_path) == {
        "num_calls": asked,
        "num_retries": 2,
        "num_failed": 6,
        "num_counted": 6,
        "prompt_tokens": 6000,
        "completion_tokens": 300,
        "cost": pytest.approx(6 * (1000 * 2e-6 + 50 * 10e-6)),
    }


def test_figures_go_on_where_another_process_left_them(tmp_path: Path) -> None:
    up = False
    with Server(lambda asked: says("Score: 3") if up else http(503)) as server:
        stops(tmp_path, server.url, groups_of(2), "none of 4 calls", max_retries=2)
        up = True
        start(tmp_path, server.url, groups_of(2))
        found = usage_of(tmp_path)
        assert found is not None
        assert found["num_calls"] == len(server.asked) == 4 * 3 + 4
    assert (found["num_retries"], found["num_failed"], found["num_counted"]) == (4 * 2, 0, 4)


def test_figures_of_before_calls_were_told_apart_are_added_up_where_they_can_be(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "usage.json").write_text(json.dumps({"num_calls": 3, "cost": 1.0}))
    with Server(lambda asked: says("Score: 3")) as server:
        start(tmp_path / "b", server.url, groups_of(1))
    old, new = usage_of(tmp_path), usage_of(tmp_path / "b", tmp_path / "a")
    assert old == {"num_calls": 5, "cost": None}
    assert new is not None
    assert (new["num_calls"], new["num_counted"]) == (5, None)


def test_a_journal_from_before_reasons_were_kept_is_read(tmp_path: Path) -> None:
    with Server(bad_at(http(503), 1)) as server:
        start(tmp_path, server.url, groups_of(2))
        log = tmp_path / "replies.log"
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        for row in rows:
            del row["failure"]
            if row["reply"]:
                del row["reply"]["tries"]
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for shard in tmp_path.glob("00000.jsonl*"):
            shard.unlink()
        stops(tmp_path, server.url, groups_of(2), "none of 2 calls")
    assert all(count == 1 for text, count in times(server).items() if "<0>" in text)
