"""What a round would do with one source of prompts."""

from dataclasses import dataclass

from selfplay.canaries import WHAT
from selfplay.filters import make_mix
from selfplay.judges.against import OPPONENT, recipe_compares
from selfplay.labelled import labelled_rows
from selfplay.prompts import PromptPool
from selfplay.recipe import SourceView
from selfplay.recipe_filters import MixPreviousRecipe
from selfplay.recipe_judges import ApiJudgeRecipe, LLMJudgeRecipe, OneJudge, judges_in
from selfplay.recipe_values import at_round


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """One source of a round; `name` is "" where the recipe has one. Pairs are an upper bound: a prompt may give none."""

    name: str
    num_prompts: int
    first_prompt: int | None  # place in dealing order; None where every round gets the same
    takes_all: bool  # whether that is every prompt there is
    max_pairs: int
    judge: str
    num_verdicts: int | None  # that a judge which compares is asked for; None where each completion has its own score
    pairs: str  # the selector, and the filters after it
    audit: str  # what canaries and labelled pairs cost the judge, at most; empty where there are none

    @property
    def data(self) -> str:
        """Which prompts, in words."""
        if not self.num_prompts:
            return "none"
        if self.first_prompt is None:
            return "all" if self.takes_all else f"the first {self.num_prompts}"
        return f"{self.first_prompt} to {self.first_prompt + self.num_prompts - 1}"


def plan_source(name: str, recipe: SourceView, pool: PromptPool, index: int) -> SourcePlan:
    """The part of a source in a round. RecipeError where its pool would run out."""
    prompts = recipe.prompts
    counts = [len(pool.deal(prompts, r)) for r in range(index + 1)]
    num_completions = at_round(recipe.generator.num_completions, index)
    disjoint = prompts.deal == "disjoint" and prompts.num_prompts is not None
    return SourcePlan(
        name,
        num_prompts=counts[-1],
        first_prompt=sum(counts[:-1]) + 1 if disjoint else None,
        takes_all=counts[-1] == len(pool.train),
        max_pairs=_most_pairs(recipe, counts),
        judge=" + ".join(judge.kind for judge in judges_in(recipe.judge)) or "none",
        num_verdicts=counts[-1] * _verdicts_on(recipe, num_completions) if recipe_compares(recipe.judge) else None,
        pairs=" -> ".join([recipe.pairs.kind, *(one.kind for one in recipe.pairs.filters)]),
        audit=_audit(recipe, counts[-1], num_completions),
    )


def _audit(recipe: SourceView, num_prompts: int, num_completions: int) -> str:
    prompts = min(recipe.num_canaries, num_prompts)
    num_labelled = 0
    if num_prompts and recipe.audit.calibration is not None:
        num_labelled = len(labelled_rows(recipe.audit.calibration, recipe.prompts)[0])
    if not prompts and not num_labelled:
        return ""
    shown = [f"{len(WHAT)} canaries for each of {prompts} prompts"] if prompts else []
    shown += [f"{num_labelled} labelled pairs"] if num_labelled else []
    said, groups_of_two = " and ".join(shown), len(WHAT) * prompts + num_labelled
    if recipe_compares(recipe.judge):
        beside = num_prompts * _verdicts_on(recipe, num_completions)
        return f"{said}, {groups_of_two * _verdicts_on(recipe, 2):,} verdicts, beside {beside:,}"
    several = sum(_num_verdicts(one) for one in judges_in(recipe.judge))
    times = f" x {several} verdicts" if several > 1 else ""
    return f"{said}, {2 * groups_of_two} completions to judge{times}, beside {num_prompts * num_completions}"


def _verdicts_on(recipe: SourceView, num_completions: int) -> int:
    """The verdicts that a judge which compares is asked for on a group: each pair of its completions, in both orders."""
    return num_completions * (num_completions - 1) * sum(_num_verdicts(one) for one in judges_in(recipe.judge))


def comparisons(recipe: SourceView, num_prompts: int) -> str:
    """What judging the panels takes where the judge compares; empty where it scores. The initial policy's own takes nothing."""
    if not num_prompts or not recipe_compares(recipe.heldout_judge):
        return ""
    evaluate = recipe.evaluate
    between = evaluate.num_completions_between or evaluate.num_completions
    of_each = evaluate.num_completions + (recipe.rounds - 1) * between + recipe.rounds * evaluate.greedy
    count = num_prompts * of_each
    verdicts = 2 * count * sum(_num_verdicts(one) for one in judges_in(recipe.heldout_judge))
    return f"{count:,} comparisons with completions of the {OPPONENT}, {verdicts:,} verdicts"


def _num_verdicts(judge: OneJudge) -> int:
    return judge.num_verdicts if isinstance(judge, LLMJudgeRecipe | ApiJudgeRecipe) else 1


def _most_pairs(recipe: SourceView, num_prompts: list[int]) -> int:
    """The most pairs of a round that is dealt the last of `num_prompts`, those that it mixes in among them."""
    counts = [at_round(recipe.generator.num_completions, r) for r in range(len(num_prompts))]
    own = [n * recipe.pairs.most_pairs(r, counts[r]) for r, n in enumerate(num_prompts)]
    round = len(own) - 1
    for one in recipe.pairs.filters:
        if isinstance(one, MixPreviousRecipe):
            return own[-1] + make_mix(one, round).most_added(own)
    return own[-1]
