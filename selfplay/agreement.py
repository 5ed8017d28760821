"""How far two judges agree, and how sure a share is. Only pairs of completions of one prompt are compared: scores of
different prompts need not share a scale. A pair without both verdicts is left out; equal scores are a tie.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from selfplay.errors import DataError
from selfplay.types import Judgement

Scores = Sequence[float | None]
Counts = np.ndarray[Any, np.dtype[np.int64]]
Z = 1.959964  # two-sided 95 % of a normal distribution


def sign_counts(one: Sequence[Scores], other: Sequence[Scores]) -> Counts:
    """counts[i, j]: the ordered pairs of completions that `one` puts into class i and `other` into class j; 0 is worse, 1 a
    tie, 2 better. Each pair is counted both ways round, so the order of completions makes no difference.
    """
    counts = np.zeros((3, 3), dtype=np.int64)
    for a, b in zip(one, other, strict=True):
        both = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
        if len(both) < 2:
            continue
        values = np.array(both, dtype=np.float64)
        signs = np.sign(values[:, None, :] - values[None, :, :]).astype(np.int64) + 1
        off = ~np.eye(len(both), dtype=bool)
        np.add.at(counts, (signs[off][:, 0], signs[off][:, 1]), 1)
    return counts


def agreement(counts: Counts) -> float | None:
    """The share of pairs on which both say the same: better, worse or tie. None without pairs."""
    total = counts.sum()
    return float(np.trace(counts) / total) if total else None


def kappa(counts: Counts) -> float | None:
    """Cohen's kappa of the three classes: agreement beyond that of two judges who guess in their own proportions. 1 is full
    agreement, 0 is chance; None where chance alone would agree always.
    """
    total = counts.sum()
    if not total:
        return None
    by_chance = float((counts.sum(0) / total) @ (counts.sum(1) / total))
    return None if by_chance == 1 else float((np.trace(counts) / total - by_chance) / (1 - by_chance))


def kendall(counts: Counts) -> float | None:
    """Kendall's tau-b over the pairs: (concordant - discordant) / sqrt(pairs untied in one * untied in the other), in [-1, 1].
    None where one of them is all ties.
    """
    concordant = counts[0, 0] + counts[2, 2]
    discordant = counts[0, 2] + counts[2, 0]
    untied = math.sqrt(float(counts[[0, 2]].sum()) * float(counts[:, [0, 2]].sum()))
    return float(concordant - discordant) / untied if untied else None


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank, in [-1, 1]. None where either is constant."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (one, other)]
    centred = [r - r.mean() if len(r) else r for r in ranks]
    spread = math.sqrt(float(centred[0] @ centred[0]) * float(centred[1] @ centred[1]))
    return float(centred[0] @ centred[1]) / spread if spread else None


def _ranks(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: np.ndarray[Any, np.dtype[np.float64]] = (last - (counts - 1) / 2)[inverse]
    return ranks


def wilson_interval(successes: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, in [0, 1]; right for small counts and shares near 0 and 1. Trials are taken as
    independent; a half success, for a tie, makes the interval too wide if anything.
    """
    if not count:
        return 0.0, 1.0
    share = successes / count
    middle = share + Z**2 / (2 * count)
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    scale = 1 + Z**2 / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def compare_judges(one: Sequence[Judgement], other: Sequence[Judgement], *, limit: int = 10) -> dict[str, Any]:
    """Agreement of two judges on the prompts of which both judged the same completions, and the `limit` pairs on which they
    differ most.

    `num_other_completions` is how many prompts both judged, but not the same completions of: those are left out.
    `num_unknown` is how many are compared though a judgement from before digests were kept doesn't say of which completions
    it is. `kendall` is within prompts, `spearman` over all completions. A gap is between the differences of two scores, each
    as a share of its judge's range, in [0, 2]. DataError: a prompt judged twice, or no prompt left of those that both judged.
    """
    a, b = _by_prompt(one, "first"), _by_prompt(other, "second")
    both_judged = [id for id in a if id in b]
    same = {id: _same_completions(a[id], b[id]) for id in both_judged}
    ids = [id for id in both_judged if same[id] is not False]
    if both_judged and not ids:
        raise DataError(
            f"both judged {len(both_judged)} prompts, but of none the same completions: compare judgements of the same groups, "
            "of one round or one panel"
        )
    scores_a, scores_b = [a[id].scores for id in ids], [b[id].scores for id in ids]
    flat = [(x, y) for p, q in zip(scores_a, scores_b, strict=True) for x, y in zip(p, q, strict=True)]
    both = [(x, y) for x, y in flat if x is not None and y is not None]
    counts = sign_counts(scores_a, scores_b)
    return {
        "num_prompts": len(ids),
        "num_prompts_of_one": len(a) + len(b) - 2 * len(both_judged),
        "num_other_completions": len(both_judged) - len(ids),
        "num_unknown": sum(same[id] is None for id in ids),
        "num_completions": len(flat),
        "num_without_verdict": len(flat) - len(both),
        "num_pairs": int(counts.sum()) // 2,
        "agreement": agreement(counts),
        "kappa": kappa(counts),
        "spearman": spearman([x for x, _ in both], [y for _, y in both]),
        "kendall": kendall(counts),
        "disagreements": _disagreements(ids, scores_a, scores_b)[:limit],
    }


def _same_completions(one: Judgement, other: Judgement) -> bool | None:
    """Whether two judgements are of the same completions; None where that is not known."""
    if len(one.scores) != len(other.scores):
        return False
    if not one.completions_digest or not other.completions_digest:
        return None
    return one.completions_digest == other.completions_digest


def _by_prompt(judgements: Sequence[Judgement], which: str) -> dict[str, Judgement]:
    found = {judgement.prompt_id: judgement for judgement in judgements}
    if len(found) < len(judgements):
        raise DataError(f"the {which} judgements hold a prompt twice; compare one round, or one panel, at a time")
    return found


def _disagreements(ids: Sequence[str], one: Sequence[Scores], other: Sequence[Scores]) -> list[dict[str, Any]]:
    """The pairs on which two judges differ, largest gap first."""
    ranges = [_range(scores) for scores in (one, other)]
    found = []
    for id, a, b in zip(ids, one, other, strict=True):
        known = [k for k in range(len(a)) if a[k] is not None and b[k] is not None]
        for i, j in ((i, j) for n, i in enumerate(known) for j in known[n + 1 :]):
            steps = [(row[i] or 0.0) - (row[j] or 0.0) for row in (a, b)]
            if np.sign(steps[0]) != np.sign(steps[1]):
                gap = abs(steps[0] / (ranges[0] or 1.0) - steps[1] / (ranges[1] or 1.0))
                found.append({"prompt_id": id, "completions": [i, j], "a": [a[i], a[j]], "b": [b[i], b[j]], "gap": gap})
    return sorted(found, key=lambda row: (-row["gap"], row["prompt_id"], row["completions"]))


def _range(scores: Sequence[Scores]) -> float:
    known = [score for row in scores for score in row if score is not None]
    return max(known) - min(known) if known else 0.0
