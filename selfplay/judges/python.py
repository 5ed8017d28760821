"""A judge by import path: "my_judges.py:shorter" (a file beside the recipe) or "package.module:name".

That is a program, and a recipe may come from a stranger: nothing of it runs unless the user allowed it.
"""

import difflib
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from selfplay.errors import JudgeError, RecipeError, SecurityError, SelfplayError
from selfplay.judges.contract import Blamed
from selfplay.judges.lift import MAX_CONCURRENCY, PairwiseJudge, PointwiseJudge
from selfplay.protocols import ComparingJudge, CountingJudge, Judge, JudgeContext, StagedJudge
from selfplay.types import Group, Judgement


@runtime_checkable
class _Judging(Protocol):
    def judge(self, groups: Sequence[Group], context: JudgeContext) -> Sequence[Judgement]: ...


class LoadedJudge:
    """A judge from a user's file. Its identity holds the SHA-256 of the file, so that any change in it counts."""

    def __init__(self, inner: _Judging, identity: str) -> None:
        self.inner = inner
        own = inner.identity if isinstance(inner, Judge) else ""
        self.identity = f"{identity} {own}".strip()

    def count_verdicts(self, groups: Sequence[Group]) -> int | None:
        return self.inner.count_verdicts(groups) if isinstance(self.inner, CountingJudge) else None

    @property
    def compares(self) -> bool:
        """Whether the judge says that it compares completions."""
        return isinstance(self.inner, ComparingJudge) and self.inner.compares

    def running(self) -> list[str]:
        """Where the calls stand that have begun and not ended; nothing where the judge takes groups as a whole."""
        return list(self.inner.calls.running) if isinstance(self.inner, PointwiseJudge | PairwiseJudge) else []

    def judge(self, groups: Sequence[Group], context: JudgeContext) -> Sequence[Judgement]:
        return self.inner.judge(groups, context)

    def stage(self, folder: Path, note: Callable[[str], None]) -> AbstractContextManager[object]:
        """The judge's own block around a stage, where it has one."""
        return self.inner.stage(folder, note) if isinstance(self.inner, StagedJudge) else nullcontext()


def load_python_judge(target: str, base: Path, *, allow_code: bool) -> LoadedJudge:
    """The judge that `target` names; a file is looked for in `base`, the recipe's folder.

    A function of 2 parameters (prompt, completion) becomes a pointwise judge, one of 3 (prompt, a, b) a pairwise one;
    an object with a `judge` method is used as it is. A file's folder joins the end of `sys.path`, so that it can import
    its neighbours; those aren't part of the identity.

    SecurityError unless `allow_code`; RecipeError: nothing there, or nothing that judges; JudgeError: it raised on
    import.
    """
    found, identity = load_target(target, base, key="judge.target", error=JudgeError, allow_code=allow_code)
    return LoadedJudge(as_judge(found, f"judge.target {target!r}"), f"python:{identity}")


def load_target(
    target: str, base: Path, *, key: str, error: type[SelfplayError], allow_code: bool
) -> tuple[object, str]:
    """What `target` names, and a text with the SHA-256 of its source. `key` is its place in the recipe, for messages.

    SecurityError unless `allow_code`; RecipeError where nothing is there; `error` where it raised on import.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise RecipeError(f'{key} {target!r}: write "file.py:name" or "package.module:name".')
    if not allow_code:
        raise SecurityError(
            f"{key} {target!r} is a program that this recipe wants to run. "
            "Read it first; then pass --allow-code to allow it."
        )
    where, is_file = f"{key} {target!r}", place.endswith(".py")
    module, digest = _load_file(base / place, where, error) if is_file else _import_module(place, where, error)
    if name not in vars(module):
        close = difflib.get_close_matches(name, vars(module), n=1)
        hint = f'; did you mean "{close[0]}"?' if close else ""
        raise RecipeError(f"{where}: {place} has no {name!r}{hint}")
    # the name of a file and not its path: a run and its recipe can be moved
    shown = f"{Path(place).name if is_file else place}:{name}"
    return vars(module)[name], f"{shown} sha256:{digest}"


def _load_file(path: Path, where: str, error: type[SelfplayError]) -> tuple[ModuleType, str]:
    """The executed file and its SHA-256. What is hashed is what runs: compiled cache files are not used."""
    try:
        source = path.read_bytes()
    except OSError as reason:
        raise RecipeError(f"{where}: can't read {path} ({reason.strerror}).") from reason
    digest = hashlib.sha256(source).hexdigest()
    name = f"selfplay_user_{path.stem}_{digest[:8]}"
    spec = spec_from_file_location(name, path)
    assert spec is not None
    module = module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that a neighbour can't stand in for an installed module
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    with Blamed(f"{where}: {path.name} failed on import", error):
        exec(compile(source, str(path), "exec"), vars(module))
    return module, digest


def _import_module(place: str, where: str, error: type[SelfplayError]) -> tuple[ModuleType, str]:
    """The imported module and the SHA-256 of its source file."""
    with Blamed(f"{where}: {place} failed on import", error):
        try:
            spec = find_spec(place)
        except ModuleNotFoundError:  # of a parent package
            spec = None
        if spec is not None and spec.has_location and spec.origin is not None:
            module = importlib.import_module(place)
            return module, hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()
    raise RecipeError(
        f"{where}: no module {place} with a file can be imported here. "
        'A file beside the recipe is written "file.py:name".'
    )


def own_judge(given: object) -> Judge:
    """What a user passed as a judge: a Judge as it is, a plain function lifted. RecipeError for anything else."""
    found = as_judge(given, "judge")
    if not isinstance(found, Judge):
        raise RecipeError(
            f"judge is a {type(given).__name__} without an `identity`: give it a text that changes when its verdicts could"
        )
    return found


def as_judge(found: object, target: str) -> _Judging:
    if isinstance(found, type):
        raise RecipeError(f"{target} is a class; name an object of it: `my_judge = {found.__name__}()`.")
    if isinstance(found, _Judging):
        return found
    if not callable(found):
        raise RecipeError(f"{target} is a {type(found).__name__}: neither a function nor an object with `judge`.")
    match _num_parameters(found, target):
        case 2:
            return PointwiseJudge(found, max_concurrency=MAX_CONCURRENCY)
        case 3:
            return PairwiseJudge(found, max_concurrency=MAX_CONCURRENCY)
    raise RecipeError(
        f"{target}: a judge function takes (prompt, completion) or (prompt, a, b); "
        f"this one takes {inspect.signature(found)}."
    )


def _num_parameters(function: Callable[..., Any], target: str) -> int:
    """How many parameters must be given by place; -1 where one must be given by name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{target}: its parameters can't be read; write a plain function around it.") from error
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return -1 if any(p.kind is p.KEYWORD_ONLY for p in required) else len(required)
