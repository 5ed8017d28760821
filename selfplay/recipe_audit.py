"""The section `audit` of a recipe: what a judge is asked beside a round's own completions."""

from pydantic import NonNegativeInt

from selfplay.recipe_values import Section

DEFAULT_CANARIES = 4  # prompts; each is shown with four canaries
MODEL_KINDS = (
    "llm",
    "api",
    "reward_model",
)  # judges that can be talked into a verdict, or gamed by length and repetition


class AuditRecipe(Section):
    """The judge's audit of a round. `canaries` is on how many prompts (of each source) the judge is also shown completions
    that must lose (canaries.py); by default DEFAULT_CANARIES where a model judges (kinds llm, api and reward_model), else 0: a
    rule can't be talked into anything, some rules pass such texts by design, and what a program of the user costs is not known.

    `calibration` names labelled preference pairs, as `selfplay calibrate` reads them. The round's judge is asked about them in
    every round, beside the canaries: a judge that changes, such as the policy itself, may lose what it knew. It stops nothing.
    """

    canaries: NonNegativeInt | None = None
    calibration: str | None = None


class SourceAuditRecipe(Section):
    """The labelled pairs of a source's judge; judges of other sources may read other things."""

    calibration: str | None = None
