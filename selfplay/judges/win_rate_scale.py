"""Are a judge's scores the win rates that pairing takes them for? Of a judge that asks a model its template says it."""

from pathlib import Path

from selfplay.errors import RecipeError
from selfplay.judges.template import load_template
from selfplay.recipe import SourceView
from selfplay.recipe_judges import ApiJudgeRecipe, CombineRecipe, LLMJudgeRecipe, judges_in, within_prompts
from selfplay.recipe_pairs import WinRatesRecipe


def check_win_rate_scale(view: SourceView) -> None:
    """RecipeError where pairs take the scores of a template about one completion as win rates, as they silently would those in
    [0, 1]. `Recipe` itself refuses judges that never compare; a template is a file, which reading a recipe does not open.
    """
    pairs, judge = view.pairs, view.judge
    if not isinstance(pairs, WinRatesRecipe) or pairs.win_rate_from != "scores" or within_prompts(judge):
        return
    also = ", or normalize: rank" if isinstance(judge, CombineRecipe) else ""
    for one in judges_in(judge):
        if not isinstance(one, LLMJudgeRecipe | ApiJudgeRecipe):
            continue
        head = load_template(one.template, Path()).head
        if head.mode == "pointwise":
            raise RecipeError(
                f"pairs.win_rate_from is scores, but judge.template {head.name} asks about one completion at a time, and its "
                "scores are no win rates: take a pairwise template, such as pairwise_helpfulness, or say win_rate_from: "
                f"order{also}"
            )
