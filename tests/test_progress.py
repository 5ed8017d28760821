"""What a run says while it works, where nobody looks at a terminal: plain lines with a rate and what is left."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from selfplay import progress, stages
from selfplay.judges.lift import pointwise
from selfplay.progress import Reporter
from selfplay.protocols import JudgeContext
from selfplay.stages import judge_groups
from selfplay.types import Completion, Group, Judgement, Message, Prompt


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def reporter() -> Reporter:
    return Reporter(console=Console(file=io.StringIO(), highlight=False, width=200))


def said(reporter: Reporter) -> list[str]:
    assert isinstance(reporter.console.file, io.StringIO)
    return reporter.console.file.getvalue().splitlines()


def test_a_line_has_rate_and_remaining_time_and_comes_at_most_every_15_seconds(
    clock: Clock, reporter: Reporter
) -> None:
    with reporter.stage("judging", 100, "verdicts") as advance:
        for second in range(1, 41):
            clock.now = float(second)
            advance(2 * second)
    assert said(reporter) == [
        "judging: 30/100 verdicts, 2.0/s, 35 s left",
        "judging: 60/100 verdicts, 2.0/s, 20 s left",
        "judging: 100 verdicts in 40.0 s",
    ]


def test_what_was_there_before_counts_for_no_rate(clock: Clock, reporter: Reporter) -> None:
    with reporter.stage("judging", 100, "verdicts", done=60) as advance:
        clock.now = 20.0
        advance(80)
    assert said(reporter) == ["judging: 80/100 verdicts, 1.0/s, 20 s left", "judging: 40 verdicts in 20.0 s"]


def groups_of(count: int) -> list[Group]:
    prompts = [Prompt(str(n), (Message("user", f"ask {n}"),)) for n in range(count)]
    return [Group(prompt, (1,), (Completion("a"), Completion("b"))) for prompt in prompts]


def test_judging_tells_of_every_verdict_and_goes_on_counting_after_the_shards_that_are_there(
    clock: Clock, reporter: Reporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "SHARD_PROMPTS", 2)

    @pointwise
    def slow(prompt: Prompt, completion: Completion) -> float:
        clock.now += 8
        return 1.0

    groups = groups_of(5)
    judge_groups(slow, groups[:2], JudgeContext(), tmp_path, progress.SILENT, "judging")
    clock.now = 0.0
    judge_groups(slow, groups, JudgeContext(), tmp_path, reporter, "judging")
    assert said(reporter) == [
        "judging: 6/10 verdicts, 0.1/s, 32 s left",
        "judging: 8/10 verdicts, 0.1/s, 16 s left",
        "judging: 10/10 verdicts, 0.1/s, 0 s left",
        "judging: 6 verdicts in 48.0 s",
    ]


def test_a_judge_that_says_nothing_on_the_way_is_counted_in_prompts(
    clock: Clock, reporter: Reporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "SHARD_PROMPTS", 2)

    class Whole:
        identity = "whole"

        def judge(self, groups: Sequence[Group], context: Any) -> list[Judgement]:
            clock.now += 20
            return [Judgement(group.prompt.id, (1.0, 0.0)) for group in groups]

    judge_groups(Whole(), groups_of(3), JudgeContext(), tmp_path, reporter, "judging")
    assert said(reporter)[0] == "judging: 2/3 prompts, 0.1/s, 10 s left"
