"""Constrained verdicts: the few texts that a verdict may be, and the score of each.

The model says nothing else, so no verdict comes after reasons, and none is unreadable unless max_tokens cuts it or a server
doesn't keep to what it was asked. What the model would rather have said is not seen: where that matters, `verdict: labels`
looks at how probable the labels are together.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from selfplay.errors import RecipeError
from selfplay.judges.template import TemplateHead
from selfplay.judges.verdicts import ScoreLine, Verdict

MAX_CHOICES = 101
KEY = "verdict"  # of the JSON object that a server with response_format is asked for


def verdict_choices(head: TemplateHead) -> dict[str, float]:
    """Each text that a verdict may be, and its score: the template's verdict line with every whole number of its range or
    every choice, or without a line its labels. RecipeError where that is no list of 2 to MAX_CHOICES.
    """
    if head.parse is None:
        assert head.labels is not None  # a template has one of the two
        return dict(head.labels)
    if not isinstance(head.parse, ScoreLine):
        return {head.parse.line.replace(head.parse.place, word): score for word, score in head.parse.choices.items()}
    scores = range(math.ceil(head.parse.min), math.floor(head.parse.max) + 1)
    if not 2 <= len(scores) <= MAX_CHOICES:
        raise RecipeError(
            f"judge.verdict is constrained, and from {head.parse.min:g} to {head.parse.max:g} (template {head.name}) there "
            f"are {len(scores)} whole numbers to choose from: 2 to {MAX_CHOICES} are possible. Change the range, or say "
            "verdict: parse"
        )
    return {head.parse.line.replace(head.parse.place, str(score)): float(score) for score in scores}


def read_choice(text: str, choices: Mapping[str, float], *, cut: bool) -> Verdict:
    """The score of the choice that a text is, alone or as the JSON object of `response_format`; None for anything else, for
    not every server keeps to what it was asked, and where max_tokens cut (`cut`) what might have become another choice.
    """
    said, whole = text.strip(), not cut
    if said.startswith("{"):
        said, whole = _inside(said), True  # an object that can be read has its end
    scores = {choice.strip(): score for choice, score in choices.items()}
    longer = any(choice != said and choice.startswith(text.lstrip()) for choice in scores)
    if said in scores and (whole or not longer):
        return Verdict(scores[said])
    reason = "max_tokens cut the verdict" if cut else "the verdict is none of the choices: the constraint was not kept"
    return Verdict(None, f"{reason}\n{text.strip()[:100]!r}")


def _inside(text: str) -> str:
    """What stands under KEY in a JSON object; "" where there is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    value = found.get(KEY) if isinstance(found, dict) else None
    return value if isinstance(value, str) else ""


def response_format(choices: Mapping[str, float]) -> dict[str, Any]:
    """The field of that name, which makes a verdict a JSON object with one choice."""
    schema = {
        "type": "object",
        "properties": {KEY: {"type": "string", "enum": list(choices)}},
        "required": [KEY],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": KEY, "strict": True, "schema": schema}}
