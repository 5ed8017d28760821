"""Verdicts that can't be read are counted one by one, and too many of them stop a round, whatever shape the judge has."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny_tokenizer

from selfplay import store
from selfplay.audit import audit
from selfplay.chat import Chat
from selfplay.errors import JudgeError, UnparsedGateError
from selfplay.generators.engine import Request, Result
from selfplay.judges.combine import Combine, Member
from selfplay.judges.contract import check_judgements, check_unparsed, judge_checked
from selfplay.judges.lift import pairwise, pointwise
from selfplay.judges.llm import LLMJudge
from selfplay.judges.template import load_template
from selfplay.judges.unparsed import count_verdicts
from selfplay.protocols import Judge, JudgeContext
from selfplay.types import Completion, Group, Judgement, Message, Prompt, derive_seed, prompt_id

ADDITIVE, PAIRWISE, CORRECTNESS = (
    load_template(n, Path()) for n in ("additive", "pairwise_helpfulness", "correctness")
)
LIMIT = 0.05


class Mumbling:
    """A judge model of which a share of the verdicts, drawn by the seeds of requests, can't be read."""

    def __init__(self, share: float, verdict: str = "Score: 3") -> None:
        tokenizer = make_tiny_tokenizer()
        self.chat = Chat(tokenizer, stop_token_ids=[tokenizer.eos_token_id])
        self.engine = self
        self.max_model_len = 9000
        self.share, self.verdict = share, verdict
        self.num_read = self.num_asked = 0

    def complete(
        self, requests: Sequence[Request], *, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, Result]:
        found = {}
        for request in requests:
            clear = derive_seed("mumble", request.seed) % 1000 >= 1000 * self.share
            self.num_asked += 1
            self.num_read += clear
            ids = tuple(self.chat.tokenizer.encode(self.verdict if clear else "Well, who can say?"))
            found[request.id] = Result(request.id, ids, (0.0,) * len(ids), "stop", None)
        return found

    def score_labels(
        self,
        prompts: Sequence[tuple[int, ...]],
        label_token_ids: Sequence[int],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[float]]:
        raise AssertionError("nobody asks for labels here")


def groups_of(count: int, num_completions: int, gold: str | None = None) -> list[Group]:
    groups = []
    for n in range(count):
        messages = (Message("user", f"Name bird {n}."),)
        completions = tuple(Completion(f"bird {n} {k}") for k in range(num_completions))
        groups.append(Group(Prompt(prompt_id(messages), messages, gold=gold), (1,), completions))
    return groups


def judged(judge: Judge, groups: Sequence[Group], model: Any = None) -> list[Judgement]:
    return judge_checked(judge, groups, JudgeContext(generator=model))


@pytest.mark.parametrize(
    ("template", "verdict", "num_completions", "num_verdicts", "share"),
    [
        pytest.param(PAIRWISE, "Better: A", 4, 1, 0.2, id="pairs of 4"),
        pytest.param(PAIRWISE, "Better: A", 8, 1, 0.35, id="pairs of 8"),
        pytest.param(PAIRWISE, "Better: A", 3, 3, 0.3, id="pairs, several verdicts"),
        pytest.param(ADDITIVE, "Score: 3", 4, 3, 0.3, id="several verdicts"),
        pytest.param(ADDITIVE, "Score: 3", 4, 1, 0.2, id="one verdict"),
    ],
)
def test_the_gate_stops_at_verdicts_though_nearly_every_completion_has_a_score(
    template: Any, verdict: str, num_completions: int, num_verdicts: int, share: float
) -> None:
    model, judge = Mumbling(share, verdict), LLMJudge(template, num_verdicts=num_verdicts)
    groups = groups_of((60 if template is PAIRWISE else 240) // num_completions, num_completions)
    found = judged(judge, groups, model)
    counted = count_verdicts(found)
    assert counted.num_asked == model.num_asked == judge.count_verdicts(groups)
    assert counted.num_asked - counted.num_unparsed == model.num_read
    assert counted.unparsed_share == pytest.approx(share, abs=0.08)
    if num_completions * num_verdicts > 4:
        assert counted.unscored_share <= LIMIT
    with pytest.raises(UnparsedGateError) as caught:
        check_unparsed(found, LIMIT, judge_identity="j")
    said = str(caught.value)
    assert f"{counted.unparsed_share:.1%} of the {counted.num_asked} verdicts of judge j could not be read" in said
    assert f"{counted.unscored_share:.1%} of the {counted.num_completions} completions got no score" in said
    assert f"{counted.num_unparsed} x no line" in said
    check_unparsed(found, counted.unparsed_share)
    figures = audit(groups, found, [])
    assert figures["parse_rate"] == pytest.approx(1 - counted.unparsed_share)
    assert figures["scored_rate"] == pytest.approx(1 - counted.unscored_share)
    assert figures["num_asked"] == counted.num_asked


@pytest.mark.parametrize("template", [PAIRWISE, ADDITIVE], ids=["pairwise", "pointwise"])
def test_a_judge_that_is_always_understood_passes_a_gate_of_zero(template: Any) -> None:
    model = Mumbling(0.0, "Better: A" if template is PAIRWISE else "Score: 3")
    found = judged(LLMJudge(template, num_verdicts=2), groups_of(5, 3), model)
    check_unparsed(found, 0.0)
    assert audit(groups_of(5, 3), found, [])["parse_rate"] == 1.0


def test_a_prompt_that_lacks_what_the_template_shows_costs_no_verdict_but_its_scores() -> None:
    model, judge = Mumbling(0.0, "Verdict: correct"), LLMJudge(CORRECTNESS, num_verdicts=2)
    found = judged(judge, [*groups_of(3, 2, gold="a wren"), *groups_of(4, 2)[3:]], model)
    counted = count_verdicts(found)
    assert (counted.num_asked, counted.num_unparsed) == (12, 0)
    assert counted.unscored_share == 0.25
    with pytest.raises(UnparsedGateError, match=r"0\.0% of the 12 verdicts.*25\.0% of the 8 completions") as caught:
        check_unparsed(found, LIMIT)
    assert "2 x the template asks for the gold answer" in str(caught.value)


def test_questions_that_do_not_fit_the_judge_are_verdicts_that_are_missing() -> None:
    model = Mumbling(0.0, "Better: A")
    groups = groups_of(2, 3)
    long = Group(groups[0].prompt, (1,), (*groups[0].completions[:2], Completion("far " * 3000)))
    counted = count_verdicts(judged(LLMJudge(PAIRWISE), [long, groups[1]], model))
    assert (counted.num_asked, counted.num_unparsed, counted.num_unscored) == (12, 4, 1)


def test_a_group_of_one_completion_has_nothing_to_ask_of_a_judge_of_pairs() -> None:
    counted = count_verdicts(judged(LLMJudge(PAIRWISE), groups_of(2, 1), Mumbling(0.0, "Better: A")))
    assert (counted.num_asked, counted.parse_rate, counted.scored_rate) == (0, None, 0.0)


def test_functions_of_the_user_are_counted_by_their_calls() -> None:
    silent = pairwise(lambda prompt, a, b: None if a.text.endswith("0") else 1.0)
    groups = groups_of(4, 4)
    found = judged(silent, groups)
    counted = count_verdicts(found)
    assert (counted.num_asked, counted.num_unparsed) == (4 * 12, 4 * 3)
    assert counted.num_unscored == 4
    with pytest.raises(UnparsedGateError, match="12 x the function gave no verdict"):
        check_unparsed(found, 0.2)
    one = count_verdicts(judged(pointwise(lambda prompt, c: None if c.text.endswith("0") else 1.0), groups))
    assert (one.num_asked, one.num_unparsed, one.num_unscored) == (16, 4, 4)


def test_a_combination_counts_the_verdicts_of_all_its_members() -> None:
    model = Mumbling(0.3)
    members = [Member("llm", LLMJudge(ADDITIVE, num_verdicts=3)), Member("mine", pointwise(lambda prompt, c: 1.0))]
    combined = judged(Combine(members, how="min", normalize="none"), groups_of(10, 4), model)
    counted = count_verdicts(combined)
    assert counted.num_asked == 120 + 40
    assert counted.num_unparsed == model.num_asked - model.num_read
    assert {reason.partition(":")[0] for judgement in combined for reason in judgement.unparsed} == {"llm"}


def test_a_judge_of_the_users_own_may_count_its_verdicts_or_leave_it_to_what_it_gave() -> None:
    by_itself = Judgement("p", (1.0, 2.0), num_asked=10, unparsed={"cut": 4})
    drawn = Judgement("p", (1.0, 2.0), verdicts=((1.0, None, 1.0), (2.0, None, None)))
    group = Group(Prompt("p", ()), (1,), (Completion("a"), Completion("b")))
    shares = [count_verdicts(check_judgements([group], [j], "j")).unparsed_share for j in (by_itself, drawn)]
    assert shares == [0.4, 0.5]


@pytest.mark.parametrize(
    "fields",
    [
        {"num_asked": -1},
        {"num_asked": 1.5},
        {"num_asked": 2, "unparsed": {"cut": 3}},
        {"unparsed": {"cut": 1}},
        {"num_asked": 2, "unparsed": {"cut": 0}},
        {"num_asked": 2, "unparsed": ["cut"]},
    ],
    ids=["negative", "half", "more than asked", "of none", "a reason of nothing", "a list"],
)
def test_counts_that_can_not_be_are_refused_where_they_enter(fields: dict[str, Any]) -> None:
    group = Group(Prompt("p", ()), (1,), (Completion("a"),))
    with pytest.raises(JudgeError, match="prompt p"):
        check_judgements([group], [Judgement("p", (1.0,), **fields)], "j")


def test_judgements_from_before_verdicts_were_counted_still_read(tmp_path: Path) -> None:
    line = '{"prompt_id":"p","scores":[1.0,null],"notes":["","cut"],"num_compared":0,"num_flipped":0,"verdicts":[]}\n'
    (tmp_path / "old.jsonl").write_text(line)
    (old,) = store.read_records(tmp_path / "old.jsonl", Judgement)
    assert count_verdicts([old]).unparsed_share == 0.5
    store.write_records(tmp_path / "new.jsonl", [old], Judgement)
    assert (tmp_path / "new.jsonl").read_text() == line
    counted = Judgement("p", (1.0, None), num_asked=6, unparsed={"cut": 2}, completions_digest="ab")
    store.write_records(tmp_path / "counted.jsonl", [counted], Judgement)
    assert store.read_records(tmp_path / "counted.jsonl", Judgement) == [counted]
