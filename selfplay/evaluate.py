"""The held-out panel of a policy: is it better, or is the score gamed?

A score alone can be gamed: lower entropy raises a temperature-1 score, and short non-answers pass many rules. So beside it
stand greedy score, on-topic rate, length, truncation, entropy and KL to the initial policy.
Everything is paired by prompt, with the same seeds for every policy.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from selfplay.judges.unparsed import count_verdicts
from selfplay.judges.verifier import on_topic
from selfplay.types import Completion, Group, Judgement

RESAMPLES = 10_000
Interval = tuple[float, float]


def bootstrap_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Percentile bootstrap interval of the mean; `values` are one per prompt, the unit that is resampled.

    The generator is seeded with 0, so equal values give equal intervals.
    """
    array = np.asarray(values, dtype=np.float64)
    means = array[np.random.default_rng(0).integers(0, len(array), (RESAMPLES, len(array)))].mean(1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def paired_gain(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[float, Interval] | None:
    """Mean difference after - before over the prompts that both have, and its interval; None without such prompts."""
    both = [after[id] - before[id] for id in before if id in after]
    return (float(np.mean(both)), bootstrap_interval(both)) if both else None


def pooled_gain(
    before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]]
) -> tuple[float, Interval] | None:
    """Mean gain of several runs (seeds) over the prompts that all of them have, and its interval over runs and prompts
    together: both are drawn anew in every resample, prompts the same for all runs, since runs share them. Few runs give
    too narrow an interval. None without such prompts.
    """
    shared = sorted(set.intersection(*(set(scores) for scores in (*before, *after))))
    if not shared:
        return None
    gains_RP = np.array([[b[id] - a[id] for id in shared] for a, b in zip(before, after, strict=True)])
    draw = np.random.default_rng(0)
    # the mean over drawn runs and prompts, by how often each is drawn
    runs = draw.multinomial(len(gains_RP), [1 / len(gains_RP)] * len(gains_RP), RESAMPLES) / len(gains_RP)
    prompts = draw.multinomial(len(shared), [1 / len(shared)] * len(shared), RESAMPLES) / len(shared)
    low, high = np.quantile(((runs @ gains_RP) * prompts).sum(1), [0.025, 0.975])
    return float(gains_RP.mean()), (float(low), float(high))


def per_prompt_scores(groups: Sequence[Group], judgements: Sequence[Judgement]) -> dict[str, float]:
    """Mean score of each prompt's judged completions; a prompt without a verdict is left out."""
    scores = {}
    for group, judgement in zip(groups, judgements, strict=True):
        known = [s for s in judgement.scores if s is not None]
        if known:
            scores[group.prompt.id] = sum(known) / len(known)
    return scores


def panel_figures(
    groups: Sequence[Group],
    judgements: Sequence[Judgement] | None,
    greedy: Sequence[Group],
    greedy_judgements: Sequence[Judgement] | None,
    *,
    kl: float | None,
    temperature: float,
) -> dict[str, Any]:
    """The panel's figures under the names of `selfplay status --json`. A figure that could not be had is None. `num_unjudged`
    counts completions without a score, `parse_rate` is the share of the judge's verdicts that could be read.

    Lengths are tokens; entropy and kl are nats per token, estimated on completions sampled at `temperature` 1, and None at
    any other: the engine's logps are the policy's own, and no expectation under another distribution.
    """
    completions = [c for group in groups for c in group.completions]
    figures: dict[str, Any] = {
        "num_prompts": len(groups),
        "num_completions": len(completions),
        "on_topic": _on_topic_rate(groups),
        "mean_length": _mean([len(c.token_ids) for c in completions]),
        "truncated": _mean([c.finish_reason == "length" for c in completions]),
        "entropy": entropy(completions) if temperature == 1.0 else None,
        "kl": kl,
        "heldout_score": None,
        "heldout_interval": None,
        "heldout_greedy": None,
        "num_unjudged": None,
        "parse_rate": None,
        "greedy_num_unjudged": None,
        "greedy_parse_rate": None,
        "greedy_on_topic": _on_topic_rate(greedy),
        "greedy_mean_length": _mean([len(c.token_ids) for group in greedy for c in group.completions]),
        "per_prompt": {},
        "per_prompt_greedy": {},
    }
    if judgements is not None:
        scores = per_prompt_scores(groups, judgements)
        figures["per_prompt"] = scores
        counted = count_verdicts(judgements)
        figures |= {"num_unjudged": counted.num_unscored, "parse_rate": counted.parse_rate}
        if scores:
            figures["heldout_score"] = _mean(list(scores.values()))
            figures["heldout_interval"] = list(bootstrap_interval(list(scores.values())))
    if greedy_judgements is not None:
        counted = count_verdicts(greedy_judgements)
        figures |= {"greedy_num_unjudged": counted.num_unscored, "greedy_parse_rate": counted.parse_rate}
        figures["per_prompt_greedy"] = per_prompt_scores(greedy, greedy_judgements)
        figures["heldout_greedy"] = _mean(list(figures["per_prompt_greedy"].values()))
    return figures


def unjudged_share(panel: Mapping[str, Any], *, greedy: bool = False) -> float | None:
    """Of a panel's figures, the share of completions without a score, or of verdicts that could not be read, whichever is
    larger: how much of the panel its score says nothing about. None where nobody judged, or the panel is from before this
    was counted.
    """
    before = "greedy_" if greedy else ""
    missing = panel.get(f"{before}num_unjudged")
    count = panel["num_prompts"] if greedy else panel["num_completions"]  # one greedy completion a prompt
    if missing is None or not count:
        return None
    parse_rate = panel.get(f"{before}parse_rate")
    return max(float(missing / count), 0.0 if parse_rate is None else float(1 - parse_rate))


def entropy(completions: Sequence[Completion]) -> float | None:
    """Entropy of the policy in nats per token: -mean logp of tokens sampled at temperature 1, an unbiased estimate of the mean
    entropy of the visited next-token distributions. None where the engine gave no logps.
    """
    logps = [logp for c in completions for logp in c.logps]
    return -_require(_mean(logps)) if logps else None


def _on_topic_rate(groups: Sequence[Group]) -> float | None:
    found = [on_topic(group.prompt, c) for group in groups for c in group.completions]
    return _mean([f for f in found if f is not None])


def _mean(values: Sequence[float | bool]) -> float | None:
    return float(np.mean(values)) if values else None


def _require(value: float | None) -> float:
    assert value is not None
    return value
