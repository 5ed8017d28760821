"""From a plain function to a judge: `@pointwise` for f(prompt, completion), `@pairwise` for f(prompt, a, b).

    @selfplay.pointwise
    def shorter(prompt, completion):
        return -len(completion.text)

Both work with and without parentheses, on `def` and `async def`, and the decorated name can still be called like the
function. Async functions run side by side, at most `max_concurrency` calls at a time.
"""

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import math
import platform
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, TypeVar, overload

from selfplay.errors import JudgeError
from selfplay.judges.contract import Blamed, as_score
from selfplay.judges.unparsed import first_line
from selfplay.protocols import JudgeContext, PairSelector
from selfplay.types import Completion, Group, Judgement, Prompt

T = TypeVar("T")
Verdict = float | bool | None
PointwiseFunction = Callable[[Prompt, Completion], Verdict | Awaitable[Verdict]]
PairwiseFunction = Callable[[Prompt, Completion, Completion], Verdict | Awaitable[Verdict]]
Call = tuple[str, tuple[Any, ...]]  # where it stands, for an error message; the arguments

MAX_CONCURRENCY = 16
NO_VERDICT = "the function gave no verdict"
EMPTY_CELL = CellType()  # what a function that names itself closes over while it is being decorated
PLAIN = (str, bytes, int, float, bool, type(None))


class Calls:
    """Calls of a function, their values in order. `running` holds where those stand that have begun and not ended: who
    waits in vain can say for what.
    """

    def __init__(self, function: Callable[..., Any], max_concurrency: int) -> None:
        self.function = function
        self.max_concurrency = max_concurrency
        self.running: dict[str, None] = {}

    def make(self, calls: Sequence[Call], progress: Callable[[int], None]) -> list[Any]:
        """The value of every call; `progress` is called with the number of those that are done."""
        self.running.clear()
        self._done, self._progress = 0, progress
        function = self.function
        if not (inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)):
            return self._one_by_one(calls)
        return run_async(self._side_by_side(calls))

    def _one_by_one(self, calls: Sequence[Call]) -> list[Any]:
        values = []
        for where, arguments in calls:
            with self._watched(where), Blamed(where):
                values.append(self.function(*arguments))
        return values

    async def _side_by_side(self, calls: Sequence[Call]) -> list[Any]:
        free = asyncio.Semaphore(self.max_concurrency)

        async def one(where: str, arguments: tuple[Any, ...]) -> Any:
            async with free:
                with self._watched(where), Blamed(where):
                    return await self.function(*arguments)

        return await asyncio.gather(*(one(where, arguments) for where, arguments in calls))

    @contextlib.contextmanager
    def _watched(self, where: str) -> Iterator[None]:
        self.running[where] = None
        yield
        del self.running[where]
        self._done += 1
        self._progress(self._done)


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns. An event loop that already runs (a notebook) can't be re-entered, so then it gets a loop in a
    thread of its own.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, work).result()


def _code_text(code: CodeType) -> str:
    """A text that differs between two lambdas on one line, whose source lines are the same."""
    consts = [_code_text(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return repr((code.co_code.hex(), code.co_names, consts))


def _attributes(owner: object) -> dict[str, Any]:
    """What an object holds; a dataclass with slots has no __dict__."""
    fields = dataclasses.fields(owner) if dataclasses.is_dataclass(owner) else ()
    found = {field.name: getattr(owner, field.name) for field in fields if hasattr(owner, field.name)}
    return found | (dict(vars(owner)) if hasattr(owner, "__dict__") else {})


def _state_text(function: Callable[..., Any] | PairSelector) -> str:
    """The values that a function carries along, as far as they are plain: one source makes many functions, and a value
    of another type has no text that stays the same in the next process.
    """
    values: dict[str, Any] = {}
    if isinstance(function, FunctionType):
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        values |= {name: cell.cell_contents for name, cell in cells if cell != EMPTY_CELL}
        values |= {f"default {n}": value for n, value in enumerate(function.__defaults__ or ())}
        values |= function.__kwdefaults__ or {}
        if function.__name__ == "<lambda>":
            values[""] = _code_text(function.__code__)
    elif isinstance(function, functools.partial):
        values |= {f"argument {n}": value for n, value in enumerate(function.args)} | function.keywords
    else:
        owner = function.__self__ if isinstance(function, MethodType) else function
        values |= _attributes(owner)
    return repr([(name, value) for name, value in values.items() if isinstance(value, PLAIN)])


def _source_text(function: Callable[..., Any] | PairSelector) -> str:
    """The source of a function, or of a callable object's class; else the bytes of its file, in hex; else its code."""
    described = function if inspect.isroutine(function) else type(function)
    try:
        return inspect.getsource(described)
    except (OSError, TypeError):
        pass
    module = sys.modules.get(described.__module__ or "")
    file = vars(module).get("__file__") if module is not None else None
    if file is not None and Path(file).is_file():
        return Path(file).read_bytes().hex()
    return _code_text(function.__code__) if isinstance(function, FunctionType) else platform.python_version()


def function_identity(kind: str, function: Callable[..., Any] | PairSelector, name: str | None = None) -> str:
    """`kind:module.name@digest`: the digest is 16 hex digits of the SHA-256 of the function's source.

    The digest also takes plain values the function carries: defaults, closed-over values, an object's attributes. It
    doesn't see what the function calls or reads elsewhere; a change there needs another `name`. A judge loaded by
    import path (judges/python.py) has its whole file in its identity.
    """
    inner: Any = inspect.unwrap(function) if callable(function) else function
    text = _state_text(inner)
    while isinstance(inner, functools.partial):
        inner = inner.func
        text += _state_text(inner)
    named = inner if inspect.isroutine(inner) else type(inner)
    digest = hashlib.sha256((_source_text(inner) + text).encode(errors="surrogatepass")).hexdigest()[:16]
    return f"{kind}:{name or f'{named.__module__}.{named.__qualname__}'}@{digest}"


class PointwiseJudge:
    """A judge from f(prompt, completion) -> score or None. The score of a completion is what the function says."""

    kind = "pointwise"

    def __init__(self, function: PointwiseFunction, *, name: str | None = None, max_concurrency: int) -> None:
        functools.update_wrapper(self, function)  # first: it copies the function's own attributes over ours
        self.function = function
        self.calls = Calls(function, max_concurrency)
        self.identity = function_identity(self.kind, function, name)

    def __call__(self, prompt: Prompt, completion: Completion) -> Verdict | Awaitable[Verdict]:
        return self.function(prompt, completion)

    def count_verdicts(self, groups: Sequence[Group]) -> int:
        return sum(len(group.completions) for group in groups)

    def judge(self, groups: Sequence[Group], context: JudgeContext) -> list[Judgement]:
        """One judgement per group. JudgeError, naming prompt and completion: the function raised, or its value is no
        score.
        """
        wheres = [
            [f"judge {self.identity}, prompt {group.prompt.id}, completion {k}" for k in range(len(group.completions))]
            for group in groups
        ]
        calls: list[Call] = [
            (where, (group.prompt, completion))
            for group, row in zip(groups, wheres, strict=True)
            for where, completion in zip(row, group.completions, strict=True)
        ]
        values = iter(self.calls.make(calls, context.progress))
        judgements = []
        for group, row in zip(groups, wheres, strict=True):
            scores = tuple(as_score(next(values), where) for where in row)
            notes = tuple(NO_VERDICT if score is None else "" for score in scores)
            judgements.append(Judgement(group.prompt.id, scores, notes))
        return judgements


class PairwiseJudge:
    """A judge from f(prompt, a, b) -> P(a beats b) in [0, 1], or None for no verdict.

    Every two completions of a group are asked about in both orders and the swap is undone: p = (f(a, b) + 1 - f(b, a))
    / 2. Where the orders contradict each other (both favour the first completion, or both the second) the verdict is
    about the place and not the completion: the comparison is a tie, p = 0.5. Where either order is None the comparison
    is left out.

    The score of a completion is its mean p against the others, in [0, 1]; None where no comparison is left. A group
    of K completions takes K (K - 1) calls.
    """

    kind = "pairwise"
    compares = True

    def __init__(self, function: PairwiseFunction, *, name: str | None = None, max_concurrency: int) -> None:
        functools.update_wrapper(self, function)  # first: it copies the function's own attributes over ours
        self.function = function
        self.calls = Calls(function, max_concurrency)
        self.identity = function_identity(self.kind, function, name)

    def __call__(self, prompt: Prompt, a: Completion, b: Completion) -> Verdict | Awaitable[Verdict]:
        return self.function(prompt, a, b)

    def count_verdicts(self, groups: Sequence[Group]) -> int:
        return sum(len(group.completions) * (len(group.completions) - 1) for group in groups)

    def judge(self, groups: Sequence[Group], context: JudgeContext) -> list[Judgement]:
        """One judgement per group. JudgeError, naming prompt and completions: the function raised, or its value is no
        probability.
        """
        asked = [list(permutations(range(len(group.completions)), 2)) for group in groups]
        calls: list[Call] = [
            (self._where(group, i, j), (group.prompt, group.completions[i], group.completions[j]))
            for group, orders in zip(groups, asked, strict=True)
            for i, j in orders
        ]
        values = iter(self.calls.make(calls, context.progress))
        judgements = []
        for group, orders in zip(groups, asked, strict=True):
            first_wins = {(i, j): _as_probability(next(values), self._where(group, i, j)) for i, j in orders}
            judgements.append(win_rates(group, first_wins))
        return judgements

    def _where(self, group: Group, i: int, j: int) -> str:
        return f"judge {self.identity}, prompt {group.prompt.id}, completion {i} against {j}"


def _as_probability(value: object, where: str) -> float | None:
    probability = as_score(value, where)
    if probability is not None and not 0.0 <= probability <= 1.0:
        raise JudgeError(f"{where}: {probability} is no probability. Return P(a beats b) in [0, 1], or None.")
    return probability


def win_rates(
    group: Group, first_wins: Mapping[tuple[int, int], float | None], why: Mapping[tuple[int, int], str] | None = None
) -> Judgement:
    """Mean win rates from `first_wins[i, j]` = P(i beats j) as said when i was shown first; see PairwiseJudge. Each order is
    a verdict that was asked for. `why` says of orders without one what was wrong.
    """
    num_completions = len(group.completions)
    rates: dict[tuple[int, int], float] = {}
    flipped: set[tuple[int, int]] = set()
    for (i, j), forth in first_wins.items():
        back = first_wins.get((j, i))
        if forth is None or back is None:
            continue
        if (forth - 0.5) * (back - 0.5) > 0:
            flipped.add((i, j))
        rates[i, j] = 0.5 if (i, j) in flipped else (forth + 1 - back) / 2
    scores: list[float | None] = []
    notes: list[str] = []
    for i in range(num_completions):
        own = [rate for (one, _), rate in rates.items() if one == i]
        num_flips = sum(one == i for one, _ in flipped)
        scores.append(math.fsum(own) / len(own) if own else None)
        reason = next((note for places, note in (why or {}).items() if i in places), "")
        notes.append(_pairwise_note(num_completions - 1, len(own), num_flips, reason))
    # both hold (i, j) and (j, i)
    compared, contradicted = len(rates) // 2, len(flipped) // 2
    missing = Counter(
        first_line((why or {}).get(shown, NO_VERDICT)) for shown, forth in first_wins.items() if forth is None
    )
    return Judgement(
        group.prompt.id,
        tuple(scores),
        tuple(notes),
        num_compared=compared,
        num_flipped=contradicted,
        num_asked=len(first_wins),
        unparsed=dict(missing),
    )


def _pairwise_note(num_others: int, num_compared: int, num_flips: int, reason: str) -> str:
    if num_others == 0:
        return "nothing to compare with: the group has one completion"
    if num_compared == 0:
        return "no comparison got a verdict in both orders" + (f"; {reason}" if reason else "")
    missing = [f"{num_others - num_compared} of {num_others} comparisons without a verdict"]
    flips = [f"{num_flips} of {num_compared} comparisons changed with the order"]
    return "; ".join((missing if num_compared < num_others else []) + (flips if num_flips else []))


@overload
def pointwise(function: PointwiseFunction, /) -> PointwiseJudge: ...
@overload
def pointwise(
    *, name: str | None = None, max_concurrency: int = MAX_CONCURRENCY
) -> Callable[[PointwiseFunction], PointwiseJudge]: ...
def pointwise(
    function: PointwiseFunction | None = None, /, *, name: str | None = None, max_concurrency: int = MAX_CONCURRENCY
) -> PointwiseJudge | Callable[[PointwiseFunction], PointwiseJudge]:
    """f(prompt, completion) -> score, higher is better, or None for no verdict, as a judge. See PointwiseJudge."""
    if function is None:
        return functools.partial(PointwiseJudge, name=name, max_concurrency=max_concurrency)
    return PointwiseJudge(function, name=name, max_concurrency=max_concurrency)


@overload
def pairwise(function: PairwiseFunction, /) -> PairwiseJudge: ...
@overload
def pairwise(
    *, name: str | None = None, max_concurrency: int = MAX_CONCURRENCY
) -> Callable[[PairwiseFunction], PairwiseJudge]: ...
def pairwise(
    function: PairwiseFunction | None = None, /, *, name: str | None = None, max_concurrency: int = MAX_CONCURRENCY
) -> PairwiseJudge | Callable[[PairwiseFunction], PairwiseJudge]:
    """f(prompt, a, b) -> P(a beats b) in [0, 1] as a judge; always asked in both orders, and orders that contradict
    each other make a tie. See PairwiseJudge.
    """
    if function is None:
        return functools.partial(PairwiseJudge, name=name, max_concurrency=max_concurrency)
    return PairwiseJudge(function, name=name, max_concurrency=max_concurrency)
