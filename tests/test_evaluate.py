"""The panel's statistics, against hand-worked numbers and what an interval must obey."""

from collections.abc import Mapping

import numpy as np
import pytest

from selfplay.evaluate import bootstrap_interval, paired_gain, panel_figures, pooled_gain, unjudged_share
from selfplay.types import Completion, Group, Judgement, Message, Prompt


def scores(values: list[float]) -> dict[str, float]:
    return {f"p{n}": value for n, value in enumerate(values)}


def runs(gains_RP: list[list[float]]) -> tuple[list[Mapping[str, float]], list[Mapping[str, float]]]:
    return [scores([0.0] * len(row)) for row in gains_RP], [scores(row) for row in gains_RP]


def test_an_interval_covers_the_mean_and_narrows_with_the_root_of_the_number_of_prompts() -> None:
    values = np.random.default_rng(1).normal(size=100).tolist()
    low, high = bootstrap_interval(values)
    assert low < np.mean(values) < high
    assert high - low == pytest.approx(2 * 1.96 * np.std(values) / 10, rel=0.1)
    low4, high4 = bootstrap_interval(values * 4)
    assert high4 - low4 == pytest.approx((high - low) / 2, rel=0.1)


def test_gains_are_paired_by_prompt_and_prompts_that_one_side_lacks_are_left_out() -> None:
    gain = paired_gain({"a": 0.0, "b": 1.0, "only before": 1.0}, {"b": 0.5, "a": 1.0, "only after": 0.0})
    assert gain is not None
    assert gain[0] == 0.25
    assert paired_gain({"a": 1.0}, {"b": 1.0}) is None


def test_the_pooled_gain_of_one_run_is_its_paired_gain() -> None:
    values = np.random.default_rng(2).normal(size=60).tolist()
    alone, pooled = paired_gain(scores([0.0] * 60), scores(values)), pooled_gain(*runs([values]))
    assert alone is not None
    assert pooled is not None
    assert pooled[0] == pytest.approx(alone[0])
    assert np.subtract(*pooled[1]) == pytest.approx(np.subtract(*alone[1]), rel=0.05)


def test_runs_that_differ_widen_the_pooled_interval_though_their_prompts_agree() -> None:
    same = pooled_gain(*runs([[0.2] * 50] * 3))
    other = pooled_gain(*runs([[0.0] * 50, [0.2] * 50, [0.4] * 50]))
    assert same is not None
    assert other is not None
    assert same[0] == pytest.approx(0.2) == other[0]
    assert same[1] == pytest.approx((0.2, 0.2))
    assert other[1][0] < 0.1
    assert other[1][1] > 0.3


def test_prompts_that_differ_widen_the_pooled_interval_though_runs_agree() -> None:
    values = np.random.default_rng(3).normal(size=60).tolist()
    three, one = pooled_gain(*runs([values] * 3)), pooled_gain(*runs([values]))
    assert three is not None
    assert one is not None
    # the same prompts three times are no more evidence than once
    assert np.subtract(*three[1]) == pytest.approx(np.subtract(*one[1]), rel=0.05)


def test_the_figures_of_a_panel_by_hand() -> None:
    def completion(text: str, logps: tuple[float, ...], reason: str) -> Completion:
        return Completion(text, tuple(range(len(logps))), logps, reason, None)

    prompt = Prompt("p", (Message("user", "Say a."),), source="here")
    groups = [
        Group(prompt, (1,), (completion("a", (-1.0, -2.0), "stop"), completion("b", (-3.0,) * 4, "length"))),
    ]
    figures = panel_figures(groups, [Judgement("p", (1.0, None))], [], None, kl=0.5, temperature=1.0)
    assert figures["heldout_score"] == 1.0  # no verdict is left out, and is no 0
    assert figures["num_unjudged"] == 1
    assert (figures["parse_rate"], unjudged_share(figures)) == (0.5, 0.5)
    assert unjudged_share(figures, greedy=True) is None
    assert figures["mean_length"] == 3.0
    assert figures["truncated"] == 0.5
    assert figures["entropy"] == pytest.approx(15 / 6)
    assert figures["heldout_greedy"] is None
    assert figures["kl"] == 0.5
    pairwise = Judgement("p", (1.0, 0.0), num_asked=8, unparsed={"cut": 6})
    silent = panel_figures(groups, [pairwise], groups, [Judgement("p", (1.0, 0.0))], kl=None, temperature=1.0)
    assert (silent["num_unjudged"], unjudged_share(silent)) == (
        0,
        0.75,
    )  # every completion has a score, of few verdicts
    assert unjudged_share(silent, greedy=True) == 0.0
    older = {
        "num_completions": 8,
        "num_prompts": 4,
        "num_unjudged": 2,
    }  # an eval.json from before verdicts were counted
    assert (unjudged_share(older), unjudged_share(older, greedy=True)) == (0.25, None)
    cooler = panel_figures(groups, None, [], None, kl=None, temperature=0.7)
    assert cooler["entropy"] is None  # the policy's own logps are no expectation under another distribution
