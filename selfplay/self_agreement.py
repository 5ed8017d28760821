"""How far a judge agrees with itself, from the verdicts that it gave on one question where it was asked several times."""

import math
from collections.abc import Iterable, Iterator
from itertools import combinations

from selfplay.types import Judgement

Rows = list[list[float]]  # per question the verdicts that could be read


def repeated(judgements: Iterable[Judgement]) -> Iterator[Rows]:
    """Per prompt that has any, the questions with two verdicts or more that could be read."""
    rows = ([[v for v in row if v is not None] for row in judgement.verdicts] for judgement in judgements)
    return (found for prompt in rows if (found := [row for row in prompt if len(row) > 1]))


def self_agreement(prompts: Iterable[Rows]) -> float | None:
    """The share of pairs of verdicts on one question that are equal, a mean over questions. None without such a pair."""
    total, num_questions = 0.0, 0
    for row in (row for prompt in prompts for row in prompt):
        equal = [a == b for a, b in combinations(row, 2)]
        total += sum(equal) / len(equal)
        num_questions += 1
    return total / num_questions if num_questions else None


def self_reliability(prompts: Iterable[Rows]) -> float | None:
    """1 - MSW / MSB, in [0, 1]: the share of the variance of mean verdicts that is not the judge's own noise; ICC(1, k) of
    Shrout and Fleiss, 1979. MSW is the mean square of verdicts around their question's mean; MSB that of questions around their
    prompt's, for only completions of one prompt are ever compared. None where either has no degrees of freedom, or all
    verdicts are equal.
    """
    within = between = 0.0
    free_within = free_between = 0
    for rows in prompts:
        if not rows:
            continue
        middle = math.fsum(v for row in rows for v in row) / sum(map(len, rows))
        for row in rows:
            mean = math.fsum(row) / len(row)
            within += math.fsum((v - mean) ** 2 for v in row)
            between += len(row) * (mean - middle) ** 2
            free_within += len(row) - 1
        free_between += len(rows) - 1
    if not free_within or not free_between or within + between == 0:
        return None
    return max(0.0, 1 - (within / free_within) / (between / free_between)) if between else 0.0
