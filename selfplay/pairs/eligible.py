"""Which completions may enter a pair, and the order in which pairs are drawn.

A completion enters a pair only where it is not empty, differs from the other one and, unless the recipe's `pairs.truncated`
says otherwise, ended by itself. A completion without a verdict never enters a scored pair.
"""

from typing import Literal

from selfplay.types import Completion, Group, Judgement, derive_seed

Truncated = Literal["drop", "judged"]  # of completions that max_tokens cut: they enter no pair, or as they are scored


def unusable_reason(
    group: Group, index: int, judgement: Judgement | None, *, keep_truncated: bool = False
) -> str | None:
    """Why completion `index` may not enter a pair; None where it may. Of equal texts one may, drawn by a hash: to take the
    lowest-scored or the highest-scored would teach something about texts that repeat even with a judge that knows nothing.
    """
    completion = group.completions[index]
    scores = judgement.scores if judgement is not None else (0.0,) * len(group.completions)
    reason = _own_reason(completion, scores[index], keep_truncated)
    if reason is not None:
        return reason
    if judgement is None and group.gold is not None:
        if not group.gold.text.strip():
            return "empty gold answer"
        if completion.text == group.gold.text.strip():
            return "equal to gold"
    twins = [
        i
        for i, c in enumerate(group.completions)
        if c.text == completion.text and not _own_reason(c, scores[i], keep_truncated)
    ]
    drawn = min(twins, key=lambda i: (derive_seed(group.prompt.id, str(scores[i])), group.completions[i].token_ids, i))
    return None if drawn == index else "equal to another"


def _own_reason(completion: Completion, score: float | None, keep_truncated: bool) -> str | None:
    if completion.finish_reason == "length" and not keep_truncated:
        return "truncated"
    if not completion.text:
        return "empty"
    return "no verdict" if score is None else None


def usable(group: Group, judgement: Judgement | None, *, keep_truncated: bool = False) -> list[int]:
    """Indices of the completions that may enter a pair."""
    reasons = (
        unusable_reason(group, i, judgement, keep_truncated=keep_truncated) for i in range(len(group.completions))
    )
    return [i for i, reason in enumerate(reasons) if reason is None]


def reaches(value: float, bound: float) -> bool:
    """Whether a margin or a score is at least `bound`, up to what floats lose: 1.0 - 0.8 reaches 0.2."""
    return value >= bound - 1e-9 * max(1.0, abs(bound))


def scored(group: Group, judgement: Judgement | None, *, truncated: Truncated) -> dict[int, float]:
    """Scores by index of the completions that a selector of scores may pair. `judged` takes a truncated completion as the
    judge scored it, chosen or rejected. To reject it whatever the judge says would teach shortness even with a judge that
    knows nothing: a coin's pairs would no longer cancel.
    """
    assert judgement is not None, "the recipe guarantees a judge"
    indices = usable(group, judgement, keep_truncated=truncated == "judged")
    return {i: score for i in indices if (score := judgement.scores[i]) is not None}


class Draw:
    """An order of a group's completions and pairs as if at random: a hash of the seed, the prompt and what the completions
    are, so that neither their order nor other prompts play a part. None is the gold answer.
    """

    def __init__(self, seed: int, group: Group) -> None:
        marks = [derive_seed(seed, group.prompt.id, c.text, *c.token_ids) for c in group.completions]
        self._marks: dict[int | None, int] = {None: derive_seed(seed, group.prompt.id, "gold")}
        self._marks.update(enumerate(marks))

    def place(self, *indices: int | None) -> int:
        """Where these stand in the order; smaller is first."""
        return derive_seed(*(self._marks[index] for index in indices))
