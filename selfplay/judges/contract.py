"""What a judge hands back is checked here, where it enters; everything after this point trusts judgements.

Two promises: a score is a finite float or None, never a stand-in; and a judge can't change the records it was shown.
Prompts are the only records with fields that can be edited in place (`tools`, `checks`, `meta`), so a judge gets copies
of them, and a copy that comes back edited is an error: a judge that edits its input sees its own edits in the next
call.
"""

import copy
import math
import numbers
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType

from selfplay.errors import JudgeError, SelfplayError, UnparsedGateError
from selfplay.judges.unparsed import count_verdicts, unparsed, unscored
from selfplay.protocols import Judge, JudgeContext
from selfplay.types import Group, Judgement, Prompt, completions_digest

NOTES_SHOWN = 3
PROMPTS_SHOWN = 3


class Blamed:
    """A `with` block around foreign code: whatever it raises becomes a JudgeError (or another `error`) that says where,
    chained to the cause.

    SystemExit too, else a judge that calls `sys.exit(0)` would end the run as a success. Ctrl-C and selfplay's own
    errors pass: they say where already, and keep their exit code.
    """

    def __init__(self, where: str, error: type[SelfplayError] = JudgeError) -> None:
        self.where = where
        self.error = error

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if isinstance(error, Exception | SystemExit) and not isinstance(error, SelfplayError):
            raise self.error(f"{self.where}: {type(error).__name__}: {error}") from error


def as_score(value: object, where: str) -> float | None:
    """`value` as a finite float, or None. bool and numpy scalars are converted; anything else is a JudgeError at
    `where`.
    """
    if value is None:
        return None
    if not isinstance(value, numbers.Real):
        import numpy as np  # np.bool_ is the one numpy scalar that isn't registered as a number

        if not isinstance(value, np.bool_):
            raise JudgeError(
                f"{where}: the score {value!r} is a {type(value).__name__}. Return a float, or None for no verdict."
            )
    try:
        score = float(value)
    except OverflowError:
        score = math.inf
    if not math.isfinite(score):
        raise JudgeError(f"{where}: the score is {score}. Return a finite number, or None for no verdict.")
    return score


def _check_notes(judgement: Judgement, where: str) -> tuple[str, ...]:
    notes = judgement.notes
    if not isinstance(notes, tuple | list) or not all(isinstance(note, str) for note in notes):
        raise JudgeError(f"{where}: `notes` must be a tuple of texts, one per completion; found {notes!r}.")
    if len(notes) > len(judgement.scores):
        raise JudgeError(f"{where}: {len(notes)} notes for {len(judgement.scores)} completions. One per completion.")
    return (*notes, *[""] * (len(judgement.scores) - len(notes)))


def _check_verdicts(judgement: Judgement, where: str) -> tuple[tuple[float | None, ...], ...]:
    rows = judgement.verdicts
    if not isinstance(rows, tuple | list) or not all(isinstance(row, tuple | list) for row in rows):
        raise JudgeError(f"{where}: `verdicts` must be a tuple of tuples, one per question; found {rows!r}.")
    return tuple(tuple(as_score(value, f"{where}, question {n}") for value in row) for n, row in enumerate(rows))


def _check_counts(judgement: Judgement, where: str) -> None:
    asked, missing = judgement.num_asked, judgement.unparsed
    counts = isinstance(missing, dict) and all(
        isinstance(why, str) and isinstance(count, int) and count > 0 for why, count in missing.items()
    )
    if not counts or not (asked is None or (isinstance(asked, int) and asked >= 0)):
        raise JudgeError(
            f"{where}: `num_asked` must be a count or None, and `unparsed` counts by reason; found {asked!r}, {missing!r}."
        )
    if sum(missing.values()) > (asked or 0):
        raise JudgeError(f"{where}: `unparsed` counts {sum(missing.values())} verdicts, but num_asked is {asked}.")


def _check_one(group: Group, judgement: object, judge_identity: str) -> Judgement:
    where = f"judge {judge_identity}, prompt {group.prompt.id}"
    if not isinstance(judgement, Judgement):
        raise JudgeError(f"{where}: expected a Judgement, found {type(judgement).__name__}.")
    if judgement.prompt_id != group.prompt.id:
        raise JudgeError(
            f"{where}: the judgement in this place is for prompt {judgement.prompt_id!r}. "
            "Return them in the groups' order."
        )
    if not isinstance(judgement.scores, tuple | list):
        raise JudgeError(f"{where}: `scores` must be a tuple, found {type(judgement.scores).__name__}.")
    if len(judgement.scores) != len(group.completions):
        raise JudgeError(
            f"{where}: {len(judgement.scores)} scores for {len(group.completions)} completions. "
            "One score per completion, None for no verdict."
        )
    scores = tuple(as_score(score, f"{where}, completion {k}") for k, score in enumerate(judgement.scores))
    compared, flipped = judgement.num_compared, judgement.num_flipped
    if not (isinstance(compared, int) and isinstance(flipped, int) and 0 <= flipped <= compared):
        raise JudgeError(f"{where}: num_compared {compared!r} and num_flipped {flipped!r} are no such counts.")
    notes, verdicts = _check_notes(judgement, where), _check_verdicts(judgement, where)
    _check_counts(judgement, where)
    digest = completions_digest(group.completions)
    return replace(judgement, scores=scores, notes=notes, verdicts=verdicts, completions_digest=digest)


def check_judgements(groups: Sequence[Group], judgements: object, judge_identity: str) -> list[Judgement]:
    """The judgements with every score a finite float or None and one note per score ("" where the judge gave none).

    JudgeError, naming the judge and the prompt: not a list or tuple, another count than `groups`, another order,
    another number of scores than completions, a score that is NaN, infinite or no number.
    """
    if not isinstance(judgements, list | tuple):
        raise JudgeError(f"judge {judge_identity}: expected a list of judgements, found {type(judgements).__name__}.")
    if len(judgements) != len(groups):
        raise JudgeError(
            f"judge {judge_identity}: {len(judgements)} judgements for {len(groups)} groups ({named(groups)}). "
            "Return one per group, in the groups' order."
        )
    return [_check_one(group, found, judge_identity) for group, found in zip(groups, judgements, strict=True)]


def named(groups: Sequence[Group]) -> str:
    """The first few prompts, for a message."""
    shown = ", ".join(group.prompt.id for group in groups[:PROMPTS_SHOWN])
    return f"prompts {shown}" + (", ..." if len(groups) > PROMPTS_SHOWN else "")


def _copied(prompt: Prompt) -> Prompt:
    return replace(
        prompt,
        tools=copy.deepcopy(prompt.tools),
        checks=copy.deepcopy(prompt.checks),
        meta=copy.deepcopy(prompt.meta),
    )


def judge_checked(judge: Judge, groups: Sequence[Group], context: JudgeContext) -> list[Judgement]:
    """One checked judgement per group, in order. The judge sees copies, so `groups` can't change.

    JudgeError: the judge raised, changed what it was shown, or handed back something `check_judgements` refuses.
    """
    identity = judge.identity
    if not isinstance(identity, str) or not identity:
        raise JudgeError(
            f"a judge's identity must be a text that isn't empty; {type(judge).__name__} has {identity!r}."
        )
    shown = [replace(group, prompt=_copied(group.prompt)) for group in groups]
    with Blamed(f"judge {identity} raised on {named(groups)}"):
        judgements = judge.judge(list(shown), context)
    for group, seen in zip(groups, shown, strict=True):
        if seen != group:
            raise JudgeError(
                f"judge {identity} changed the prompt {group.prompt.id} it was shown (tools, checks or meta). "
                "Work on a copy: `copy.deepcopy(prompt.meta)`."
            )
    return check_judgements(groups, judgements, identity)


def check_unparsed(judgements: Sequence[Judgement], max_unparsed: float, *, judge_identity: str = "") -> None:
    """UnparsedGateError where more than the share `max_unparsed` of the verdicts could not be read, or of the completions
    has no score. Both count: a completion has a score as soon as one of several verdicts on it can be read, and a prompt
    that can't be asked about at all costs no verdict.
    """
    counted = count_verdicts(judgements)
    if not counted.exceeds(max_unparsed):
        return
    reasons: Counter[str] = Counter()
    for judgement in judgements:
        reasons.update(unparsed(judgement) or unscored(judgement))
    listed = "\n".join(f"  {count} x {reason}" for reason, count in reasons.most_common(NOTES_SHOWN))
    whose = f" of judge {judge_identity}" if judge_identity else ""
    raise UnparsedGateError(
        f"{counted.unparsed_share:.1%} of the {counted.num_asked} verdicts{whose} could not be read, and "
        f"{counted.unscored_share:.1%} of the {counted.num_completions} completions got no score; at most "
        f"{max_unparsed:.1%} of either may. The most frequent reasons:\n{listed}\n"
        "Change the judge (its template, max_tokens, model), or allow more with a higher max_unparsed; "
        "completions without a score never enter a pair."
    )
