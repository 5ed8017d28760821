"""Which completions may enter a pair, and the order in which pairs are drawn.

A completion enters a pair only where it ended by itself, is not empty, and differs from the other one. A completion
without a verdict never enters a scored pair.
"""

from dataclasses import dataclass
from typing import Literal

from selfplay.types import Completion, Group, Judgement, derive_seed

Truncated = Literal["drop", "rejected"]


def unusable_reason(group: Group, index: int, judgement: Judgement | None) -> str | None:
    """Why completion `index` may not enter a pair; None where it may. Of equal texts the lowest-scored one may."""
    completion = group.completions[index]
    scores = judgement.scores if judgement is not None else (0.0,) * len(group.completions)
    reason = _own_reason(completion, scores[index])
    if reason is not None:
        return reason
    if judgement is None and group.gold is not None:
        if not group.gold.text.strip():
            return "empty gold answer"
        if completion.text == group.gold.text.strip():
            return "equal to gold"
    twins = [i for i, c in enumerate(group.completions) if c.text == completion.text and not _own_reason(c, scores[i])]
    return None if min(twins, key=lambda i: (scores[i] or 0.0, i)) == index else "equal to another"


def _own_reason(completion: Completion, score: float | None) -> str | None:
    if completion.finish_reason == "length":
        return "truncated"
    if not completion.text:
        return "empty"
    return "no verdict" if score is None else None


def usable(group: Group, judgement: Judgement | None) -> list[int]:
    """Indices of the completions that may enter a pair."""
    return [i for i in range(len(group.completions)) if unusable_reason(group, i, judgement) is None]


def cut_short(group: Group) -> list[int]:
    """Indices of the completions that max_tokens cut and that hold any text."""
    return [i for i, c in enumerate(group.completions) if c.finish_reason == "length" and c.text]


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores by index of what may be chosen and of what may be rejected."""

    chosen: dict[int, float]
    rejected: dict[int, float]


def scored(group: Group, judgement: Judgement | None, *, truncated: Truncated) -> Scored:
    """What a selector of scores may pair; with `truncated="rejected"` truncated completions may be rejected."""
    assert judgement is not None, "the recipe guarantees a judge"
    found = {i: score for i, score in enumerate(judgement.scores) if score is not None}
    chosen = {i: found[i] for i in usable(group, judgement) if i in found}
    cut = cut_short(group) if truncated == "rejected" else []
    return Scored(chosen, chosen | {i: found[i] for i in cut if i in found})


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
