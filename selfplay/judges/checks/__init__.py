"""Every kind of check and its arguments."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from selfplay.judges.checks.foreign import FOREIGN
from selfplay.judges.checks.patterns import pattern_fault
from selfplay.judges.checks.rules import RULES

Check = Mapping[str, Any]
Checks = Annotated[Sequence[dict[str, Any]], Field(min_length=1)]
# What runs a check of FOREIGN: its kind, its arguments, the text and the gold answer.
RunForeign = Callable[[str, Mapping[str, Any], str, str | None], float]
COMBINED: dict[str, Callable[[Sequence[float]], float]] = {"all_of": min, "any_of": max}
CHECKS = (*RULES, *FOREIGN, *COMBINED)


def here(kind: str, args: Mapping[str, Any], text: str, gold: str | None) -> float:
    """Runs a check of another package in this process, without a time limit."""
    return FOREIGN[kind].value(text, gold, **args)


def value(check: Check, text: str, gold: str | None, run_foreign: RunForeign = here) -> float:
    """What one valid check says of a text, in [0, 1]; 1 is passed. A rule says 0 or 1. NoVerdictError where it can't tell."""
    kind, args = check["kind"], arguments_of(check)
    if kind in COMBINED:
        return COMBINED[kind]([value(one, text, gold, run_foreign) for one in args["checks"]])
    return run_foreign(kind, args, text, gold) if kind in FOREIGN else float(RULES[kind](text, gold, **args))


def passes(check: Check, text: str, gold: str | None) -> bool:
    """Whether the text passes one valid check."""
    return value(check, text, gold) == 1.0


def arguments_of(check: Check) -> dict[str, Any]:
    return {name: given for name, given in check.items() if name != "kind"}


def kinds(checks: Sequence[Check]) -> list[str]:
    """The kinds of the checks, those inside all_of and any_of too, each once, in order."""
    return list(dict.fromkeys(check["kind"] for check in flat(checks)))


def flat(checks: Sequence[Check]) -> list[Check]:
    """The checks and those inside all_of and any_of."""
    return [one for check in checks for one in (check, *flat(check.get("checks", ())))]


@functools.cache
def arguments(kind: str) -> dict[str, tuple[TypeAdapter[Any], bool]]:
    """Per argument of a kind: what it may hold, and whether it must be there."""
    if kind in COMBINED:
        return {"checks": (TypeAdapter(Checks), True)}
    function = FOREIGN[kind].value if kind in FOREIGN else RULES[kind]
    hints = get_type_hints(function, include_extras=True)
    keyword = [p for p in inspect.signature(function).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return {p.name: (TypeAdapter(hints[p.name]), p.default is inspect.Parameter.empty) for p in keyword}


def wrong_argument(kind: str, args: Mapping[str, Any]) -> str:
    """What is wrong with the arguments of a check, in words; empty where nothing is."""
    allowed = arguments(kind)
    if unknown := [name for name in args if name not in allowed]:
        return f"no argument {unknown[0]!r}"
    if missing := [name for name, (_, required) in allowed.items() if required and name not in args]:
        return f"argument {missing[0]!r} is missing"
    for name, given in args.items():
        try:
            allowed[name][0].validate_python(given, strict=True)
        except ValidationError as e:
            return f"argument {name!r} is {given!r}: {e.errors()[0]['msg']}"
    return _wrong_together(kind, args)


def _wrong_together(kind: str, args: Mapping[str, Any]) -> str:
    low, high = args.get("min"), args.get("max")
    if kind in ("words", "sentences", "paragraphs", "bullets"):
        if low is None and high is None:
            return "give 'min' or 'max'"
        if low is not None and high is not None and low > high:
            return f"min {low} is above max {high}"
    if kind == "on_topic" and low is not None and low > len(args["words"]):
        return f"min {low} is above the number of words, {len(args['words'])}"
    if kind == "contains" and args.get("any") is None and args.get("all") is None:
        return "give 'any' or 'all'"
    if kind == "regex":
        fault = pattern_fault(args["pattern"])
        return fault and f"pattern {args['pattern']!r} is no regular expression ({fault})"
    return ""
