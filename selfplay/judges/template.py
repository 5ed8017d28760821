"""A judge template: one file that holds what the judge model is asked and how its verdict is read.

    ---
    name: additive
    version: 1
    mode: pointwise
    parse: {line: "Score: <n>", min: 0, max: 5}      # or   labels: {yes: 1, no: 0}
    ---
    [system]
    ...
    [user]
    ... {prompt} ... {completion}

Fields are {prompt}, {completion}, {gold} and {system_prompt}; every other brace is ordinary text. Put the rubric first
and the fields last: judge prompts then share their beginning, and an engine computes it once.

What fills a field was written by a model or came with a data set, and may try to steer the judge. So fields are filled
in one pass (a field's name inside a completion stays as it is), and each text stands between two lines with a code that
doesn't occur in it, so it can't pretend to have ended. That special tokens stay text is chat.py's promise.
"""

import difflib
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, ValidationError, model_validator

from selfplay.errors import RecipeError
from selfplay.recipe_file import parse_yaml
from selfplay.recipe_values import Section
from selfplay.types import Completion, Message, Prompt

# Counts changes to how verdicts are read; part of a judge's identity, so that old judgements aren't reused silently.
PARSER_VERSION = 1
FIELDS = ("prompt", "completion", "gold", "system_prompt")
BUILTIN = {name: Path(__file__).parent / "templates" / f"{name}.md" for name in ("additive", "yes_no")}
CODE_DIGITS = 8
EXCERPT = 100  # characters of an unreadable verdict that a note quotes

_FILE = re.compile(r"\A---[ \t]*\n(?P<head>.*?)^---[ \t]*\n(?P<bodies>.*)\Z", re.DOTALL | re.MULTILINE)
_BODY = re.compile(r"^\[(system|user)\][ \t]*$", re.MULTILINE)
_FIELD = re.compile(r"\{(\w+)\}")
_NUMBER = re.compile(
    r"(?P<n>[+-]?[0-9]+(?:\.[0-9]+)?)(?:\s*(?:/|out of)\s*(?P<of>[0-9]+))?(?:\s*points?)?", re.IGNORECASE
)
_MARKUP = str.maketrans("", "", "*_`")
_BULLET = " \t>#-"
_AROUND = " \t[]()<>{}\"'"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was read from a judge's text: a score, or None and the reason. The reason's first line is the same for the
    same kind of fault; an excerpt may follow on the second.
    """

    score: float | None
    note: str = ""


class ScoreLine(Section):
    """The verdict's line, written with `<n>` where the number stands, and the range that number may have."""

    line: str
    min: float
    max: float

    @model_validator(mode="after")
    def _usable(self) -> "ScoreLine":
        before, found, after = self.line.partition("<n>")
        if not found or "<n>" in after:
            raise ValueError('write `line` with <n> once, where the number stands, like "Score: <n>"')
        if not before.translate(_MARKUP).strip(_BULLET + _AROUND):
            raise ValueError('`line` needs a word before <n>, like "Score: <n>", else any number would be a verdict')
        if not self.min < self.max:
            raise ValueError(f"min {self.min:g} is not below max {self.max:g}")
        return self

    def read(self, text: str, *, cut: bool = False) -> Verdict:
        """The one verdict in a judge's text: the number on its last verdict line.

        None where there is no such line, its number can't be read, is out of range or "of" another maximum, where an
        earlier line gives another number, or where max_tokens cut the text (`cut`) right behind the number. Never
        raises.
        """
        found = [inside for line in text.splitlines() if (inside := self._inside(line)) is not None]
        if not found:
            return Verdict(None, _unread("the text is empty" if not text.strip() else f'no line "{self.line}"', text))
        last = self._number(found[-1])
        if last.score is None:
            return Verdict(None, _unread(last.note, found[-1]))
        if any(self._number(inside).score not in (None, last.score) for inside in found[:-1]):
            return Verdict(None, _unread("verdicts that differ", " | ".join(found)))
        if cut and self._inside(text.splitlines()[-1]) is not None:
            return Verdict(None, _unread("max_tokens cut the verdict", found[-1]))
        return last

    def _inside(self, line: str) -> str | None:
        """What stands in the place of <n>; None where this is no verdict line."""
        before, _, after = self.line.translate(_MARKUP).lstrip(_BULLET).partition("<n>")
        plain = " ".join(line.translate(_MARKUP).lstrip(_BULLET).split())
        head = r"\s*".join(re.escape(word) for word in re.findall(r"\w+|[^\w\s]", before))
        match = re.match(head, plain, re.IGNORECASE)
        if match is None:
            return None
        return plain[match.end() :].strip().removesuffix(after.strip()).strip()

    def _number(self, inside: str) -> Verdict:
        match = _NUMBER.fullmatch(inside.removesuffix(".").strip(_AROUND))
        if match is None:
            return Verdict(None, "no number, or more than a number, on the verdict's line")
        score = float(match["n"]) + 0.0  # -0.0 becomes 0.0
        if match["of"] is not None and float(match["of"]) != self.max:
            return Verdict(None, f"a verdict out of another maximum than {self.max:g}")
        if not self.min <= score <= self.max:
            return Verdict(None, f"a verdict outside {self.min:g} to {self.max:g}")
        return Verdict(score)


def _unread(reason: str, text: str) -> str:
    shown = text.strip()
    if not shown:
        return reason
    # the end, where a verdict should stand; repr keeps control characters from a terminal
    return f"{reason}\n{shown[-EXCERPT:]!r}"


class TemplateHead(Section):
    """The front matter. `labels` maps each label to its score; under `min_label_mass` probability on all of them
    together there is no verdict, for the judge meant to say something else.
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    version: PositiveInt
    mode: Literal["pointwise"]
    parse: ScoreLine | None = None
    labels: dict[str, float] | None = Field(default=None, min_length=2)
    min_label_mass: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _has_a_verdict(self) -> "TemplateHead":
        if self.parse is None and self.labels is None:
            raise ValueError('give `parse: {line: "Score: <n>", min: 0, max: 5}` or `labels: {yes: 1, no: 0}`')
        if self.labels is not None and len(set(self.labels.values())) == 1:
            raise ValueError("all labels have the same score, so nothing could ever be better")
        return self


@dataclass(frozen=True, slots=True)
class JudgeTemplate:
    """A checked template. `digest` is 16 hex digits of the SHA-256 of its file."""

    head: TemplateHead
    system: str | None
    user: str
    digest: str

    @property
    def needs_gold(self) -> bool:
        return "gold" in _FIELD.findall((self.system or "") + self.user)

    def fill(self, prompt: Prompt, completion: Completion) -> tuple[Message, ...]:
        """The judge prompt: the system turn where the template has one, then the user turn."""
        texts = {
            "prompt": _conversation(prompt),
            "completion": fenced("completion", completion.text),
            "gold": fenced("gold", prompt.gold or ""),
            "system_prompt": fenced(
                "system prompt", "\n\n".join(m.content for m in prompt.messages if m.role == "system")
            ),
        }
        system = () if self.system is None else (Message("system", _fill(self.system, texts)),)
        return (*system, Message("user", _fill(self.user, texts)))


def _fill(body: str, texts: Mapping[str, str]) -> str:
    return _FIELD.sub(lambda field: texts[field[1]], body)


def fenced(name: str, text: str) -> str:
    """`text` between two lines that carry a code. The code depends on this text alone, so that the judge prompts of one
    group share their beginning, and it doesn't occur in the text, so that the text can't write the closing line.
    """
    number = 0
    while (code := _code(text, number)) in text:
        number += 1
    return f"<<<{name} {code}>>>\n{text}\n<<<end of {name} {code}>>>"


def _code(text: str, number: int) -> str:
    return hashlib.sha256(f"{number}:{text}".encode(errors="surrogatepass")).hexdigest()[:CODE_DIGITS]


def _conversation(prompt: Prompt) -> str:
    """The turns of a prompt without its system turns, each in its own fence; a single one is called the prompt."""
    turns = [message for message in prompt.messages if message.role != "system"]
    if len(turns) == 1:
        return fenced("prompt", turns[0].content)
    # a role is data too: only its letters may stand in a marked line
    return "\n".join(fenced(f"{re.sub(r'[^A-Za-z]', '', turn.role)} turn", turn.content) for turn in turns)


def load_template(target: str, base: Path) -> JudgeTemplate:
    """The template called `target`: a shipped name ("additive", "yes_no") or a file, relative to `base`.

    RecipeError where it can't be read or anything in it is unknown or missing.
    """
    path = BUILTIN[target] if target in BUILTIN else base / target
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"judge template {target}: can't read {path} ({error}). Give a file, or one of: {', '.join(BUILTIN)}."
        ) from error
    return parse_template(text.replace("\r\n", "\n"), where=str(path), digest=hashlib.sha256(data).hexdigest()[:16])


def parse_template(text: str, *, where: str, digest: str) -> JudgeTemplate:
    """The template in `text`. RecipeError as in `load_template`."""
    match = _FILE.match(text)
    if match is None:
        raise RecipeError(f"{where}: a judge template begins with a line ---, its keys, and another line ---.")
    head = _check_head(match["head"], where)
    before, *parts = _BODY.split(match["bodies"])
    bodies = dict(zip(parts[::2], (body.strip("\n") for body in parts[1::2]), strict=True))
    if before.strip() or len(parts) != 2 * len(bodies) or not bodies.get("user", "").strip():
        raise RecipeError(
            f"{where}: after the keys come a line [system] (optional) and a line [user], each once, each with its text."
        )
    for body in bodies.values():
        _check_fields(body, where)
    if "{completion}" not in bodies["user"]:
        raise RecipeError(f"{where}: [user] lacks {{completion}}: the judge would not see what it judges.")
    return JudgeTemplate(head, bodies.get("system"), bodies["user"], digest)


def _check_head(text: str, where: str) -> TemplateHead:
    try:
        return TemplateHead.model_validate(parse_yaml(text, where)[0])
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            key = ".".join(str(part) for part in fault["loc"])
            close = difflib.get_close_matches(key, list(TemplateHead.model_fields), n=1)
            hint = f'; did you mean "{close[0]}"?' if fault["type"] == "extra_forbidden" and close else ""
            faults.append(f"{where}: {key or 'keys'}: {fault['msg'].removeprefix('Value error, ')}{hint}")
        raise RecipeError("\n".join(faults)) from None


def _check_fields(body: str, where: str) -> None:
    for name in _FIELD.findall(body):
        if name not in FIELDS:
            close = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f'did you mean "{{{close[0]}}}"?' if close else f"allowed: {', '.join(f'{{{f}}}' for f in FIELDS)}"
            raise RecipeError(f"{where}: unknown field {{{name}}}; {hint}")
