"""A judge template: one file that holds what the judge model is asked and how its verdict is read.

    ---
    name: additive
    version: 1
    mode: pointwise
    parse: {line: "Score: <n>", min: 0, max: 5}
    ---
    [system]
    ...
    [user]
    ... {prompt} ... {completion}

The verdict is a number, `parse: {line: "Score: <n>", min: 0, max: 5}`, or one of a few words, `parse: {line: "Verdict:
<choice>", choices: {correct: 1, incorrect: 0}}`, or it is read from the probabilities of words, `labels: {yes: 1, no: 0}`.

Fields are {prompt}, {completion}, {gold} and {system_prompt}; every other brace is ordinary text. {system_prompt} is the
system turn of the prompt that is judged, never the judge's own ([system], or judge.system_prompt); where the prompt has none,
the field is gone with the line breaks after it. With `mode: pairwise` {completion_a} and {completion_b} stand in for
{completion}, and a verdict is the probability that A is the better one.
Put the rubric first and the fields last: judge prompts then share their beginning, and an engine computes it once.

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
from typing import Annotated, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag, ValidationError, model_validator

from selfplay.errors import RecipeError
from selfplay.judges.verdicts import ChoiceLine, ScoreLine
from selfplay.recipe_file import parse_yaml
from selfplay.recipe_judges import SHIPPED_TEMPLATES
from selfplay.recipe_values import Section
from selfplay.types import Completion, Message, Prompt

COMPLETIONS = {"pointwise": ("completion",), "pairwise": ("completion_a", "completion_b")}
FIELDS = ("prompt", "completion", "completion_a", "completion_b", "gold", "system_prompt")
BUILTIN = {name: Path(__file__).parent / "templates" / f"{name}.md" for name in SHIPPED_TEMPLATES}
PARSE_TAGS = ("a number", "a choice")
CODE_DIGITS = 8

_FILE = re.compile(r"\A---[ \t]*\n(?P<head>.*?)^---[ \t]*\n(?P<bodies>.*)\Z", re.DOTALL | re.MULTILINE)
_BODY = re.compile(r"^\[(system|user)\][ \t]*$", re.MULTILINE)
_FIELD = re.compile(r"\{(\w+)\}")
_NO_SYSTEM_TURN = re.compile(r"\{system_prompt\}\n*")
ParseLine = Annotated[
    Annotated[ScoreLine, Tag(PARSE_TAGS[0])] | Annotated[ChoiceLine, Tag(PARSE_TAGS[1])],
    Discriminator(lambda value: PARSE_TAGS[isinstance(value, dict) and "choices" in value]),
]


class TemplateHead(Section):
    """The front matter. `labels` maps each label to its score; under `min_label_mass` probability on all of them
    together there is no verdict, for the judge meant to say something else.
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    version: PositiveInt
    mode: Literal["pointwise", "pairwise"]
    parse: ParseLine | None = None
    labels: dict[str, float] | None = Field(default=None, min_length=2)
    min_label_mass: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _has_a_verdict(self) -> "TemplateHead":
        if self.parse is None and self.labels is None:
            raise ValueError('give `parse: {line: "Score: <n>", min: 0, max: 5}` or `labels: {yes: 1, no: 0}`')
        if self.labels is not None and len(set(self.labels.values())) == 1:
            raise ValueError("all labels have the same score, so nothing could ever be better")
        return self

    @model_validator(mode="after")
    def _pairwise_is_a_probability(self) -> "TemplateHead":
        if self.mode == "pointwise":
            return self
        if isinstance(self.parse, ScoreLine):
            raise ValueError(
                'a pairwise verdict is a choice: parse: {line: "Better: <choice>", choices: {A: 1, B: 0, tie: 0.5}}'
            )
        values = [*(self.parse.choices.values() if self.parse else ()), *(self.labels or {}).values()]
        if min(values) < 0 or max(values) > 1:
            raise ValueError("in mode pairwise the value of a choice is the probability that A is better, in [0, 1]")
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

    def fill(self, prompt: Prompt, *completions: Completion) -> tuple[Message, ...]:
        """The judge prompt: the system turn where the template has one, then the user turn. One completion, or in mode
        pairwise two: A, then B.
        """
        fields = COMPLETIONS[self.head.mode]
        texts = {
            **{f: fenced(_name(f), c.text) for f, c in zip(fields, completions, strict=True)},
            "prompt": _conversation(prompt),
            "gold": fenced("gold", prompt.gold or ""),
        }
        if turns := [m.content for m in prompt.messages if m.role == "system"]:
            texts["system_prompt"] = fenced("system turn of the prompt", "\n\n".join(turns))
        system = () if self.system is None else (Message("system", _fill(self.system, texts)),)
        return (*system, Message("user", _fill(self.user, texts)))


def _name(field: str) -> str:
    """What a completion is called in its marked lines: "completion", "completion A"."""
    before, _, letter = field.partition("_")
    return f"{before} {letter.upper()}".strip()


def _fill(body: str, texts: Mapping[str, str]) -> str:
    if "system_prompt" not in texts:
        body = _NO_SYSTEM_TURN.sub("", body)
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
    """The template called `target`: a shipped name (see SHIPPED_TEMPLATES) or else a file, relative to `base`.

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
        _check_fields(body, head.mode, where)
    missing = [name for name in COMPLETIONS[head.mode] if f"{{{name}}}" not in bodies["user"]]
    if missing:
        raise RecipeError(f"{where}: [user] lacks {{{missing[0]}}}: the judge would not see what it judges.")
    return JudgeTemplate(head, bodies.get("system"), bodies["user"], digest)


def _check_head(text: str, where: str) -> TemplateHead:
    try:
        return TemplateHead.model_validate(parse_yaml(text, where)[0])
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            key = ".".join(str(part) for part in fault["loc"] if part not in PARSE_TAGS)
            close = difflib.get_close_matches(key, list(TemplateHead.model_fields), n=1)
            hint = f'; did you mean "{close[0]}"?' if fault["type"] == "extra_forbidden" and close else ""
            faults.append(f"{where}: {key or 'keys'}: {fault['msg'].removeprefix('Value error, ')}{hint}")
        raise RecipeError("\n".join(faults)) from None


def _check_fields(body: str, mode: str, where: str) -> None:
    others = [name for key, names in COMPLETIONS.items() if key != mode for name in names]
    for name in _FIELD.findall(body):
        if name not in FIELDS:
            close = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f'did you mean "{{{close[0]}}}"?' if close else f"allowed: {', '.join(f'{{{f}}}' for f in FIELDS)}"
            raise RecipeError(f"{where}: unknown field {{{name}}}; {hint}")
        if name in others:
            raise RecipeError(f"{where}: the field {{{name}}} is not one of mode {mode}; change `mode` or the field")
