"""Is the judge to be trusted? Figures of one round's judging, from its groups, judgements and pairs.

A judge rots quietly: it says the same of everything, follows the place or the length of a completion, or isn't understood.
Each figure names one of these, and where one is far out an alarm says so. Alarms stop nothing: `max_unparsed` does that.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np

from selfplay.agreement import kendall, sign_counts
from selfplay.canaries import CanaryVerdict, canary_alarms, canary_figures
from selfplay.judges.unparsed import Counted, count_verdicts, num_asked, unparsed
from selfplay.labelled import labelled_alarms
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


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of a round's judge beside its judgements: its verdicts on canaries, its figures on the labelled pairs
    that audit.calibration names, and, of several judges, the judgements of each by name.
    """

    canaries: Sequence[CanaryVerdict] = ()
    labelled: Mapping[str, Any] | None = None
    members: Mapping[str, Sequence[Judgement]] = field(default_factory=dict)


NO_EVIDENCE = Evidence()


def audit(
    groups: Sequence[Group],
    judgements: Sequence[Judgement] | None,
    pairs: Sequence[PreferencePair],
    evidence: Evidence = NO_EVIDENCE,
) -> dict[str, Any]:
    """The figures, under the names of `selfplay status --json`; None where there is nothing to count.

    `parse_rate` is the share of the `num_asked` verdicts that could be read, `scored_rate` that of completions with a score
    (judges/unparsed.py); `tie_rate` that of the pairs of completions of one prompt with equal scores; `swap_consistency` that
    of a pairwise judge's comparisons whose two orders don't contradict each other; `ceiling_share` that of scores equal to the
    round's highest. `length_correlation` is Kendall's tau-b of score and length in tokens within prompts. `chosen_longer` is
    the share of pairs whose chosen completion has more tokens, an equal number counting half. `histogram` has rows [low, high,
    count]. `self_agreement` and `self_reliability` are of the `num_repeated` questions that were asked several times
    (self_agreement.py), `canaries` and `canary_loss_rate` of canaries.py, `labelled`
    of labelled.py. Of several judges `members` has the figures of each, and the three of repeated questions are those of all
    their questions; their reliability, which knows scales, is the lowest.
    """
    shown = judgements or ()
    num_scores = num_highest = num_repeated = compared = flipped = asked = missing = num_completions = 0
    highest: float | None = None
    with_itself, with_length = sign_counts([], []), sign_counts([], [])
    # a prompt at a time: groups and judgements may be too many to hold
    for group, judgement in zip(groups if shown else (), shown, strict=True):
        row = judgement.scores
        num_completions += len(row)
        asked += num_asked(judgement)
        missing += unparsed(judgement).total()
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
    counted = Counted(asked, missing, num_completions, num_completions - num_scores)
    members = {name: _of_member(own) for name, own in evidence.members.items()}
    figures: dict[str, Any] = {
        "num_scores": num_scores,
        "num_compared": compared,
        "num_asked": asked,
        "parse_rate": counted.parse_rate,
        "scored_rate": counted.scored_rate,
        "tie_rate": float(with_itself[1, 1] / with_itself.sum()) if with_itself.sum() else None,
        "swap_consistency": 1 - flipped / compared if compared else None,
        "ceiling": highest,
        "ceiling_share": num_highest / num_scores if num_scores else None,
        "length_correlation": kendall(with_length),
        "chosen_longer": chosen_longer(pairs),
        **(_of_all(evidence.members, members) if members else _of_repeated(shown, num_repeated)),
        "histogram": histogram(lambda: (s for judgement in shown for s in judgement.scores if s is not None)),
        **canary_figures(evidence.canaries),
        "labelled": None if evidence.labelled is None else dict(evidence.labelled),
    }
    figures |= {"members": members} if members else {}
    return figures | {"alarms": alarms(figures, num_pairs=len(pairs))}


def _of_repeated(judgements: Sequence[Judgement], num_repeated: int) -> dict[str, Any]:
    asked_again = judgements if num_repeated else ()
    return {
        "num_repeated": num_repeated,
        "self_agreement": self_agreement(repeated(asked_again)),
        "self_reliability": self_reliability(repeated(asked_again)),
    }


def _of_member(judgements: Sequence[Judgement]) -> dict[str, Any]:
    counted, num_repeated = count_verdicts(judgements), sum(map(len, repeated(judgements)))
    rates = {"num_asked": counted.num_asked, "parse_rate": counted.parse_rate, "scored_rate": counted.scored_rate}
    return rates | _of_repeated(judgements, num_repeated)


def _of_all(members: Mapping[str, Sequence[Judgement]], figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the members' figures of repeated questions say together."""
    known = [own["self_reliability"] for own in figures.values() if own["self_reliability"] is not None]
    return {
        "num_repeated": sum(own["num_repeated"] for own in figures.values()),
        # equal is equal on any scale
        "self_agreement": self_agreement(chain.from_iterable(repeated(own) for own in members.values())),
        "self_reliability": min(known, default=None),
    }


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
    for name, own in figures.get("members", {"": figures}).items():
        found += _noise_alarm(own, f"{name}: " if name else "")
    return [*found, *canary_alarms(figures["canaries"]), *labelled_alarms(figures["labelled"])]


def _noise_alarm(figures: Mapping[str, Any], whose: str) -> list[str]:
    reliability = figures["self_reliability"]
    if figures["num_repeated"] < MIN_COUNT or reliability is None or reliability >= MIN_SELF_RELIABILITY:
        return []
    return [
        f"{whose}verdicts on one question differ so much that {1 - reliability:.0%} of the variance of a prompt's scores is "
        f"noise (alarm above {1 - MIN_SELF_RELIABILITY:.0%}): ask for more verdicts, or at a lower temperature"
    ]
