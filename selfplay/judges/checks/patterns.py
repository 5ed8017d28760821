"""Regular expressions of the user under a time limit. Python's `re` has none, and (a+)+$ on a text of a few dozen a's takes it
years; the package regex has one, and reads what `re` reads.

A pattern must be one of `re`, and its two readings that regex knows beside `re`'s are turned off: approximate matches,
{e<=1}, and classes inside classes, [[:alpha:]]. Two differences stay: \\w, and so \\b, also takes combining marks, such as the
vowel signs of Hindi, and no number that is no decimal digit, such as a superscript two; \\s doesn't take the control
characters U+001C to U+001F.
"""

import functools
import re
from typing import Any

import regex

from selfplay.judges.checks.verdict import NoVerdictError

_COUNT = re.compile(r"\{(?:\d+,?\d*|,\d*)\}")
_FLAGS = re.compile(r"\(\?([aiLmsux]*)(?:-([imsx]+))?([:)])")
_NAME = re.compile(r"N\{[^{}]*\}")


def pattern_fault(pattern: str) -> str:
    """Why a text is no pattern; empty where it is one."""
    try:
        re.compile(pattern)
        _compiled(pattern, ignore_case=False)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        return str(error) or type(error).__name__
    return ""


def find(pattern: str, text: str, *, ignore_case: bool, last: bool, seconds: float) -> Any:
    """The first match of a pattern, or with `last` the last one; None where it is not found. NoVerdictError where that takes
    more than `seconds` of this process's CPU time.
    """
    matches = _compiled(pattern, ignore_case=ignore_case).finditer(text, timeout=seconds)
    try:
        return next(reversed(list(matches)), None) if last else next(matches, None)
    except TimeoutError:
        raise NoVerdictError(f"regex: no verdict within {seconds:g} s from the pattern {pattern[:80]!r}") from None


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str, *, ignore_case: bool) -> Any:
    return regex.compile(_as_re(pattern), regex.VERSION0 | (regex.IGNORECASE if ignore_case else 0))


def _as_re(pattern: str) -> str:
    """The pattern with an escape before each brace and bracket that `re` takes as itself and regex would not."""
    kept, at, opened = [], 0, -1  # `opened`: where the class begins that `at` is in
    verbose = [False]  # of the whole pattern, and of each group that `at` is in
    while at < len(pattern):
        char, end = pattern[at], at + 1
        if char == "\\":
            name = _NAME.match(pattern, end)
            end = name.end() if name else end + 1
        elif opened >= 0:
            first = pattern[opened + 1 : at] in ("", "^")  # a bracket there closes nothing
            opened = -1 if char == "]" and not first else opened
            char = "\\[" if char == "[" else char
        elif char == "[":
            opened = at
        elif pattern.startswith("(?#", at):
            end = pattern.index(")", at) + 1
        elif char == "(":
            flags = _FLAGS.match(pattern, at)
            end = flags.end() if flags is not None else end
            on, off, ends = flags.groups(default="") if flags is not None else ("", "", "")
            if ends == ")":  # flags of what they stand in
                verbose[-1] |= "x" in on
            else:
                verbose.append("x" in on or (verbose[-1] and "x" not in off))
        elif char == ")":
            verbose.pop()
        elif char == "#" and verbose[-1]:
            end = (pattern + "\n").index("\n", at)
        elif char == "{":
            count = _COUNT.match(pattern, at)
            end, char = (count.end(), char) if count else (end, "\\{")
        kept.append(char + pattern[at + 1 : end])
        at = end
    return "".join(kept)
