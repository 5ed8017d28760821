"""The section `chat` of a recipe, and `judge.chat` of a judge with a model of its own."""

from typing import Annotated, Any

from pydantic import Field

from selfplay.recipe_values import Section


class ChatRecipe(Section):
    """How messages become tokens, where the model's own chat template is missing or needs arguments."""

    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    reasoning_tags: Annotated[list[str], Field(min_length=2, max_length=2)] | None = None
