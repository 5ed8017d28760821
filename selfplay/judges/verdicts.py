"""How a verdict is read from what a judge model wrote: one marked line, with a number or one of a few words.

A line that is missing, unclear, out of range, said twice or cut gives no verdict: None with the reason, never a number.
"""

import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field, model_validator

from selfplay.recipe_values import Section

# Counts changes to how verdicts are read; part of a judge's identity, so that old judgements aren't reused silently.
PARSER_VERSION = 1
EXCERPT = 100  # characters of an unreadable verdict that a note quotes

_NUMBER = re.compile(
    r"(?P<n>[+-]?[0-9]+(?:\.[0-9]+)?)(?:\s*(?:/|out of)\s*(?P<of>[0-9]+))?(?:\s*points?)?", re.IGNORECASE
)
_MARKUP = str.maketrans("", "", "*_`")
_BULLET = " \t>#-"
_AROUND = " \t[]()<>{}\"'"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was read from a judge's text: a score, or None and the reason. The reason's first line is the same for the
    same kind of fault; an excerpt may follow on the second. `drawn` are the verdicts that it is the mean of, where there
    were several, and `missing` says of each of these that could not be read why.
    """

    score: float | None
    note: str = ""
    drawn: tuple[float | None, ...] = ()
    missing: tuple[str, ...] = ()


class VerdictLine(Section):
    """The line that holds the verdict, written with `place` where the verdict stands."""

    place: ClassVar[str]
    line: str

    @model_validator(mode="after")
    def _has_a_place(self) -> "VerdictLine":
        before, found, after = self.line.partition(self.place)
        example = f'like "Score: {self.place}"'
        if not found or self.place in after:
            raise ValueError(f"write `line` with {self.place} once, where the verdict stands, {example}")
        if not before.translate(_MARKUP).strip(_BULLET + _AROUND):
            raise ValueError(f"`line` needs a word before {self.place}, {example}, else anything would be a verdict")
        return self

    @abstractmethod
    def value(self, inside: str) -> Verdict:
        """The verdict in what stands in the line's place."""

    def read(self, text: str, *, cut: bool = False) -> Verdict:
        """The one verdict in a judge's text: that of its last verdict line.

        None where there is no such line, the line can't be read, an earlier line says something else, or max_tokens cut
        the text (`cut`) right behind the verdict. Never raises.
        """
        found = [inside for line in text.splitlines() if (inside := self._inside(line)) is not None]
        if not found:
            return Verdict(None, _unread("the text is empty" if not text.strip() else f'no line "{self.line}"', text))
        last = self.value(found[-1])
        if last.score is None:
            return Verdict(None, _unread(last.note, found[-1]))
        if any(self.value(inside).score not in (None, last.score) for inside in found[:-1]):
            return Verdict(None, _unread("verdicts that differ", " | ".join(found)))
        if cut and self._inside(text.splitlines()[-1]) is not None:
            return Verdict(None, _unread("max_tokens cut the verdict", found[-1]))
        return last

    def _inside(self, line: str) -> str | None:
        """What stands in the verdict's place; None where this is no verdict line."""
        before, _, after = self.line.translate(_MARKUP).lstrip(_BULLET).partition(self.place)
        plain = " ".join(line.translate(_MARKUP).lstrip(_BULLET).split())
        head = r"\s*".join(re.escape(word) for word in re.findall(r"\w+|[^\w\s]", before))
        match = re.match(head, plain, re.IGNORECASE)
        if match is None:
            return None
        return plain[match.end() :].strip().removesuffix(after.strip()).strip()


class ScoreLine(VerdictLine):
    """A line with a number, `<n>`, and the range that it may have."""

    place: ClassVar[str] = "<n>"
    min: float
    max: float

    @model_validator(mode="after")
    def _has_a_range(self) -> "ScoreLine":
        if not self.min < self.max:
            raise ValueError(f"min {self.min:g} is not below max {self.max:g}")
        return self

    def value(self, inside: str) -> Verdict:
        """The number; None where it is none, out of range, or "of" another maximum."""
        match = _NUMBER.fullmatch(inside.removesuffix(".").strip(_AROUND))
        if match is None:
            return Verdict(None, "no number, or more than a number, on the verdict's line")
        score = float(match["n"]) + 0.0  # -0.0 becomes 0.0
        if match["of"] is not None and float(match["of"]) != self.max:
            return Verdict(None, f"a verdict out of another maximum than {self.max:g}")
        if not self.min <= score <= self.max:
            return Verdict(None, f"a verdict outside {self.min:g} to {self.max:g}")
        return Verdict(score)


class ChoiceLine(VerdictLine):
    """A line with one of a few words, `<choice>`, and the score of each; case doesn't matter."""

    place: ClassVar[str] = "<choice>"
    choices: dict[str, float] = Field(min_length=2)

    @model_validator(mode="after")
    def _can_differ(self) -> "ChoiceLine":
        if len({_plain(choice) for choice in self.choices} - {""}) < len(self.choices):
            raise ValueError("two choices read the same, or one is empty")
        if len(set(self.choices.values())) == 1:
            raise ValueError("all choices have the same score, so nothing could ever be better")
        return self

    def value(self, inside: str) -> Verdict:
        """The score of the choice; None where the line holds none of them, or more than one."""
        scores = {_plain(choice): score for choice, score in self.choices.items()}
        if _plain(inside) not in scores:
            return Verdict(None, f"none of {', '.join(self.choices)} on the verdict's line")
        return Verdict(scores[_plain(inside)])


def _plain(choice: str) -> str:
    return " ".join(choice.translate(_MARKUP).strip().removesuffix(".").strip(_AROUND).split()).casefold()


def _unread(reason: str, text: str) -> str:
    shown = text.strip()
    if not shown:
        return reason
    # the end, where a verdict should stand; repr keeps control characters from a terminal
    return f"{reason}\n{shown[-EXCERPT:]!r}"
