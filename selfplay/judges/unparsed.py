"""How many verdicts were asked for, and how many of them could not be read.

A completion may have a score although most verdicts on it could not be read: one comparison of three, or one draw of
several, is enough for one. So verdicts are counted, and not completions alone.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from selfplay.types import Judgement

NO_REASON = "no reason given"


@dataclass(frozen=True, slots=True)
class Counted:
    """Verdicts and completions of some judgements, and how many of each are missing."""

    num_asked: int
    num_unparsed: int
    num_completions: int
    num_unscored: int

    @property
    def unparsed_share(self) -> float:
        """The share of verdicts that could not be read, in [0, 1]; 0 where none was asked for."""
        return self.num_unparsed / self.num_asked if self.num_asked else 0.0

    @property
    def unscored_share(self) -> float:
        """The share of completions without a score, in [0, 1]; 0 where there are none."""
        return self.num_unscored / self.num_completions if self.num_completions else 0.0

    @property
    def parse_rate(self) -> float | None:
        """The share of verdicts that could be read; None where none was asked for."""
        return 1 - self.unparsed_share if self.num_asked else None

    @property
    def scored_rate(self) -> float | None:
        """The share of completions with a score; None where there are none."""
        return 1 - self.unscored_share if self.num_completions else None

    def exceeds(self, bound: float) -> bool:
        """Whether too many verdicts, or too many scores, are missing."""
        return self.unparsed_share > bound or self.unscored_share > bound


def num_asked(judgement: Judgement) -> int:
    """How many verdicts the scores come from. Where the judge doesn't say they are the `verdicts`, if there are any, else one
    for each completion.
    """
    if judgement.num_asked is not None:
        return judgement.num_asked
    return sum(map(len, judgement.verdicts)) if judgement.verdicts else len(judgement.scores)


def unparsed(judgement: Judgement) -> Counter[str]:
    """The verdicts that could not be read, by reason."""
    if judgement.num_asked is not None:
        return Counter(judgement.unparsed)
    if judgement.verdicts:
        return Counter(NO_REASON for row in judgement.verdicts for value in row if value is None)
    return unscored(judgement)


def unscored(judgement: Judgement) -> Counter[str]:
    """The completions without a score, by reason: the first line of the note. Lines after it differ from row to row."""
    notes = (*judgement.notes, *[""] * (len(judgement.scores) - len(judgement.notes)))
    missing = (note for score, note in zip(judgement.scores, notes, strict=False) if score is None)
    return Counter(first_line(note) for note in missing)


def first_line(note: str) -> str:
    return (note.splitlines() or [NO_REASON])[0]


def count_verdicts(judgements: Iterable[Judgement]) -> Counted:
    """The counts of some judgements, one at a time: there may be too many to hold."""
    asked = missing = completions = without = 0
    for judgement in judgements:
        asked += num_asked(judgement)
        missing += unparsed(judgement).total()
        completions += len(judgement.scores)
        without += sum(score is None for score in judgement.scores)
    return Counted(asked, missing, completions, without)
