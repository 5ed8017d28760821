"""What a judge's model wrote when it had done thinking."""

from collections.abc import Sequence

THINKING = ("<think>", "</think>")


def after_thinking(text: str, tags: Sequence[str] = THINKING, *, may_be_inside: bool = False) -> str | None:
    """What stands behind the last closing tag; the whole text where nobody thought.

    None where the thinking has no end: it was opened and never closed; or, with `may_be_inside`, the text has no closing tag,
    for a chat template may have opened the thinking before it.
    """
    opening, closing = tags
    _, found, said = text.rpartition(closing)
    return None if opening in said or (may_be_inside and not found) else said
