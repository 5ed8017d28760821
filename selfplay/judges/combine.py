"""Several judges of the same completions, and one score of theirs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from selfplay.judges.unparsed import num_asked, unparsed
from selfplay.protocols import Judge, JudgeContext
from selfplay.types import Group, Judgement

Scores = Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Member:
    """One of several judges, under the name that notes give it."""

    name: str
    judge: Judge
    weight: float = 1.0


class Combine:
    """The weighted mean sum_j w_j s_j / sum_j w_j of the members' scores of a completion, or the smallest of them.

    Before, `normalize` makes scores of different scales comparable, within a group and over the completions that every member
    scored: z_score, (s - mean) / standard deviation (of the population; 0 where all are equal); rank, the share of the other
    completions with a lower score, an equal one counting half (1/2 for a completion alone); none leaves them.

    Where any member has no verdict there is none, with that member's reason. Notes show every member's own score.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        how: Literal["weighted_mean", "min"],
        normalize: Literal["none", "z_score", "rank"],
    ) -> None:
        self.members = tuple(members)
        self.how = how
        self.normalize = normalize

    @property
    def identity(self) -> str:
        """How scores are combined, and each member's weight and identity."""
        members = "; ".join(f"{member.weight:g} x {member.judge.identity}" for member in self.members)
        return f"combine:{self.how} {self.normalize} [{members}]"

    def judge(self, groups: Sequence[Group], context: JudgeContext) -> list[Judgement]:
        """One judgement per group, every member asked in turn."""
        return self.combined([list(member.judge.judge(groups, context)) for member in self.members])

    def combined(self, found: Sequence[Sequence[Judgement]]) -> list[Judgement]:
        """One judgement per group from those of each member, which are in the groups' order."""
        return [self._combine(judgements) for judgements in zip(*found, strict=True)]

    def _combine(self, judgements: Sequence[Judgement]) -> Judgement:
        rows = [judgement.scores for judgement in judgements]
        known = [i for i in range(len(rows[0])) if all(row[i] is not None for row in rows)]
        scores: list[float | None] = [None] * len(rows[0])
        columns = [_normalized([_known(row[i]) for i in known], self.normalize) for row in rows]
        for place, i in enumerate(known):
            scores[i] = self._one([column[place] for column in columns])
        return Judgement(
            judgements[0].prompt_id,
            tuple(scores),
            tuple(self._note(judgements, i) for i in range(len(scores))),
            num_compared=sum(judgement.num_compared for judgement in judgements),
            num_flipped=sum(judgement.num_flipped for judgement in judgements),
            num_asked=sum(map(num_asked, judgements)),
            unparsed=self._unparsed(judgements),
        )

    def _unparsed(self, judgements: Sequence[Judgement]) -> dict[str, int]:
        """The verdicts of each member that could not be read, by its name and the reason."""
        return {
            f"{member.name}: {reason}": count
            for member, judgement in zip(self.members, judgements, strict=True)
            for reason, count in unparsed(judgement).items()
        }

    def _one(self, scores: Sequence[float]) -> float:
        if self.how == "min":
            return min(scores)
        weights = [member.weight for member in self.members]
        return math.fsum(w * s for w, s in zip(weights, scores, strict=True)) / math.fsum(weights)

    def _note(self, judgements: Sequence[Judgement], i: int) -> str:
        """The first line is the reason where there is no verdict: reasons are counted by first lines."""
        shown, missing = [], ""
        for member, judgement in zip(self.members, judgements, strict=True):
            score, note = judgement.scores[i], judgement.notes[i] if i < len(judgement.notes) else ""
            shown.append(f"{member.name}: {'no verdict' if score is None else f'{score:.6g}'}{note and f' ({note})'}")
            if score is None and not missing:
                missing = f"no verdict of {member.name}: {(note.splitlines() or ['no reason given'])[0]}"
        return "\n".join([missing, *shown] if missing else shown)


def _known(score: float | None) -> float:
    assert score is not None
    return score


def _normalized(scores: Sequence[float], how: str) -> list[float]:
    if how == "none" or not scores:
        return list(scores)
    if how == "rank":
        others = len(scores) - 1
        beaten = [sum((s > t) + 0.5 * (s == t) for t in scores) - 0.5 for s in scores]
        return [wins / others if others else 0.5 for wins in beaten]
    # equal scores first: rounding would give them a tiny deviation, and with it scores far from 0
    if min(scores) == max(scores):
        return [0.0] * len(scores)
    mean = math.fsum(scores) / len(scores)
    deviation = math.sqrt(math.fsum((s - mean) ** 2 for s in scores) / len(scores))
    return [(s - mean) / deviation for s in scores]


class Combined:
    """A combination whose members have judged already, each over all groups of a stage."""

    def __init__(self, combine: Combine, found: Sequence[Sequence[Judgement]]) -> None:
        self.combine, self._found, self._next = combine, found, 0

    @property
    def identity(self) -> str:
        return self.combine.identity

    def judge(self, groups: Sequence[Group], context: JudgeContext) -> list[Judgement]:
        """One judgement per group; asks nobody. The groups are neighbours in the stage."""
        first, ids = self._found[0], [group.prompt.id for group in groups]
        # a stage asks in its order, so they come next, or behind those that are combined already
        places = chain(range(self._next, len(first)), range(self._next))
        place = next(place for place in places if first[place].prompt_id == ids[0])
        self._next = place + len(ids)
        found = [judgements[place : self._next] for judgements in self._found]
        assert all([judgement.prompt_id for judgement in own] == ids for own in found)
        return self.combine.combined(found)
