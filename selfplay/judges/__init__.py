"""Judges: verifier (rules), llm (a model reads), api (a model behind an endpoint reads), python (the user's own), reward_model
(a classifier scores), rouge_l and similarity (likeness to gold), coin (the control), combine (several of these). See
`make_judge`.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfplay.errors import RecipeError
from selfplay.protocols import Judge
from selfplay.recipe_judges import (
    DRAWN,
    ApiJudgeRecipe,
    CoinRecipe,
    CombineRecipe,
    JudgeRecipe,
    LLMJudgeRecipe,
    OneJudge,
    PythonJudgeRecipe,
    RougeLRecipe,
    SimilarityRecipe,
)
from selfplay.recipe_reward import RewardModelRecipe

OpenModel = Callable[[Path, Any], Any]  # a model's folder and its Chat to a generator


def make_judge(
    recipe: JudgeRecipe,
    *,
    allow_code: bool = False,
    open_model: OpenModel | None = None,
    made: dict[str, Judge] | None = None,
) -> Judge:
    """The judge that a recipe names. `open_model` opens a generator for an llm judge with a model of its own, from its folder
    and chat. `made` keeps the
    judges that were made with it, so that equal recipes share one.
    """
    made, key = {} if made is None else made, recipe.model_dump_json()
    if key not in made:
        if isinstance(recipe, CombineRecipe):
            made[key] = _combine(recipe, allow_code, open_model, made)
        else:
            made[key] = _one_judge(recipe, allow_code, open_model)
    return made[key]


def _combine(recipe: CombineRecipe, allow_code: bool, open_model: OpenModel | None, made: dict[str, Judge]) -> Judge:
    from selfplay.judges.combine import Combine, Member

    kinds = [member.judge.kind for member in recipe.judges]
    members = []
    for n, member in enumerate(recipe.judges):
        name = member.judge.kind if kinds.count(member.judge.kind) == 1 else f"{member.judge.kind} {n}"
        judge = make_judge(member.judge, allow_code=allow_code, open_model=open_model, made=made)
        members.append(Member(name, judge, member.weight))
    return Combine(members, how=recipe.how, normalize=recipe.normalize)


def _one_judge(recipe: OneJudge, allow_code: bool, open_model: OpenModel | None) -> Judge:
    if isinstance(recipe, CoinRecipe):
        from selfplay.judges.coin import Coin

        return Coin()
    if isinstance(recipe, RougeLRecipe):
        from selfplay.judges.rouge import RougeL

        return RougeL()
    if isinstance(recipe, SimilarityRecipe):
        from selfplay.judges.similarity import open_similarity

        return open_similarity(recipe.model)
    if isinstance(recipe, PythonJudgeRecipe):
        from selfplay.judges.python import load_python_judge
        from selfplay.judges.timed import TimedJudge

        loaded = load_python_judge(recipe.target, Path(), allow_code=allow_code)
        return loaded if recipe.timeout is None else TimedJudge(loaded, recipe.timeout)
    if isinstance(recipe, LLMJudgeRecipe):
        return _llm_judge(recipe, open_model)
    if isinstance(recipe, ApiJudgeRecipe):
        return _api_judge(recipe)
    if isinstance(recipe, RewardModelRecipe):
        from selfplay.judges.reward_model import open_reward_model

        return open_reward_model(recipe)
    from selfplay.judges.verifier import Verifier

    checks = tuple(recipe.checks)
    return Verifier(checks, score=recipe.score, truncated_fails=recipe.truncated_fails, ifeval=recipe.ifeval)


def _llm_judge(recipe: LLMJudgeRecipe, open_model: OpenModel | None) -> Judge:
    from selfplay.judges.llm import LLMJudge
    from selfplay.judges.template import load_template

    model, factory = ("policy", None) if recipe.model == "policy" else _own_model(recipe, open_model)
    return LLMJudge(
        load_template(recipe.template, Path()),
        verdict=recipe.verdict,
        num_verdicts=recipe.num_verdicts,
        **{key: value for key, value in recipe if key in DRAWN and value is not None},
        model=model,
        generator_factory=factory,
        system_prompt=recipe.system_prompt,
    )


def _own_model(recipe: LLMJudgeRecipe, open_model: OpenModel | None) -> tuple[str, Callable[[], Any]]:
    """What a judge's own model is, weights, tokenizer and template; and how it is opened."""
    from selfplay.model_files import tokenizer_digest
    from selfplay.models import load_chat, local_model
    from selfplay.recipe_chat import ChatRecipe
    from selfplay.store import weights_digest

    assert open_model is not None
    folder = local_model(recipe.model, recipe.model_revision)
    chat = load_chat(str(folder), recipe.chat or ChatRecipe(), key="judge.chat")
    asked = hashlib.sha256(f"{tokenizer_digest(folder)} {chat.template_digest_text}".encode()).hexdigest()[:16]
    return f"{weights_digest(folder)} chat {asked}", lambda: open_model(folder, chat)


def _api_judge(recipe: ApiJudgeRecipe) -> Judge:
    from selfplay.judges.api_key import read_key
    from selfplay.judges.template import load_template

    key = read_key(recipe)
    try:
        from selfplay.judges.api import ApiJudge
    except ModuleNotFoundError as error:
        raise RecipeError(f'judge.kind api needs the package {error.name}: pip install "selfplay-dpo[api]"') from error
    return ApiJudge(load_template(recipe.template, Path()), recipe, key)
