"""The section `judge` of a recipe."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from selfplay.recipe_values import Section, TopP


class VerifierRecipe(Section):
    """Named checks. The recipe's `checks` apply to every prompt, beside the checks that a prompt carries."""

    kind: Literal["verifier"]
    checks: list[dict[str, Any]] = []
    score: Literal["share", "all"] = "share"
    truncated_fails: bool = True


class LLMJudgeRecipe(Section):
    """A model reads the completion. `model: policy` is the current policy, on the engine that is already loaded."""

    kind: Literal["llm"]
    model: str = "policy"
    template: str = "additive"
    system_prompt: str | None = None
    verdict: Literal["parse", "labels"] = "parse"
    num_verdicts: PositiveInt = 1
    temperature: NonNegativeFloat = 0.7
    top_p: TopP = 0.9
    max_tokens: PositiveInt = 256


class PythonJudgeRecipe(Section):
    """A function or object of the user: "file.py:name" or "package.module:name". Runs only with --allow-code."""

    kind: Literal["python"]
    target: Annotated[str, Field(pattern=r"^[^:]+:[A-Za-z_]\w*$")]


class RougeLRecipe(Section):
    """ROUGE-L with the gold answer, in [0, 1]."""

    kind: Literal["rouge_l"]


class CoinRecipe(Section):
    """A coin flip for every completion: the control that must bring no gain."""

    kind: Literal["coin"]


JudgeRecipe = Annotated[
    VerifierRecipe | LLMJudgeRecipe | PythonJudgeRecipe | RougeLRecipe | CoinRecipe, Field(discriminator="kind")
]
