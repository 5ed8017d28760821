"""Prompts, completions and pairs as people see them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfplay import store
from selfplay.report import number, print_table, safe_text, shown
from selfplay.types import Completion, Group, Judgement, PreferencePair, Prompt

NUM_COMPARED = 6


def print_compared(run: Path, figures: Mapping[str, Any], console: Console, *, count: int = NUM_COMPARED) -> None:
    """Held-out prompts with the first sampled completion of the initial and of the last policy side by side."""
    finished = [row["round"] for row in figures["rounds"] if row["mean_length"] is not None]
    if not finished:
        return
    before, after = _panel(run / "initial"), _panel(run / f"round-{finished[-1]:03d}")
    ids = sorted(before.keys() & after.keys())[:count]
    console.print(
        f"{len(ids)} held-out prompts, not chosen by hand: those with the smallest ids, which are hashes of their text. "
        "Of each policy the first completion is shown, with its score."
    )
    for id in ids:
        prompt, first, first_said = before[id]
        _, last, last_said = after[id]
        table = Table(expand=True, padding=(0, 2))
        table.add_column(f"initial policy{first_said}", ratio=1)
        table.add_column(f"policy of round {finished[-1]}{last_said}", ratio=1)
        table.add_row(_marked(first), _marked(last))
        print_table(f"prompt: {shown(prompt.text, 400)}", table, console)


def _marked(completion: Completion) -> Text:
    text = shown(completion.text) if completion.text else Text("(empty)")
    return text + Text(" [cut at max_tokens]") if completion.finish_reason == "length" else text


def _panel(folder: Path) -> dict[str, tuple[Prompt, Completion, str]]:
    """Prompt, first completion and what to say of its score, by prompt id."""
    found = {}
    figures = store.read_json(folder / "eval.json")
    for path in sorted(
        (folder / "heldout").rglob("temperature/*.jsonl")
    ):  # below the name of its source, if it has one
        groups = store.read_records(path, Group)
        judged = path.parent.with_name("temperature-judgements") / path.name
        own = figures.get("sources", {}).get(path.parent.parent.name, figures)
        compared = own.get("win_rate_against") is not None
        said = ["" if compared else f", score {number(None)}"] * len(groups)  # compared with itself nobody is
        if judged.exists():
            what = "win rate" if compared else "score"
            said = [f", {what} {number(judgement.scores[0], 2)}" for judgement in store.read_records(judged, Judgement)]
        for group, one in zip(groups, said, strict=True):
            found[group.prompt.id] = (group.prompt, group.completions[0], one)
    return found


def print_group(group: Group, judgement: Judgement | None, console: Console) -> None:
    """A prompt with its completions, their scores and notes."""
    console.print(Text(f"prompt {group.prompt.id} ({safe_text(group.prompt.source)})", style="bold"))
    for message in group.prompt.messages:
        console.print(Text(f"{safe_text(message.role)}: ") + shown(message.content))
    if group.prompt.gold is not None:
        console.print(Text("gold answer: ", style="bold") + shown(group.prompt.gold))
    for k, completion in enumerate(group.completions):
        score = "not judged" if judgement is None else f"score {number(judgement.scores[k])}"
        console.print(Text(f"completion {k}, {score}: ", style="bold") + _marked(completion))
        if judgement is not None and judgement.notes and judgement.notes[k]:
            console.print(Text("  note: ") + shown(judgement.notes[k]))


def print_pair(pair: PreferencePair, console: Console) -> None:
    """Which completions a pair holds."""
    chosen = "gold answer" if pair.chosen_index is None else f"completion {pair.chosen_index}"
    rejected = "gold answer" if pair.rejected_index is None else f"completion {pair.rejected_index}"
    rates = (
        ""
        if pair.chosen_win_rate is None
        else f", win rates {number(pair.chosen_win_rate)} and {number(pair.rejected_win_rate)}"
    )
    console.print(f"pair: chosen {chosen}, rejected {rejected}, margin {number(pair.margin)}{rates}")
