"""The key of an endpoint, which stands in an environment variable and nowhere else."""

import os

from selfplay.errors import RecipeError
from selfplay.recipe_judges import ApiJudgeRecipe


def read_key(recipe: ApiJudgeRecipe) -> str | None:
    """The value of the variable that the recipe names; None where it names none. RecipeError where that is not set, is no
    text for a header, or where the recipe itself holds the key: it would be copied into the run.
    """
    name = recipe.api_key_env
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise RecipeError(
            f"judge.api_key_env: the environment variable {name} is not set; set it to the endpoint's key"
        )
    if not (key.isascii() and key.isprintable()):
        raise RecipeError(f"judge.api_key_env: the value of {name} can't be a key: it holds more than printable ASCII")
    if key in recipe.model_dump_json():
        raise RecipeError(f"judge: the value of {name} stands in this section; take it out, the variable is enough")
    return key
