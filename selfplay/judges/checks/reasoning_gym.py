"""The scorers of reasoning-gym's tasks (extra `reasoning-gym`)."""

import functools
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from selfplay.judges.checks.math_answer import SECONDS, Seconds
from selfplay.judges.checks.verdict import NoVerdictError
from selfplay.judges.counts import NUMBER

Score = Annotated[float, Field(ge=0, le=1)]
Entry = dict[str, Any]


def reasoning_gym(
    text: str,
    gold: str | None,
    *,
    entry: Entry,
    read: Literal["tag", "last_number", "all"] = "tag",
    min: Score | None = None,
    seconds: Seconds = SECONDS,
) -> float:
    """The task's own score of the completion, in [0, 1]; with `min`, 1 where it is reached, else 0. `read` says what is
    scored: what <answer> tags hold (without them nothing), the last number, or the whole text.
    """
    score = float(_scorer(entry["metadata"]["source_dataset"])(_final(text, read), entry))
    if not math.isfinite(score):
        raise NoVerdictError(f"reasoning_gym: the task's scorer gave {score}")
    return float(score >= min) if min is not None else sorted((0.0, score, 1.0))[1]


def task_fault(gold: str | None, *, entry: Entry, **_: Any) -> str:
    """What is wrong with a task; empty where nothing is."""
    metadata = entry.get("metadata")
    name = metadata.get("source_dataset") if isinstance(metadata, Mapping) else None
    if not isinstance(entry.get("answer", 0), str | None) or not isinstance(name, str):
        return "entry is a task as reasoning-gym makes it, with answer and metadata.source_dataset"
    if name not in tasks():
        return f"reasoning-gym has no task {name!r}"
    if runs_text(tasks()[name][0]):
        return f"the scorer of {name!r} runs a completion's text as Python, so such tasks are refused"
    if entry["answer"] is None:  # a task with many answers may name none
        return ""
    try:
        score = _scorer(name)(entry["answer"], entry)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        return f"the scorer of {name!r} can't read this entry ({error!r})"
    return "" if score > 0 else f"the scorer of {name!r} gives the entry's own answer no points"


def runs_text(task: type) -> bool:
    """Whether a task's scorer, or what it calls of its own module, hands text to Python or to SymPy's parser, which runs it."""
    methods = {name: method for one in reversed(task.__mro__[:-1]) for name, method in vars(one).items()}
    waiting, seen = ["score_answer"], set[str]()
    while waiting:
        name = waiting.pop()
        found = methods.get(name) or vars(sys.modules[task.__module__]).get(name)
        if isinstance(found, staticmethod | classmethod):
            found = found.__func__
        if isinstance(found, types.FunctionType) and found.__module__.startswith("reasoning_gym."):
            waiting += [called for called in _names_in(found.__code__) if called not in seen]
        elif name in ("eval", "exec", "parse_expr", "sympify"):
            return True
        seen.add(name)
    return False


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)


def _final(text: str, read: str) -> str | None:
    if read == "tag":
        from reasoning_gym.utils import extract_answer

        found: str | None = extract_answer(text)
        return found
    numbers = NUMBER.findall(text) if read == "last_number" else [text.strip()]
    return numbers[-1].replace("\u2212", "-").lstrip("+") if numbers else None


@functools.cache
def _scorer(name: str) -> Callable[[str | None, Entry], float]:
    from reasoning_gym.factory import get_score_answer_fn

    found: Callable[[str | None, Entry], float] = get_score_answer_fn(name)
    return found


@functools.cache
def tasks() -> Mapping[str, Any]:
    """Each task's classes, of its data set and of its configuration."""
    import reasoning_gym.factory

    found: Mapping[str, Any] = reasoning_gym.factory.DATASETS
    return found
