"""The checks that a few lines of our own decide. Each says whether a text passes; keyword arguments are the check's own, and
their types are what prompts are checked against.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from pydantic import Field

from selfplay.judges.checks.patterns import find
from selfplay.judges.checks.verdict import NoVerdictError
from selfplay.judges.counts import LIST_MARKER, count_sentences, count_words, last_number

Count = Annotated[int, Field(ge=0)]
Phrases = Annotated[Sequence[Annotated[str, Field(min_length=1)]], Field(min_length=1)]

REGEX_SECONDS = 5.0  # as the checks of other packages have
NO_GOLD = "a check compares with the gold answer, and the prompt has none that fits"


def _within(count: int, low: int | None, high: int | None) -> bool:
    return (low is None or count >= low) and (high is None or count <= high)


def _need(gold: str | None) -> str:
    if gold is None:
        raise NoVerdictError(NO_GOLD)
    return gold


def _exact(text: str, gold: str | None, *, ignore_case: bool = False, strip: bool = True) -> bool:
    pair = [text, _need(gold)]
    if strip:
        pair = [t.strip() for t in pair]
    if ignore_case:
        pair = [t.casefold() for t in pair]
    return pair[0] == pair[1]


def _numeric(text: str, gold: str | None, *, tolerance: Annotated[float, Field(ge=0)] = 1e-6) -> bool:
    want, have = last_number(_need(gold)), last_number(text)
    if want is None:
        raise NoVerdictError(NO_GOLD)
    return have is not None and math.isfinite(have) and abs(have - want) <= tolerance


def _regex(
    text: str,
    gold: str | None,
    *,
    pattern: str,
    ignore_case: bool = False,
    match_gold: bool = False,
    seconds: Annotated[float, Field(gt=0)] = REGEX_SECONDS,
) -> bool:
    """The pattern is found; with `match_gold`, its first group (or all of it) in the last match is the gold answer.
    NoVerdictError where the pattern takes longer than `seconds`. patterns.py says where it is read otherwise than by `re`.
    """
    found = find(pattern, text, ignore_case=ignore_case, last=match_gold, seconds=seconds)
    if not match_gold:
        return found is not None
    want = _need(gold).strip()
    return found is not None and (found[1 if found.re.groups else 0] or "").strip() == want


def _words(text: str, gold: str | None, *, min: Count | None = None, max: Count | None = None) -> bool:
    return _within(count_words(text), min, max)


def _sentences(text: str, gold: str | None, *, min: Count | None = None, max: Count | None = None) -> bool:
    return _within(count_sentences(text), min, max)


def _paragraphs(text: str, gold: str | None, *, min: Count | None = None, max: Count | None = None) -> bool:
    return _within(sum(bool(block.strip()) for block in re.split(r"\n[ \t]*\n", text)), min, max)


def _bullets(text: str, gold: str | None, *, min: Count | None = None, max: Count | None = None) -> bool:
    return _within(len(LIST_MARKER.findall(text)), min, max)


def _case(text: str, gold: str | None, *, case: Literal["upper", "lower"]) -> bool:
    return text.isupper() if case == "upper" else text.islower()


def _phrase(phrase: str, ignore_case: bool, whole_words: bool = True) -> re.Pattern[str]:
    # The look-arounds ask for a word's end only where the phrase itself ends in a word: "?" has none.
    before = r"(?<!\w)" if whole_words and re.match(r"\w", phrase) else ""
    after = r"(?!\w)" if whole_words and re.search(r"\w$", phrase) else ""
    return re.compile(before + re.escape(phrase) + after, re.IGNORECASE if ignore_case else 0)


def _starts_with(text: str, gold: str | None, *, any: Phrases, ignore_case: bool = False) -> bool:
    return bool([p for p in any if _phrase(p, ignore_case).match(text.lstrip())])


def _ends_with(text: str, gold: str | None, *, any: Phrases, ignore_case: bool = False) -> bool:
    stripped = text.rstrip()
    return bool([p for p in any if (m := _last(_phrase(p, ignore_case), stripped)) and m.end() == len(stripped)])


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(reversed(list(pattern.finditer(text))), None)


def _contains(
    text: str,
    gold: str | None,
    *,
    any: Phrases | None = None,
    all: Phrases | None = None,
    ignore_case: bool = True,
    whole_words: bool = True,
) -> bool:
    def hits(phrases: Sequence[str]) -> list[bool]:
        return [bool(_phrase(p, ignore_case, whole_words).search(text)) for p in phrases]

    return (any is None or True in hits(any)) and (all is None or False not in hits(all))


def _excludes(text: str, gold: str | None, *, any: Phrases, ignore_case: bool = True, whole_words: bool = True) -> bool:
    """None of the phrases occurs."""
    return not _contains(text, gold, any=any, ignore_case=ignore_case, whole_words=whole_words)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _json(text: str, gold: str | None, *, keys: Phrases | None = None) -> bool:
    """The text (or what its one code fence holds) is JSON; with `keys`, an object that has them all."""
    fence = re.fullmatch(r"\s*```(?:json)?\s*\n(.*)```\s*", text, re.DOTALL)
    try:
        value = json.loads(fence[1] if fence else text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return keys is None or (isinstance(value, dict) and set(keys) <= set(value))


@functools.lru_cache(maxsize=8192)
def _stem(word: str) -> re.Pattern[str]:
    """The word and its usual endings. Below four letters only plurals, so that "car" isn't found in "cared"."""
    e = re.escape(word)
    forms = [e, e + r"(?:['\u2019]s|s|es)"]
    if len(word) >= 4:
        forms += [e + "(?:ed|ing|er|ers|y)", e + re.escape(word[-1]) + "(?:ed|ing|er|ers|y)"]
        if word.endswith("e"):
            forms += [re.escape(word[:-1]) + "(?:ed|ing|er|ers|or|ors)"]
    if word.endswith("y"):
        forms += [re.escape(word[:-1]) + "(?:ies|ied)"]
    return re.compile(rf"(?<!\w)(?:{'|'.join(forms)})(?!\w)", re.IGNORECASE)


def _on_topic(text: str, gold: str | None, *, words: Phrases, min: Annotated[int, Field(ge=1)] = 1) -> bool:
    """At least `min` different key words occur, as whole words in any case, usual endings allowed."""
    return sum(bool(_stem(word).search(text)) for word in words) >= min


RULES: dict[str, Callable[..., bool]] = {
    "exact": _exact,
    "numeric": _numeric,
    "regex": _regex,
    "words": _words,
    "sentences": _sentences,
    "paragraphs": _paragraphs,
    "bullets": _bullets,
    "case": _case,
    "starts_with": _starts_with,
    "ends_with": _ends_with,
    "contains": _contains,
    "excludes": _excludes,
    "json": _json,
    "on_topic": _on_topic,
}
