"""A judge made of rules. A check is a mapping with a `kind` and that kind's arguments:

    {"kind": "words", "min": 8}
    {"kind": "on_topic", "words": ["volcano", "lava", "magma"], "min": 2}
    {"kind": "any_of", "checks": [{"kind": "bullets", "min": 3}, {"kind": "sentences", "min": 3}]}

checks/ has every kind: rules.py those that a few lines decide, foreign.py those that other packages do. The keyword arguments
of a kind's function are the arguments that a check may have, and their types are checked when prompts are loaded, not after
hours of sampling.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Literal

from selfplay.errors import DataError, RecipeError
from selfplay.judges.checks import (
    CHECKS,
    Check,
    RunForeign,
    arguments,
    arguments_of,
    flat,
    kinds,
    passes,
    value,
    wrong_argument,
)
from selfplay.judges.checks.elsewhere import Elsewhere
from selfplay.judges.checks.foreign import FOREIGN
from selfplay.judges.checks.verdict import NoVerdictError
from selfplay.lazy_prompts import Prompts
from selfplay.prompts import PromptPool
from selfplay.protocols import JudgeContext
from selfplay.recipe import SourceView
from selfplay.recipe_judges import VerifierRecipe, judges_in
from selfplay.types import Completion, Group, Judgement, Prompt

# Part of the judge's identity: raise it when a change below can change a verdict.
VERSION = 3


def validate_checks(checks: Sequence[Check], where: str) -> None:
    """Raises DataError at the first check that can't be run, RecipeError where its package isn't installed. `where` names
    the prompt or the recipe key.
    """
    for check in checks:
        kind = check.get("kind") if isinstance(check, Mapping) else None
        if not isinstance(kind, str):
            raise DataError(f'{where}: a check is a mapping with a "kind", not {check!r}')
        if kind not in CHECKS:
            near = difflib.get_close_matches(kind, CHECKS, n=1, cutoff=0.0)[0]
            raise DataError(f"{where}: no check of kind {kind!r}; the nearest is {near!r}, all are {', '.join(CHECKS)}")
        args = arguments_of(check)
        if wrong := wrong_argument(kind, args):
            raise DataError(f"{where}: check {kind!r}: {wrong}; its arguments are {', '.join(arguments(kind))}")
        if kind in FOREIGN:
            FOREIGN[kind].require(kind, where)
        if "checks" in args:
            validate_checks(args["checks"], f"{where}: in {kind!r}")


def on_topic(prompt: Prompt, completion: Completion) -> bool | None:
    """Whether the completion passes the prompt's on_topic checks; None where it has none."""
    verdicts = [passes(c, completion.text, prompt.gold) for c in prompt.checks if c["kind"] == "on_topic"]
    return False not in verdicts if verdicts else None


def check_prompts(prompts: Sequence[Prompt], checks: Sequence[Check]) -> None:
    """DataError where a prompt's check is none that we know or can't be used with it, or where neither the recipe (`checks`)
    nor any prompt has one.
    """
    own: Sequence[Prompt] = prompts.with_checks if isinstance(prompts, Prompts) else [p for p in prompts if p.checks]
    for prompt in own:
        validate_checks(prompt.checks, f"{prompt.source or prompt.id}: checks")
    if prompts and not checks and not own:
        raise DataError(
            f"the verifier has nothing to check: none of {len(prompts)} prompts has checks (the first: {prompts[0].source}). "
            "Give the rows a column of checks (prompts.checks_column), or name some in judge.checks"
        )
    # a prompt at a time: there may be too many to hold
    _check_foreign(prompts if FOREIGN.keys() & kinds(checks) else own, checks)


def _check_foreign(prompts: Sequence[Prompt], checks: Sequence[Check]) -> None:
    """Puts the checks of other packages to the packages, with each prompt's gold answer."""
    used = {*kinds(checks), *(kind for prompt in prompts for kind in kinds(prompt.checks))}
    with Elsewhere(sorted(used)) as elsewhere:
        faults = [
            f"{prompt.source or prompt.id}: check {check['kind']!r}: {fault}"
            for prompt in (prompts if elsewhere.kinds else ())
            for check in flat((*checks, *prompt.checks))
            if check["kind"] in FOREIGN
            if (fault := elsewhere.fault(check["kind"], arguments_of(check), prompt.gold))
        ]
    if faults:
        more = f"\nand {len(faults) - 1} more like it; change or remove these rows" if len(faults) > 1 else ""
        raise DataError(faults[0] + more)


def check_verifiable(recipe: SourceView, pool: PromptPool, *, judge_given: bool) -> None:
    """Reads the checks of all prompts that a verifier will judge, before anything is sampled."""
    held = recipe.evaluate.judge if judge_given else recipe.heldout_judge
    key = "judge" if recipe.evaluate.judge is None else "evaluate.judge"
    for at, judge, prompts in (("judge", None if judge_given else recipe.judge, pool.train), (key, held, pool.heldout)):
        for one in judges_in(judge):
            if isinstance(one, VerifierRecipe):
                validate_checks(one.checks, f"{at}.checks")
                _check_pool(prompts, one)


def _check_pool(prompts: Prompts, judge: VerifierRecipe) -> None:
    check_prompts(prompts, judge.checks)
    if (
        prompts
        and judge.ifeval == "loose"
        and "ifeval" not in kinds(judge.checks)
        and not any("ifeval" in kinds(prompt.checks) for prompt in prompts.with_checks)
    ):
        raise RecipeError("judge.ifeval is loose, but neither judge.checks nor any prompt has a check of kind ifeval")


class Verifier:
    """Runs `checks`, then the prompt's own checks, on every completion.

    The score is the mean over checks of what each says, in [0, 1]: of rules, the share that is passed; with `score="all"` it
    is 1.0 where all are passed, else 0.0. A completion that max_tokens cut has 0.0 in both, unless `truncated_fails` is off. A
    prompt without any check, or without the gold answer that a check needs, gets None, and so does a completion that a
    check of another package gives no verdict on, or that a pattern takes too long for. Notes name the kinds that failed.
    `ifeval` says how checks of that kind are read.
    """

    def __init__(
        self,
        checks: Sequence[Check] = (),
        score: Literal["share", "all"] = "share",
        *,
        truncated_fails: bool = True,
        ifeval: Literal["strict", "loose"] = "strict",
    ) -> None:
        validate_checks(checks, "judge.checks")
        self.checks = tuple(checks)
        self.score = score
        self.truncated_fails = truncated_fails
        self.ifeval = ifeval

    @property
    def identity(self) -> str:
        config = [VERSION, [dict(c) for c in self.checks], self.score, self.truncated_fails, self.ifeval]
        return "verifier:" + hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]

    def judge(self, groups: Sequence[Group], context: JudgeContext) -> Sequence[Judgement]:
        for group in groups:
            validate_checks(group.prompt.checks, f"prompt {group.prompt.id}")
        used = kinds([*self.checks, *(check for group in groups for check in group.prompt.checks)])
        with Elsewhere(used) as elsewhere:
            return [self._judge_group(group, elsewhere.value) for group in groups]

    def _judge_group(self, group: Group, run_foreign: RunForeign) -> Judgement:
        verdicts = [self._verdict(group.prompt, completion, run_foreign) for completion in group.completions]
        return Judgement(group.prompt.id, tuple(s for s, _ in verdicts), tuple(note for _, note in verdicts))

    def _verdict(self, prompt: Prompt, completion: Completion, run_foreign: RunForeign) -> tuple[float | None, str]:
        checks = [self._read(check) for check in (*self.checks, *prompt.checks)]
        if not checks:
            return None, "the prompt has no check"
        try:
            values = [value(check, completion.text, prompt.gold, run_foreign) for check in checks]
        except NoVerdictError as error:
            return None, str(error)
        failed = [check["kind"] for check, found in zip(checks, values, strict=True) if found < 1]
        if self.truncated_fails and completion.finish_reason == "length":
            return 0.0, ", ".join(["truncated", *failed])
        return (sum(values) / len(values) if self.score == "share" else float(not failed)), ", ".join(failed)

    def _read(self, check: Check) -> Check:
        """The check as this verifier reads it."""
        if "checks" in check:
            return {**check, "checks": [self._read(one) for one in check["checks"]]}
        return {**check, "loose": True} if check["kind"] == "ifeval" and self.ifeval == "loose" else check
