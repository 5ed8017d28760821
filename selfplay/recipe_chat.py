"""The section `chat` of a recipe, and `judge.chat` of a judge with a model of its own."""

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from selfplay.recipe_values import Section


def _two_tags(tags: list[str]) -> list[str]:
    if tags[0] == tags[1]:
        raise ValueError("the two are the same; give what opens the thinking, and what closes it")
    return tags


ReasoningTags = Annotated[
    list[Annotated[str, Field(min_length=1)]], Field(min_length=2, max_length=2), AfterValidator(_two_tags)
]


class ChatRecipe(Section):
    """How messages become tokens, where the model's own chat template is missing or needs arguments."""

    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    reasoning_tags: ReasoningTags | None = None
