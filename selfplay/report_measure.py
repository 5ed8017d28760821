"""What the score of a panel is, for people."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text


def print_measure(figures: Mapping[str, Any], console: Console) -> None:
    """What a score is where it is a win rate, for each source where there are several."""
    for name, own in figures.get("sources", {"": figures}).items():
        if against := own.get("win_rate_against"):
            whose = f"score of {name}" if name else "score"
            told = f"{whose}: win rate against the {against}, P(a completion beats its own of the same prompt)"
            console.print(Text(f"{told}; its own is 0.5 by definition"), soft_wrap=True)
            if not console.is_terminal:
                console.print()
