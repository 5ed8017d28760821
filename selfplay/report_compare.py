"""Runs of one experiment side by side, as people see them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from selfplay.report import interval, make_table, number, print_alarm, print_table, safe_text
from selfplay.report_measure import print_measure


def print_comparison(found: Mapping[str, Any], console: Console) -> None:
    """Runs side by side and their mean gain, for each source where there are several; `found` is metrics.compare(runs)."""
    for name, own in found.get("sources", {"": found}).items():
        _print_compared_runs(own, f", source {name}" if name else "", console)
    for name in found.get("unscored", ()):
        console.print(f"source {name}: nobody scores its panel, so it has no gain", markup=False)


def _print_compared_runs(found: Mapping[str, Any], whose: str, console: Console) -> None:
    table = make_table("run", "score", "gain", "95 % interval", "greedy", "on topic", "length")
    for column in table.columns:
        column.no_wrap = True
    for row in found["runs"]:
        before, after = row["initial"], row["last"]

        def change(key: str, digits: int = 3, before: Any = before, after: Any = after) -> str:
            return f"{number(before[key], digits)} -> {number(after[key], digits)}"

        table.add_row(
            f"{safe_text(Path(row['run']).name)}, seed {row['seed']}",
            change("heldout_score"),
            number(row["gain"], 3, "+"),
            interval(row["gain_interval"], "+"),
            change("heldout_greedy"),
            change("on_topic"),
            change("mean_length", 0),
        )
    print_table(f"the initial and the last policy of each run, on the held-out prompts{whose}", table, console)
    print_measure(found["runs"][0]["last"], console)
    for row in found["runs"]:
        name = safe_text(Path(row["run"]).name)
        shares = [row[which]["unjudged"] for which in ("initial", "last")]
        if any(shares):
            console.print(Text(f"{name}: no verdict on a share of {' -> '.join(number(share) for share in shares)}"))
        for said, key in (("sampled", "gain"), ("greedy", "greedy_gain")):
            print_alarm(row[f"{key}_alarm"], console, f"{name}, {said}: ")
    for name, key in (("sampled", "gain"), ("greedy", "greedy_gain")):
        if found[key] is not None:
            between = interval(found[f"{key}_interval"], "+")
            console.print(f"mean gain of {len(found['runs'])} runs, {name}: {number(found[key], 3, '+')} {between}")
            if num_alarms := sum(row[f"{key}_alarm"] is not None for row in found["runs"]):
                alarm = f"{num_alarms} of these gains {'is' if num_alarms == 1 else 'are'} not to be trusted, nor is their mean"
                print_alarm(alarm, console)
    console.print("(95 % intervals: each run's over prompts, the mean's over runs and prompts together)")
