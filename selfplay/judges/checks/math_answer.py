"""Whether a completion ends in the gold answer, as mathematics: math-verify reads both and compares them (extra `math`)."""

import functools
import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from selfplay.judges.checks.verdict import NoVerdictError

Seconds = Annotated[float, Field(gt=0)]
SECONDS = 5.0
# What shows that a gold answer is a text with mathematics in it, and not an expression alone.
MARKED = re.compile(r"\$|\\boxed|\\\(|\\\[")
COMMAND = re.compile(r"\\[A-Za-z]+")
NAMES = frozenset(["sqrt", "sin", "cos", "tan", "log", "exp", "pi", "inf", "min", "max", "mod"])


def math_answer(text: str, gold: str | None, *, seconds: Seconds = SECONDS) -> bool:
    """Whether the completion's final answer equals the gold answer's: what is boxed, else what stands after words like "the
    answer is", else the last expression. A completion without any is wrong. NoVerdictError where the gold answer is none.
    """
    if fault := gold_fault(gold):
        raise NoVerdictError(f"math_answer: {fault}")
    assert gold is not None
    have = _read(text)
    # its own time limit is an alarm, which works in a main thread only: the process that runs this has one
    return bool(have) and bool(library().verify(_read_gold(gold), have, timeout_seconds=None))


def gold_fault(gold: str | None, **_: Any) -> str:
    """Why no completion can be compared with the gold answer; empty where it can."""
    if gold is None:
        return "the prompt has no gold answer"
    return "" if _read_gold(gold) else f"there is no mathematical expression in the gold answer {gold[:80]!r}"


@functools.lru_cache(maxsize=64)  # once for all completions of a group
def _read_gold(gold: str) -> Sequence[Any]:
    marked = gold.rpartition("####")[2].strip()
    words = [word for word in re.findall(r"[^\W\d_]{3,}", COMMAND.sub("", marked)) if word.lower() not in NAMES]
    if "\n" in marked or MARKED.search(marked) or words:
        return _read(marked)
    # a bare `2x + 1` would be read as the number 2
    return _read(f"${marked}$") or _read(marked)


def _read(text: str) -> Sequence[Any]:
    asked = [library().LatexExtractionConfig(boxed_match_priority=0), library().ExprExtractionConfig()]
    found: Sequence[Any] = library().parse(text, asked, fallback_mode="no_fallback", parsing_timeout=None)
    return found


@functools.cache
def library() -> Any:
    """math-verify; it takes a while to import."""
    import math_verify

    return math_verify
