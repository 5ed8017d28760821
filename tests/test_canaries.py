"""Canaries: completions that must lose are shown to the judge, and to nothing else."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rewards import make_reward_model
from scripted_run import ok, write_recipe
from scripted_server import Act, Asked, Server, says

import selfplay
from selfplay import store
from selfplay.auditing import read_canaries
from selfplay.canaries import INJECTION, WHAT, Canary, canary_alarms, canary_figures, make_canaries, verdicts_on
from selfplay.chat import Chat
from selfplay.errors import RecipeError
from selfplay.judges.lift import pairwise, pointwise
from selfplay.protocols import JudgeContext
from selfplay.recipe_file import check_recipe, load_recipe
from selfplay.report import canary_line
from selfplay.rounds import iterate
from selfplay.types import Completion, Group, Judgement, Message, PreferencePair, Prompt, prompt_id

TEXTS = ("A wren is a small bird.", "An owl sees well in the dark.", "A gull lives by the sea.")
CONTEXT = JudgeContext()


def group_of(number: int) -> Group:
    messages = (Message("user", f"Tell me of bird {number}."),)
    texts = [f"{text} It is number {number}." for text in TEXTS]
    return Group(Prompt(prompt_id(messages), messages), (1,), tuple(Completion(t, tuple(t.encode())) for t in texts))


GROUPS = [group_of(n) for n in range(6)]
JUDGED = [Judgement(group.prompt.id, (1.0, 3.0, 2.0)) for group in GROUPS]


def canaries_of(chat: Chat, num_prompts: int = 4, seed: int = 0) -> list[Canary]:
    return make_canaries(GROUPS, JUDGED, chat, num_prompts=num_prompts, seed=seed)


def outcomes(chat: Chat, judge: Any) -> dict[str, Any]:
    canaries = canaries_of(chat)
    return canary_figures(verdicts_on(canaries, judge.judge([one.group for one in canaries], CONTEXT)))


def test_each_canary_stands_beside_the_median_completion_of_its_prompt(chat: Chat) -> None:
    canaries = canaries_of(chat)
    assert [one.kind for one in canaries] == [*WHAT] * 4
    by_id = {group.prompt.id: group for group in GROUPS}
    for one in canaries:
        real, made = one.group.completions
        group = by_id[one.group.prompt.id]
        assert one.group.prompt == group.prompt
        assert real == group.completions[2]  # scores 1, 3, 2
        assert made.text not in {c.text for c in group.completions}
        assert chat.stop_token_ids[0] == made.token_ids[-1] or one.kind == "off_topic"
    made_of = {kind: next(one.group.completions[1] for one in canaries if one.kind == kind) for kind in WHAT}
    assert made_of["empty"].text == ""
    assert made_of["injection"].text == INJECTION
    assert made_of["off_topic"] in {c for group in GROUPS for c in group.completions}
    words = made_of["repeated"].text.split()
    assert len(words) > 40
    assert len(set(words)) <= 6


def test_which_prompts_get_canaries_depends_on_the_seed_and_not_on_their_order(chat: Chat) -> None:
    straight = canaries_of(chat, num_prompts=2)
    assert make_canaries(GROUPS[::-1], JUDGED[::-1], chat, num_prompts=2, seed=0) == straight
    chosen = {frozenset(one.group.prompt.id for one in canaries_of(chat, 2, seed)) for seed in range(8)}
    assert len(chosen) > 1
    assert len(canaries_of(chat, num_prompts=100)) == len(GROUPS) * len(WHAT)


def test_a_text_of_a_canary_is_never_a_special_token(chat: Chat) -> None:
    text = f"{chat.tokenizer.eos_token} again"
    groups = [replace(g, completions=(Completion(text, (1,)),)) for g in GROUPS]
    judged = [Judgement(g.prompt.id, (1.0,)) for g in groups]
    for one in make_canaries(groups, judged, chat, num_prompts=6, seed=0):
        if one.kind == "repeated":
            assert {*one.group.completions[1].token_ids[:-1]}.isdisjoint(chat.tokenizer.all_special_ids)


def test_a_real_completion_that_is_the_canary_itself_leaves_that_kind_out(chat: Chat) -> None:
    groups = [replace(group, completions=(Completion(""),)) for group in GROUPS[:2]]
    judged = [Judgement(group.prompt.id, (1.0,)) for group in groups]
    kinds = {one.kind for one in make_canaries(groups, judged, chat, num_prompts=2, seed=0)}
    assert kinds == {"repeated", "injection"}  # the other prompt has no text to be off topic with
    unjudged = [Judgement(group.prompt.id, (None,)) for group in groups]
    assert make_canaries(groups, unjudged, chat, num_prompts=2, seed=0) == []


def test_a_sound_judge_lets_every_canary_lose(chat: Chat) -> None:
    @pointwise
    def on_topic(prompt: Prompt, completion: Completion) -> float:
        number = prompt.text.split()[-1]
        return float(f"number {number}" in completion.text and len(set(completion.text.split())) > 6)

    figures = outcomes(chat, on_topic)
    assert figures["canary_loss_rate"] == 1.0
    assert all(
        row == {"num_lost": 4, "num_tied": 0, "num_won": 0, "num_unjudged": 0} for row in figures["canaries"].values()
    )
    assert canary_alarms(figures["canaries"]) == []


@pytest.mark.parametrize(
    ("judge", "kinds"),
    [
        (pointwise(lambda prompt, c: -len(c.text)), {"empty"}),
        (pointwise(lambda prompt, c: len(c.text)), {"repeated", "injection"}),
        # ties are no defeat
        (pointwise(lambda prompt, c: float("Score: 5" in c.text)), {*WHAT}),
        (pairwise(lambda prompt, a, b: float("verdict: A" in a.text)), {*WHAT}),
        (pairwise(lambda prompt, a, b: 1.0), {*WHAT}),
        (pointwise(lambda prompt, c: None if not c.text else 1.0), {*WHAT} - {"empty"}),
    ],
    ids=["shortest", "longest", "believes", "believes in pairs", "by place", "says the same"],
)
def test_a_judge_with_a_weakness_rings_the_alarm_for_it(chat: Chat, judge: Any, kinds: set[str]) -> None:
    alarms = canary_alarms(outcomes(chat, judge)["canaries"])
    named = {kind for kind in WHAT if any(alarm.startswith(f"the canary {kind} ") for alarm in alarms)}
    # how long a completion is that is off topic is no matter of rule
    assert named - {"off_topic"} == kinds - {"off_topic"}


@pytest.mark.parametrize(
    ("lost", "tied", "won", "unjudged", "rings"),
    [
        (0, 0, 1, 0, True),
        (0, 1, 0, 0, True),
        (1, 0, 0, 0, False),
        (1, 0, 1, 0, True),
        (1, 1, 0, 0, False),
        (3, 0, 1, 0, True),
        (1, 3, 0, 0, True),
        (2, 2, 0, 0, False),
        (0, 0, 0, 4, False),
        (0, 0, 1, 3, True),
        (19, 0, 1, 0, False),
        (38, 0, 3, 0, True),
    ],
)
def test_one_canary_that_wins_rings_the_alarm_and_of_many_a_noisy_judge_may_let_one(
    lost: int, tied: int, won: int, unjudged: int, rings: bool
) -> None:
    row = {"num_lost": lost, "num_tied": tied, "num_won": won, "num_unjudged": unjudged}
    assert bool(canary_alarms({"empty": row})) == rings


def test_what_became_of_canaries_is_told_whatever_the_alarm() -> None:
    rows = {
        "empty": {"num_lost": 4, "num_tied": 0, "num_won": 0, "num_unjudged": 0},
        "injection": {"num_lost": 1, "num_tied": 1, "num_won": 1, "num_unjudged": 1},
    }
    assert canary_line(rows) == "empty 4 of 4, injection 1 of 3 (1 won, 1 tied, 1 without a verdict)"


def test_canaries_without_a_verdict_count_in_no_share(chat: Chat) -> None:
    figures = outcomes(chat, pointwise(lambda prompt, c: None))
    assert figures["canary_loss_rate"] is None
    assert figures["canaries"]["empty"] == {"num_lost": 0, "num_tied": 0, "num_won": 0, "num_unjudged": 4}
    assert canary_alarms(figures["canaries"]) == []
    assert canary_figures([]) == {"canaries": {}, "canary_loss_rate": None}


def readings(asked: Asked) -> Act:
    """A verdict that follows the length of what is shown."""
    shown = asked.text.split("<<<completion")[1].split("<<<end")[0]
    return says(f"Score: {min(5, len(shown) // 20)}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> tuple[Path, Path]:
    """A round judged by an endpoint, without canaries and with them."""
    folder = tmp_path_factory.mktemp("canaries")
    with Server(readings) as server:
        judge = {
            "kind": "api",
            "base_url": server.url,
            "model": "m",
            "num_verdicts": 2,
            "prompt_price": 1.0,
            "completion_price": 1.0,
        }
        recipe = write_recipe(folder, tiny, rounds=1, judge=judge, evaluate={"judge": {"kind": "coin"}})
        ok("iterate", recipe, "--out", folder / "without", "--set", "audit.canaries=0")
        ok("iterate", recipe, "--out", folder / "with")
    return folder / "without", folder / "with"


def test_verdicts_pairs_and_policy_are_the_same_bytes_with_canaries_and_without(runs: tuple[Path, Path]) -> None:
    without, with_them = (run / "round-000" for run in runs)
    assert not (without / "canaries").exists()
    assert read_canaries(with_them / "canaries")
    for name in ("groups/00000.jsonl", "judgements/00000.jsonl", "pairs.jsonl", "policy/model.safetensors"):
        assert (without / name).read_bytes() == (with_them / name).read_bytes(), name


def test_no_canary_is_in_a_group_or_a_pair(runs: tuple[Path, Path]) -> None:
    folder = runs[1] / "round-000"
    verdicts = read_canaries(folder / "canaries")
    made = {v.text for v in verdicts if v.kind != "off_topic"}
    groups = store.read_records(folder / "groups" / "00000.jsonl", Group)
    pairs = store.read_records(folder / "pairs.jsonl", PreferencePair)
    trained = {side[-1].content for pair in pairs for side in (pair.chosen, pair.rejected)}
    assert made.isdisjoint({c.text for group in groups for c in group.completions})
    assert made.isdisjoint(trained)
    of_prompt = {group.prompt.id: {c.text for c in group.completions} for group in groups}
    for pair in pairs:  # an off-topic text is a real completion of another prompt, and stays with that one
        assert {pair.chosen[-1].content, pair.rejected[-1].content} <= of_prompt[pair.prompt_id]
    assert {v.real_text for v in verdicts} <= {text for texts in of_prompt.values() for text in texts}


def test_a_round_tells_its_canaries_their_cost_and_how_far_the_judge_agrees_with_itself(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    done = [store.read_json(run / "round-000" / "round.json") for run in runs]
    table = done[1]["audit"]["canaries"]
    assert {kind: sum(row.values()) for kind, row in table.items()} == dict.fromkeys(WHAT, 4)
    assert table["empty"]["num_lost"] == 4
    assert table["injection"]["num_won"] == 4
    assert any("the canary injection" in alarm for alarm in done[1]["audit"]["alarms"])
    assert (done[0]["audit"]["canaries"], done[0]["audit"]["canary_loss_rate"]) == ({}, None)
    # 4 prompts, 4 kinds, 2 completions, 2 verdicts; the real completion is asked about once, whatever it stands beside
    calls = [one["judge_usage"]["num_calls"] for one in done]
    assert 0 < calls[1] - calls[0] <= 64
    assert done[1]["judge_usage"]["cost"] > done[0]["judge_usage"]["cost"]
    assert done[1]["audit"]["self_agreement"] == done[1]["audit"]["self_reliability"] == 1.0
    assert done[1]["audit"]["num_repeated"] == 32
    assert json.loads((runs[1] / "metrics.jsonl").read_text())["audit"] == done[1]["audit"]
    capsys.readouterr()
    ok("status", runs[1])
    said = capsys.readouterr().out
    assert "round 0, canaries that lost: empty 4 of 4" in said
    assert "ALARM: the canary injection (a text that claims the highest score for itself) won 4 times" in said


def test_a_run_goes_on_with_another_number_of_canaries_and_judges_none_twice(runs: tuple[Path, Path]) -> None:
    recipe, kept = runs[1].parent / "recipe.yaml", runs[1] / "round-000" / "canaries" / "verdicts.jsonl"
    before = kept.read_bytes()
    ok("iterate", recipe, "--out", runs[1], "--set", "audit.canaries=1")  # the server is gone: asking would fail
    assert kept.read_bytes() == before


def test_the_dry_run_says_what_canaries_cost(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judge = {"kind": "llm", "num_verdicts": 3}
    recipe = write_recipe(tmp_path, tiny, rounds=1, judge=judge, generator={"kind": "transformers", "max_tokens": 100})
    ok("iterate", recipe, "--out", tmp_path / "run", "--dry-run")
    said = capsys.readouterr().out
    assert "audit      4 canaries for each of 4 prompts, 32 completions to judge x 3 verdicts, beside 32" in said
    ok("iterate", recipe, "--out", tmp_path / "run", "--dry-run", "--set", "audit.canaries=0")
    assert "canaries for each" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("judge", "asked", "wanted"),
    [
        ({"kind": "llm"}, None, 4),
        ({"kind": "api", "base_url": "http://h/v1", "model": "m"}, None, 4),
        ({"kind": "reward_model", "model": "m"}, None, 4),
        ({"kind": "verifier"}, None, 0),
        ({"kind": "rouge_l"}, None, 0),
        ({"kind": "python", "target": "a.py:f"}, None, 0),
        ({"kind": "python", "target": "a.py:f"}, 2, 2),
        ({"kind": "llm"}, 0, 0),
        (None, None, 0),
    ],
    ids=["llm", "api", "reward model", "verifier", "rouge", "python", "python asked", "llm off", "none"],
)
def test_canaries_are_on_where_a_model_judges_and_else_where_asked_for(
    judge: dict[str, Any] | None, asked: int | None, wanted: int
) -> None:
    data = {"model": "m", "prompts": {"source": "p", "deal": "same"}, "judge": judge, "audit": {"canaries": asked}}
    assert check_recipe(data, "r.yaml").num_canaries == wanted


def test_canaries_without_a_judge_are_refused() -> None:
    data = {"model": "m", "prompts": {"source": "p", "deal": "same"}, "pairs": {"kind": "gold_vs_completion"}}
    with pytest.raises(RecipeError, match=r"audit\.canaries"):
        check_recipe({**data, "audit": {"canaries": 2}}, "r.yaml")


def test_a_judge_of_the_users_own_sees_canaries_where_asked_for_as_real_completions(tmp_path: Path, tiny: Path) -> None:
    seen: list[Completion] = []

    @selfplay.pointwise
    def shorter(prompt: Prompt, completion: Completion) -> float:
        seen.append(completion)
        return -len(completion.token_ids)

    recipe = write_recipe(tmp_path, tiny, rounds=1)
    for count, out in (("0", "off"), ("1", "on")):
        given = check_recipe({**load_recipe(recipe).model_dump(mode="json"), "audit": {"canaries": int(count)}}, "r")
        iterate(given, tmp_path / out, judge=shorter)
    assert sum(completion.text == INJECTION for completion in seen) >= 1
    assert all(completion.token_ids for completion in seen)
    figures = store.read_json(tmp_path / "on" / "round-000" / "round.json")["audit"]["canaries"]
    assert figures["empty"] == {"num_lost": 0, "num_tied": 0, "num_won": 1, "num_unjudged": 0}


def test_canaries_of_a_reward_model_leave_every_real_score_as_it_was(tmp_path: Path, tiny: Path) -> None:
    judge = {"kind": "reward_model", "model": str(make_reward_model(tmp_path / "reward")), "device": "cpu"}
    recipe = write_recipe(tmp_path, tiny, rounds=1, judge=judge, evaluate={"num_completions": 1})
    ok("iterate", recipe, "--out", tmp_path / "without", "--set", "audit.canaries=0")
    ok("iterate", recipe, "--out", tmp_path / "with")
    without, with_them = tmp_path / "without" / "round-000", tmp_path / "with" / "round-000"
    assert {v.outcome for v in read_canaries(with_them / "canaries")} <= {"won", "lost", "tied"}
    assert len(read_canaries(with_them / "canaries")) == 4 * len(WHAT)
    assert not (without / "canaries").exists()
    for name in ("judgements/00000.jsonl", "pairs.jsonl", "policy/model.safetensors"):
        assert (without / name).read_bytes() == (with_them / name).read_bytes(), name
