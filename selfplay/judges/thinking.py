"""What a model wrote when it had done thinking, where its server leaves the thinking in the text."""

from collections.abc import Sequence


def after_thinking(text: str, tags: Sequence[str], *, cut: bool) -> str | None:
    """What stands behind the first closing tag; the whole text where nobody thought.

    None where the thinking has no end: it was opened and never closed; or max_tokens cut a text (`cut`) with neither tag, for
    the model's chat template may have opened it unseen.
    """
    opening, closing = tags
    _, found, after = text.partition(closing)
    if found:
        return after
    return None if cut or opening in text else text
