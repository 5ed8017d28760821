"""A judge made of rules. A check is a mapping with a `kind` and that kind's arguments:

    {"kind": "words", "min": 8}
    {"kind": "on_topic", "words": ["volcano", "lava", "magma"], "min": 2}
    {"kind": "any_of", "checks": [{"kind": "bullets", "min": 3}, {"kind": "sentences", "min": 3}]}

`CHECKS` holds every kind. The keyword arguments of its function are the arguments a check may have, and their types
are checked when prompts are loaded, not after hours of sampling.
"""

import difflib
import functools
import hashlib
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from selfplay.errors import DataError
from selfplay.judges.counts import LIST_MARKER, count_sentences, count_words, last_number
from selfplay.prompts import PromptPool
from selfplay.protocols import JudgeContext
from selfplay.recipe import Recipe
from selfplay.recipe_judges import VerifierRecipe
from selfplay.types import Completion, Group, Judgement, Prompt

# Part of the judge's identity: raise it when a change below can change a verdict.
VERSION = 2

Check = Mapping[str, Any]
Count = Annotated[int, Field(ge=0)]
Phrases = Annotated[Sequence[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
Checks = Annotated[Sequence[dict[str, Any]], Field(min_length=1)]


class _MissingGoldError(Exception):
    """The check compares with a gold answer that this prompt doesn't have: no verdict."""


def _within(count: int, low: int | None, high: int | None) -> bool:
    return (low is None or count >= low) and (high is None or count <= high)


def _need(gold: str | None) -> str:
    if gold is None:
        raise _MissingGoldError
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
        raise _MissingGoldError
    return have is not None and math.isfinite(have) and abs(have - want) <= tolerance


def _regex(text: str, gold: str | None, *, pattern: str, ignore_case: bool = False, match_gold: bool = False) -> bool:
    """The pattern is found; with `match_gold`, its first group (or all of it) in the last match is the gold answer."""
    found = list(re.finditer(pattern, text, re.IGNORECASE if ignore_case else 0))
    if not match_gold:
        return bool(found)
    want = _need(gold).strip()
    return bool(found) and (found[-1][1 if found[-1].re.groups else 0] or "").strip() == want


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


def _all_of(text: str, gold: str | None, *, checks: Checks) -> bool:
    return False not in [passes(check, text, gold) for check in checks]


def _any_of(text: str, gold: str | None, *, checks: Checks) -> bool:
    return True in [passes(check, text, gold) for check in checks]


CHECKS: dict[str, Callable[..., bool]] = {
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
    "all_of": _all_of,
    "any_of": _any_of,
}


@functools.cache
def _arguments(kind: str) -> dict[str, tuple[TypeAdapter[Any], bool]]:
    """Per argument of a kind: what it may hold, and whether it must be there."""
    hints = get_type_hints(CHECKS[kind], include_extras=True)
    parameters = inspect.signature(CHECKS[kind]).parameters.values()
    keyword = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return {p.name: (TypeAdapter(hints[p.name]), p.default is inspect.Parameter.empty) for p in keyword}


def validate_checks(checks: Sequence[Check], where: str) -> None:
    """Raises DataError at the first check that can't be run. `where` names the prompt or the recipe key."""
    for check in checks:
        kind = check.get("kind") if isinstance(check, Mapping) else None
        if not isinstance(kind, str):
            raise DataError(f'{where}: a check is a mapping with a "kind", not {check!r}')
        if kind not in CHECKS:
            near = difflib.get_close_matches(kind, CHECKS, n=1, cutoff=0.0)[0]
            raise DataError(f"{where}: no check of kind {kind!r}; the nearest is {near!r}, all are {', '.join(CHECKS)}")
        args = {name: value for name, value in check.items() if name != "kind"}
        if wrong := _wrong_argument(kind, args):
            raise DataError(f"{where}: check {kind!r}: {wrong}; its arguments are {', '.join(_arguments(kind))}")
        if "checks" in args:
            validate_checks(args["checks"], f"{where}: in {kind!r}")


def _wrong_argument(kind: str, args: dict[str, Any]) -> str:
    allowed = _arguments(kind)
    if unknown := [name for name in args if name not in allowed]:
        return f"no argument {unknown[0]!r}"
    if missing := [name for name, (_, required) in allowed.items() if required and name not in args]:
        return f"argument {missing[0]!r} is missing"
    for name, value in args.items():
        try:
            allowed[name][0].validate_python(value, strict=True)
        except ValidationError as e:
            return f"argument {name!r} is {value!r}: {e.errors()[0]['msg']}"
    return _wrong_together(kind, args)


def _wrong_together(kind: str, args: dict[str, Any]) -> str:
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
        try:
            re.compile(args["pattern"])
        except re.error as e:
            return f"pattern {args['pattern']!r} is no regular expression ({e})"
    return ""


def passes(check: Check, text: str, gold: str | None) -> bool:
    """Whether the text passes one valid check."""
    return CHECKS[check["kind"]](text, gold, **{name: value for name, value in check.items() if name != "kind"})


def kinds(checks: Sequence[Check]) -> list[str]:
    """The kinds of the checks, those inside all_of and any_of too, each once, in order."""
    nested = [[c["kind"], *kinds(c.get("checks", ()))] for c in checks]
    return list(dict.fromkeys(kind for group in nested for kind in group))


def on_topic(prompt: Prompt, completion: Completion) -> bool | None:
    """Whether the completion passes the prompt's on_topic checks; None where it has none."""
    verdicts = [passes(c, completion.text, prompt.gold) for c in prompt.checks if c["kind"] == "on_topic"]
    return False not in verdicts if verdicts else None


def check_prompts(prompts: Sequence[Prompt], checks: Sequence[Check]) -> None:
    """DataError where a prompt's check is none that we know, or where neither the recipe (`checks`) nor any prompt has one."""
    for prompt in prompts:
        validate_checks(prompt.checks, f"{prompt.source or prompt.id}: checks")
    if prompts and not checks and not any(prompt.checks for prompt in prompts):
        raise DataError(
            f"the verifier has nothing to check: none of {len(prompts)} prompts has checks (the first: {prompts[0].source}). "
            "Give the rows a column of checks (prompts.checks_column), or name some in judge.checks"
        )


def check_verifiable(recipe: Recipe, pool: PromptPool, *, judge_given: bool) -> None:
    """Reads the checks of all prompts that a verifier will judge, before anything is sampled."""
    if not judge_given and isinstance(recipe.judge, VerifierRecipe):
        check_prompts(pool.train, recipe.judge.checks)
    held = recipe.evaluate.judge if judge_given else recipe.heldout_judge
    if isinstance(held, VerifierRecipe):
        check_prompts(pool.heldout, held.checks)


class Verifier:
    """Runs `checks`, then the prompt's own checks, on every completion.

    The score is the share of checks passed, in [0, 1]; with `score="all"` it is 1.0 where all pass, else 0.0. A completion
    that max_tokens cut has 0.0 in both, unless `truncated_fails` is off. A prompt without any check, or without the
    gold answer that a check needs, gets None. Notes name the kinds that failed.
    """

    def __init__(
        self, checks: Sequence[Check] = (), score: Literal["share", "all"] = "share", *, truncated_fails: bool = True
    ) -> None:
        validate_checks(checks, "judge.checks")
        self.checks = tuple(checks)
        self.score = score
        self.truncated_fails = truncated_fails

    @property
    def identity(self) -> str:
        config = [VERSION, [dict(c) for c in self.checks], self.score, self.truncated_fails]
        return "verifier:" + hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]

    def judge(self, groups: Sequence[Group], context: JudgeContext) -> Sequence[Judgement]:
        for group in groups:
            validate_checks(group.prompt.checks, f"prompt {group.prompt.id}")
        return [self._judge_group(group) for group in groups]

    def _judge_group(self, group: Group) -> Judgement:
        verdicts = [self._verdict(group.prompt, completion) for completion in group.completions]
        return Judgement(group.prompt.id, tuple(s for s, _ in verdicts), tuple(note for _, note in verdicts))

    def _verdict(self, prompt: Prompt, completion: Completion) -> tuple[float | None, str]:
        checks = self.checks + prompt.checks
        if not checks:
            return None, "the prompt has no check"
        try:
            failed = [c["kind"] for c in checks if not passes(c, completion.text, prompt.gold)]
        except _MissingGoldError:
            return None, "a check compares with the gold answer, and the prompt has none that fits"
        if self.truncated_fails and completion.finish_reason == "length":
            return 0.0, ", ".join(["truncated", *failed])
        return (1 - len(failed) / len(checks) if self.score == "share" else float(not failed)), ", ".join(failed)
