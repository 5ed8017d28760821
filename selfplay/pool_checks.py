"""What can be known of a source's prompts before anything is sampled: are there enough, and have they what its judge and
pairing read?
"""

from pathlib import Path

from selfplay.errors import DataError, RecipeError
from selfplay.judges.checks import flat
from selfplay.judges.questions import Questions
from selfplay.judges.template import load_template
from selfplay.judges.verifier import check_prompts, check_verifiable
from selfplay.labelled import labelled_rows
from selfplay.prompts import PromptPool, check_gold
from selfplay.recipe import SourceView
from selfplay.recipe_judges import (
    ApiJudgeRecipe,
    LLMJudgeRecipe,
    OneJudge,
    RougeLRecipe,
    SimilarityRecipe,
    VerifierRecipe,
    judges_in,
)


def check_pool(view: SourceView, pool: PromptPool, *, judge_given: bool = False, selector_given: bool = False) -> None:
    """RecipeError where the pool runs out before the last round; DataError where prompts lack the gold answers or checks that
    pairing and judges read, or a check can't be run. A judge or selector of the user's own, where one is `given`, reads what
    nobody knows.
    """
    for index in range(view.rounds):
        dealt = pool.deal(view.prompts, index)
        if not selector_given:
            check_gold(view, dealt)
    check_verifiable(view, pool, judge_given=judge_given)
    _check_compared(view, pool, judge_given=judge_given)


def _check_compared(view: SourceView, pool: PromptPool, *, judge_given: bool) -> None:
    """Refuses a judge that compares with gold answers where no prompt has one: it would give no verdict at all. Where some
    have none, `pairs.max_unparsed` is the bound.
    """
    asked = [] if judge_given else [("judge", view.judge, pool.train, "prompts")]
    own = view.evaluate.judge is not None
    if own or not judge_given:
        asked.append(("evaluate.judge" if own else "judge", view.heldout_judge, pool.heldout, "held-out prompts"))
    for key, judge, prompts, what in asked:
        missing = prompts.without_gold
        for one in judges_in(judge) if missing and len(missing) == len(prompts) else ():
            if _compares(one):
                raise DataError(
                    f"{key}: {one.kind} compares with the gold answer, and none of {len(prompts)} {what} has one (the first: "
                    f"{missing[0].source}). Name their column in prompts.gold_column"
                )


def check_calibration(view: SourceView, *, judge_given: bool = False) -> None:
    """RecipeError where nobody would be asked about the labelled pairs of `audit.calibration`; DataError where they can't be
    read, or the recipe's judge could give no verdict on any.
    """
    if view.audit.calibration is None:
        return
    if view.judge is None and not judge_given:
        raise RecipeError("audit.calibration: there is no judge to test; name one in judge, or leave it out")
    try:
        rows, _ = labelled_rows(view.audit.calibration, view.prompts)
        prompts = [row.prompt for row in rows]
        for one in () if judge_given else judges_in(view.judge):
            if isinstance(one, VerifierRecipe):
                check_prompts(prompts, one.checks)
            if _compares(one) and all(prompt.gold is None for prompt in prompts):
                raise DataError(
                    f"{one.kind} compares with the gold answer, and none of {len(prompts)} labelled pairs has one: name their "
                    "column in prompts.gold_column"
                )
    except (DataError, RecipeError) as error:
        raise type(error)(f"audit.calibration: {error}") from error


def _compares(judge: OneJudge) -> bool:
    """Whether a judge has no verdict on a prompt without a gold answer."""
    if isinstance(judge, LLMJudgeRecipe | ApiJudgeRecipe):
        return Questions(load_template(judge.template, Path()), system_prompt=judge.system_prompt).needs_gold
    if isinstance(judge, VerifierRecipe):
        return any(check["kind"] in ("exact", "numeric") or check.get("match_gold") for check in flat(judge.checks))
    return isinstance(judge, RougeLRecipe | SimilarityRecipe)
