"""A filter by import path: a function of (pairs, context) in a file beside the recipe, or in a package."""

from collections.abc import Sequence
from pathlib import Path

from selfplay.errors import RecipeError
from selfplay.judges.python import load_target
from selfplay.protocols import FilterContext, PairFilter
from selfplay.types import PreferencePair


class LoadedFilter:
    """A user's filter with what tells its program from another one."""

    def __init__(self, function: PairFilter, identity: str) -> None:
        self.function = function
        self.identity = identity

    def __call__(self, pairs: Sequence[PreferencePair], context: FilterContext, /) -> Sequence[PreferencePair]:
        return self.function(pairs, context)


def load_filter(target: str, base: Path, *, allow_code: bool) -> LoadedFilter:
    """The filter that `target` names; a file is looked for in `base`.

    SecurityError unless `allow_code`; RecipeError: nothing there, no function, or it raised on import.
    """
    key = "pairs.filters.target"
    found, identity = load_target(target, base, key=key, error=RecipeError, allow_code=allow_code)
    if isinstance(found, type) or not callable(found):
        raise RecipeError(f"{key} {target!r} is no function of (pairs, context).")
    return LoadedFilter(found, f"python:{identity}")
