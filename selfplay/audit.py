"""Is the judge to be trusted? Figures of one round's judging, from its groups, judgements and pairs.

A judge rots quietly: it says the same of everything, follows the place or the length of a completion, or isn't understood.
Each figure names one of these, and where one is far out an alarm says so. Alarms stop nothing: `max_unparsed` does that.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np

from selfplay.agreement import kendall, sign_counts
from selfplay.canaries import CanaryVerdict, canary_alarms, canary_figures
from selfplay.self_agreement import repeated, self_agreement, self_reliability
from selfplay.types import Group, Judgement, PreferencePair

# An unbiased judge's pairs have the longer completion as chosen in 50 %; judges known to follow length, in 65 to 80 %.
MAX_CHOSEN_LONGER = 0.7
# Of four completions with this share at the top, one prompt in eight has all four there and gives no pair, and among the
# others the judge no longer tells the good from the better.
MAX_CEILING = 0.6
# Verdicts drawn by a coin agree with their swap in half of the comparisons.
MIN_SWAP_CONSISTENCY = 0.5
# Below one half more than half of the variance of a prompt's scores is the judge's own noise.
MIN_SELF_RELIABILITY = 0.5
MIN_COUNT = 20  # scores, pairs, comparisons or repeated questions below which a share says too little for an alarm
MAX_VALUES = 12  # distinct scores that a histogram shows one by one
NUM_BINS = 10
NUM_AT_ONCE = 10_000


def audit(
    groups: Sequence[Group],
    judgements: Sequence[Judgement] | None,
    pairs: Sequence[PreferencePair],
    canaries: Sequence[CanaryVerdict] = (),
) -> dict[str, Any]:
    """The figures, under the names of `selfplay status --json`; None where there is nothing to count.

    `parse_rate` is the share of completions with a verdict; `tie_rate` that of the pairs of completions of one prompt with
    equal scores; `swap_consistency` that of a pairwise judge's comparisons whose two orders don't contradict each other;
    `ceiling_share` that of scores equal to the round's highest. `length_correlation` is Kendall's tau-b of score and length
    in tokens within prompts. `chosen_longer` is the share of pairs whose chosen completion has more tokens, an equal number
    counting half. `histogram` has rows [low, high, count]. `self_agreement` and `self_reliability` are of the `num_repeated`
    questions that were asked several times (self_agreement.py), `canaries` and `canary_loss_rate` of canaries.py.
    """
    shown = judgements or ()
    num_scores = num_asked = num_highest = num_repeated = compared = flipped = 0
    highest: float | None = None
    with_itself, with_length = sign_counts([], []), sign_counts([], [])
    # a prompt at a time: groups and judgements may be too many to hold
    for group, judgement in zip(groups if shown else (), shown, strict=True):
        row = judgement.scores
        num_asked += len(row)
        for score in (score for score in row if score is not None):
            num_scores += 1
            if highest is None or score > highest:
                highest, num_highest = score, 0
            num_highest += score == highest
        with_itself += sign_counts([row], [row])
        with_length += sign_counts([row], [[float(len(c.token_ids)) for c in group.completions]])
        compared += judgement.num_compared
        flipped += judgement.num_flipped
        num_repeated += sum(map(len, repeated([judgement])))
    asked_again = shown if num_repeated else ()
    figures: dict[str, Any] = {
        "num_scores": num_scores,
        "num_compared": compared,
        "parse_rate": num_scores / num_asked if num_asked else None,
        "tie_rate": float(with_itself[1, 1] / with_itself.sum()) if with_itself.sum() else None,
        "swap_consistency": 1 - flipped / compared if compared else None,
        "ceiling": highest,
        "ceiling_share": num_highest / num_scores if num_scores else None,
        "length_correlation": kendall(with_length),
        "chosen_longer": chosen_longer(pairs),
        "num_repeated": num_repeated,
        "self_agreement": self_agreement(repeated(asked_again)),
        "self_reliability": self_reliability(repeated(asked_again)),
        "histogram": histogram(lambda: (s for judgement in shown for s in judgement.scores if s is not None)),
        **canary_figures(canaries),
    }
    return figures | {"alarms": alarms(figures, num_pairs=len(pairs))}


def chosen_longer(pairs: Sequence[PreferencePair]) -> float | None:
    """The share of pairs whose chosen completion has more tokens than the rejected one; an equal number counts half."""
    gaps = (len(pair.chosen_token_ids) - len(pair.rejected_token_ids) for pair in pairs)
    return sum((gap > 0) + 0.5 * (gap == 0) for gap in gaps) / len(pairs) if pairs else None


def histogram(scores: Callable[[], Iterable[float]]) -> list[list[float]]:
    """Rows [low, high, count]: one per score where they are few, else bins of equal width. `scores` gives them anew for each
    pass: there may be too many to hold.
    """
    values: Counter[float] = Counter()
    low, high = math.inf, -math.inf
    for score in scores():
        if len(values) <= MAX_VALUES:
            values[score] += 1
        low, high = min(low, score), max(high, score)
    if len(values) <= MAX_VALUES:
        return [[value, value, values[value]] for value in sorted(values)]
    counts, edges, rest = np.zeros(NUM_BINS, np.int64), np.empty(0), iter(scores())
    while some := list(islice(rest, NUM_AT_ONCE)):
        found, edges = np.histogram(some, NUM_BINS, (low, high))
        counts += found
    return [[float(low), float(high), int(n)] for low, high, n in zip(edges[:-1], edges[1:], counts, strict=True)]


def alarms(figures: dict[str, Any], *, num_pairs: int) -> list[str]:
    """What is far out, one sentence each."""
    found = []
    longer, ceiling, swap = figures["chosen_longer"], figures["ceiling_share"], figures["swap_consistency"]
    if num_pairs >= MIN_COUNT and longer > MAX_CHOSEN_LONGER:
        found.append(
            f"the chosen completion is the longer one in {longer:.0%} of the pairs (alarm above {MAX_CHOSEN_LONGER:.0%}): "
            "training will teach length"
        )
    if figures["num_scores"] >= MIN_COUNT and ceiling > MAX_CEILING:
        found.append(
            f"{ceiling:.0%} of the scores are the highest one, {figures['ceiling']:g} (alarm above {MAX_CEILING:.0%}): "
            "the judge hardly tells completions apart"
        )
    if figures["num_compared"] >= MIN_COUNT and swap < MIN_SWAP_CONSISTENCY:
        found.append(
            f"only {swap:.0%} of the comparisons agree with their swap (alarm below {MIN_SWAP_CONSISTENCY:.0%}): "
            "the judge follows the place of a completion"
        )
    reliability = figures["self_reliability"]
    if figures["num_repeated"] >= MIN_COUNT and reliability is not None and reliability < MIN_SELF_RELIABILITY:
        found.append(
            f"verdicts on one question differ so much that {1 - reliability:.0%} of the variance of a prompt's scores is noise "
            f"(alarm above {1 - MIN_SELF_RELIABILITY:.0%}): ask for more verdicts, or at a lower temperature"
        )
    return [*found, *canary_alarms(figures["canaries"])]
