"""From panels to verdicts: gains paired by prompt, figures at a matched KL, and what may be said of an interval."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfplay import Judge, JudgeContext, store
from selfplay.evaluate import Interval, per_prompt_scores, pooled_gain
from selfplay.stages import shards
from selfplay.types import Group, Judgement

Scores = Mapping[str, float]  # by the text of the prompt: with a system prompt the same question has another id


@dataclass(frozen=True, slots=True)
class Panel:
    """A played panel: eval.json, and the mean score of each prompt at temperature 1 and greedy."""

    figures: Mapping[str, Any]
    scores: Scores
    greedy: Scores


def read_panel(folder: Path, judge: Judge | None = None) -> Panel | None:
    """A panel, None where it was not played; `judge` judges its completions anew."""
    if not (folder / "eval.json").exists():
        return None
    found = [scores_of(folder / "heldout", name, judge) for name in ("temperature", "greedy")]
    return Panel(store.read_json(folder / "eval.json"), *found)


def scores_of(heldout: Path, name: str, judge: Judge | None) -> Scores:
    if not (heldout / name).exists():
        return {}
    groups = read_groups(heldout / name)
    judged = [j for path in shards(heldout / f"{name}-judgements") for j in store.read_records(path, Judgement)]
    judgements = judged if judge is None else judge.judge(groups, JudgeContext())
    scores = per_prompt_scores(groups, judgements)
    return {group.prompt.text: scores[group.prompt.id] for group in groups if group.prompt.id in scores}


def read_groups(folder: Path) -> list[Group]:
    """The groups of a folder of shards. As selfplay.read_groups, which loads torch."""
    return [group for path in shards(folder) for group in store.read_records(path, Group)]


def trained_on(place: Path, rate: float | None) -> tuple[int | None, int | None]:
    """The rows and the optimizer steps of all trainings of an item, at the rate that it took; None where it trains nothing."""
    results = [store.read_json(path) for path in (place / f"rate-{rate:g}").rglob("train/result.json")] if rate else []
    if not results:
        return None, None
    return sum(one["num_pairs"] for one in results), sum(one["num_steps"] for one in results)


@dataclass(frozen=True, slots=True)
class Gain:
    """A mean difference over seeds and prompts, and its paired 95 % bootstrap interval over both."""

    mean: float
    interval: Interval

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.interval[0]:+.3f}, {self.interval[1]:+.3f}]"

    @property
    def verdict(self) -> str:
        """higher, lower, or inconclusive where the interval includes 0."""
        low, high = self.interval
        return "higher" if low > 0 else "lower" if high < 0 else "inconclusive"

    def within(self, bound: float) -> str:
        """Is the difference at most `bound` in size? holds, fails, or inconclusive where the interval crosses a bound."""
        low, high = self.interval
        if -bound <= low and high <= bound:
            return "holds"
        return "fails" if low > bound or high < -bound else "inconclusive"


def gain(before: Sequence[Scores], after: Sequence[Scores]) -> Gain | None:
    """after - before; one of each per seed. None without seeds, or without prompts that all have."""
    found = pooled_gain(before, after) if before and after else None
    return None if found is None else Gain(*found)


def dose_residual(
    base: Sequence[Scores], rules: Sequence[Scores], start: Sequence[Scores], arm: Sequence[Scores], accuracy: float
) -> Gain | None:
    """The gain of an arm beyond (2 * accuracy - 1) times that of the rules, one of each per seed."""
    dose = 2 * accuracy - 1
    predicted = [{id: dose * (r[id] - b[id]) for id in b.keys() & r.keys()} for b, r in zip(base, rules, strict=True)]
    had = [{id: a[id] - s[id] for id in s.keys() & a.keys()} for s, a in zip(start, arm, strict=True)]
    return gain(predicted, had)


def at_kl(points: Sequence[tuple[float, Scores]], kl: float) -> Scores:
    """Each prompt's score at a KL, linear between the two points around it. `kl` must lie between the smallest and the largest
    KL of the points: nothing is extrapolated.
    """
    ordered = sorted(points, key=lambda point: point[0])
    assert ordered[0][0] <= kl <= ordered[-1][0], "a matched KL lies within both curves"
    below = max(n for n, (x, _) in enumerate(ordered) if x <= kl)
    if below == len(ordered) - 1:
        return ordered[below][1]
    (x0, low), (x1, high) = ordered[below], ordered[below + 1]
    share = (kl - x0) / (x1 - x0)
    return {id: (1 - share) * low[id] + share * high[id] for id in low.keys() & high.keys()}


def mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; None is a dash, floats have three digits, or four where they are small."""
    lines = [head, ["---"] * len(head), *([cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if 0 < abs(value) < 0.1 else f"{value:.3f}"
    return "-" if value is None else str(value)
