"""Judges that compare completions, where a policy is to be measured: compared with those of the initial policy.

Win rates within a group say nothing from one policy to another: their mean is 1/2 whatever the policy. So on the held-out panel
a judge that compares is shown each completion beside the one that the initial policy wrote in the same place of the same
prompt, and the score is P(the completion beats it), as AlpacaEval's win rate is against the completions of one baseline.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path

from selfplay.errors import JudgeError, RecipeError, StorageError
from selfplay.judges.combine import Combine
from selfplay.judges.contract import judge_checked
from selfplay.judges.template import load_template
from selfplay.judges.unparsed import num_asked, unparsed
from selfplay.protocols import ComparingJudge, CountingJudge, Judge, JudgeContext, StagedJudge
from selfplay.recipe import Recipe, SourceView
from selfplay.recipe_judges import ApiJudgeRecipe, JudgeRecipe, LLMJudgeRecipe, OneJudge, PythonJudgeRecipe, judges_in
from selfplay.targets import num_parameters
from selfplay.types import Group, Judgement, derive_seed

OPPONENT = "initial policy"
EVEN = 0.5  # what the opponent's own completions score, without asking
_MIXED = (
    "some of the judges that are combined compare completions and some score each by itself: on the panel those would be win "
    "rates against the initial policy beside scores. Name judges of one kind"
)


class Against:
    """`judge`, whose score of completion k of a prompt is P(it beats completion k of `opponents`, by that judge, in both
    orders), in [0, 1]; None with the judge's note where it gives no verdict. `opponents` has the same prompts; where it
    has fewer completions they come again, as in a wider panel of a round between.
    """

    def __init__(self, judge: Judge, opponents: Sequence[Group]) -> None:
        self.inner = judge
        self.identity = identity_against(judge)
        self._opponents = opponents
        self._places = {group.prompt.id: place for place, group in enumerate(opponents)}

    def count_verdicts(self, groups: Sequence[Group]) -> int | None:
        if not isinstance(self.inner, CountingJudge):
            return None
        total = 0
        for group in groups:  # one at a time: a whole panel may be asked about
            count = self.inner.count_verdicts([replace(group, completions=(c, c)) for c in group.completions])
            if count is None:
                return None
            total += count
        return total

    def stage(self, folder: Path, note: Callable[[str], None]) -> AbstractContextManager[object]:
        """The judge's own block around a stage, where it has one."""
        return self.inner.stage(folder, note) if isinstance(self.inner, StagedJudge) else nullcontext()

    def judge(self, groups: Sequence[Group], context: JudgeContext) -> list[Judgement]:
        """One judgement per group. StorageError where an opponent is missing; JudgeError as of any judge."""
        found: list[list[Judgement]] = []
        done = 0
        for k, both in enumerate(self._both(groups)):
            # a judge may draw by prompt and place alone, and places are 0 and 1 each time
            told = replace(context, seed=derive_seed(context.seed, k), progress=_counted_from(context.progress, done))
            found.append(judge_checked(self.inner, both, told))
            done += (self.inner.count_verdicts(both) if isinstance(self.inner, CountingJudge) else None) or 0
        return [self._joined(group, row) for group, row in zip(groups, zip(*found, strict=True), strict=True)]

    def _both(self, groups: Sequence[Group]) -> list[list[Group]]:
        """For each place the groups of two: a policy's completion, then the opponent's."""
        against = [self._opponent(group) for group in groups]
        return [
            [
                replace(group, completions=(group.completions[k], other.completions[k % len(other.completions)]))
                for group, other in zip(groups, against, strict=True)
            ]
            for k in range(len(groups[0].completions))  # a panel has equally many of every prompt
        ]

    def _opponent(self, group: Group) -> Group:
        place = self._places.get(group.prompt.id)
        if place is None:
            raise StorageError(
                f"prompt {group.prompt.id}: the panel of the {OPPONENT} lacks completions to compare with; it is of other "
                "prompts, or files of it are gone"
            )
        return self._opponents[place]

    def _joined(self, group: Group, row: Sequence[Judgement]) -> Judgement:
        scores = tuple(judgement.scores[0] for judgement in row)
        for k, score in enumerate(scores):
            if score is not None and not 0 <= score <= 1:
                raise JudgeError(
                    f"judge {self.inner.identity}, prompt {group.prompt.id}, completion {k}: {score} is no probability, and "
                    "this judge says that it compares. Scores must be P(it beats another one), in [0, 1]"
                )
        return Judgement(
            group.prompt.id,
            scores,
            tuple(judgement.notes[0] for judgement in row),
            num_compared=sum(judgement.num_compared for judgement in row),
            num_flipped=sum(judgement.num_flipped for judgement in row),
            verdicts=tuple(chain.from_iterable(judgement.verdicts for judgement in row)),
            num_asked=sum(map(num_asked, row)),
            unparsed=dict(sum(map(unparsed, row), Counter[str]())),
        )


def _counted_from(progress: Callable[[int], None], before: int) -> Callable[[int], None]:
    return lambda done: progress(before + done)


def compares(judge: Judge | None) -> bool:
    """Whether a judge, or every one of a combination, gives win rates among the completions of a group."""
    if isinstance(judge, Combine):
        return all(compares(member.judge) for member in judge.members)
    return isinstance(judge, ComparingJudge) and judge.compares


def identity_against(judge: Judge) -> str:
    """What a judge that compares is called where it compares with the initial policy."""
    return f"{judge.identity} against the {OPPONENT}"


def measuring(judge: Judge | None, *, named: bool) -> Judge | None:
    """The judge of a panel; None where it is a combination that would add win rates to scores. RecipeError where that one was
    `named` for the panel.
    """
    members = [member.judge for member in judge.members] if isinstance(judge, Combine) else []
    if len({compares(member) for member in members}) < 2:
        return judge
    if named:
        raise RecipeError(f"evaluate.judge: {_MIXED}")
    return None


def recipe_compares(judge: JudgeRecipe | None) -> bool:
    """`compares` of the judge that a recipe names, as far as can be said without running a program."""
    judges = judges_in(judge)
    return bool(judges) and all(_compares(one) is True for one in judges)


def check_measuring(recipe: Recipe) -> None:
    """RecipeError where `measuring` would raise one."""

    def check(_: str, view: SourceView) -> None:
        if {True, False} <= {_compares(one) for one in judges_in(view.evaluate.judge)}:
            raise RecipeError(f"evaluate.judge: {_MIXED}")

    recipe.for_each(check)


def _compares(judge: OneJudge) -> bool | None:
    if isinstance(judge, LLMJudgeRecipe | ApiJudgeRecipe):
        return load_template(judge.template, Path()).head.mode == "pairwise"
    if isinstance(judge, PythonJudgeRecipe):
        count = num_parameters(judge.target)
        return None if count is None else count == 3
    return False
