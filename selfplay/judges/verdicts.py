"""How a verdict is read from what a judge model wrote: one marked line, with a number or one of a few words.

A line that is missing, unclear, out of range, said twice or cut gives no verdict: None with the reason, never a number.
So does a text that ends while the model still thinks. Markdown and brackets may stand around a verdict, never inside it.
"""

import re
from abc import abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field, model_validator

from selfplay.judges.thinking import after_thinking
from selfplay.recipe_values import Section

# Counts changes to how questions are filled in and verdicts are read; part of a judge's identity, so that old judgements
# aren't reused silently.
PARSER_VERSION = 2
EXCERPT = 100  # characters of an unreadable verdict that a note quotes

UNFINISHED = "the thinking is not finished: raise max_tokens, or switch it off"

_NUMBER = re.compile(r"[+-]?[0-9]+(?:\.[0-9]+)?")
_OF = re.compile(r"/|out of", re.IGNORECASE)
_POINTS = re.compile(r" ?points?\Z", re.IGNORECASE)
_EMPHASIS = "*_`"
_MARKS = re.compile(r"\*+|_+|`+")
_ENDS = f" \t{_EMPHASIS}"
_BULLETS = re.compile(r"[\s>#-]*(?:[*+]\s)?[\s>#-]*")
_SNAKE = re.compile(r"(?<=[^\W_])_(?=[^\W_])")  # in a_name it emphasizes nothing
_AROUND = {"[": "]", "(": ")", "<": ">", "{": "}", '"': '"', "'": "'"}


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
        if not before.strip(" \t>#-" + _EMPHASIS + "".join(_AROUND) + "".join(_AROUND.values())):
            raise ValueError(f"`line` needs a word before {self.place}, {example}, else anything would be a verdict")
        return self

    @abstractmethod
    def value(self, inside: str) -> Verdict:
        """The verdict in what stands in the line's place."""

    def read(self, text: str, *, cut: bool = False) -> Verdict:
        """The one verdict in a judge's text: that of its last verdict line.

        None where there is no such line, the line can't be read, an earlier line says something else, the model has not
        finished thinking, or max_tokens cut the text (`cut`) right behind the verdict. Never raises.
        """
        said = after_thinking(text)
        if said is None:
            return Verdict(None, _unread(UNFINISHED, text))
        found = [(line, inside) for line in said.splitlines() if (inside := self._inside(line)) is not None]
        if not found:
            return Verdict(None, _unread("the text is empty" if not said.strip() else f'no line "{self.line}"', said))
        shown = found[-1][1]
        last, *earlier = (self._value_on(line, inside) for line, inside in reversed(found))
        if last.score is None:
            return Verdict(None, _unread(last.note, shown))
        if any(verdict.score not in (None, last.score) for verdict in earlier):
            return Verdict(None, _unread("verdicts that differ", " | ".join(inside for _, inside in found)))
        if cut and self._inside(said.splitlines()[-1]) is not None:
            return Verdict(None, _unread("max_tokens cut the verdict", shown))
        return last

    def _inside(self, line: str) -> str | None:
        """What stands in the verdict's place; None where this is no verdict line."""
        before, _, after = self.line.partition(self.place)
        words = re.findall(rf"[^\W_]+|[^\w\s{_EMPHASIS}]", _unbulleted(before))
        head = rf"[\s{_EMPHASIS}]*".join(re.escape(word) for word in words)
        plain = " ".join(_unbulleted(line).split())
        match = re.match(rf"[{_EMPHASIS}]*{head}", plain, re.IGNORECASE)
        return None if match is None else _unended(plain[match.end() :]).removesuffix(_unended(after)).strip()

    def _value_on(self, line: str, inside: str) -> Verdict:
        """The verdict of a verdict line; None also where its markup has no end."""
        marks = Counter(_MARKS.findall(_SNAKE.sub("", _unbulleted(line))))
        if any(count % 2 for count in marks.values()):
            return Verdict(None, "markup without its other half on the verdict's line")
        return self.value(inside)


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
        number, *of = (_bare(part) for part in _OF.split(_POINTS.sub("", _bare(inside)), maxsplit=1))
        if not _NUMBER.fullmatch(number) or not all(part.isascii() and part.isdigit() for part in of):
            return Verdict(None, "no number, or more than a number, on the verdict's line")
        score = float(number) + 0.0  # -0.0 becomes 0.0
        if of and float(of[0]) != self.max:
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
        if len({_plain(_unended(choice)) for choice in self.choices} - {""}) < len(self.choices):
            raise ValueError("two choices read the same, or one is empty")
        if len(set(self.choices.values())) == 1:
            raise ValueError("all choices have the same score, so nothing could ever be better")
        return self

    def value(self, inside: str) -> Verdict:
        """The score of the choice; None where the line holds none of them, or more than one."""
        scores = {_plain(_unended(choice)): score for choice, score in self.choices.items()}
        if _plain(inside) not in scores:
            return Verdict(None, f"none of {', '.join(self.choices)} on the verdict's line")
        return Verdict(scores[_plain(inside)])


def _plain(choice: str) -> str:
    return " ".join(_bare(choice).split()).casefold()


def _bare(text: str) -> str:
    """`text` without the emphasis at its ends, and the pairs of brackets and quotes around it."""
    text = text.strip(_ENDS)
    while len(text) > 1 and _AROUND.get(text[0]) == text[-1]:
        text = text[1:-1].strip(_ENDS)
    return text


def _unended(text: str) -> str:
    """`text` without the emphasis at its ends, and one full stop."""
    return text.strip(_ENDS).removesuffix(".").strip(_ENDS)


def _unbulleted(line: str) -> str:
    return _BULLETS.sub("", line, count=1)


def _unread(reason: str, text: str) -> str:
    shown = text.strip()
    if not shown:
        return reason
    # the end, where a verdict should stand; repr keeps control characters from a terminal
    return f"{reason}\n{shown[-EXCERPT:]!r}"
