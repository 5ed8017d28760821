"""What people see of a run: tables, the gain, and completions side by side.

Text that a model or a data set wrote goes through `safe_text` before it reaches a terminal.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfplay import store
from selfplay.evaluate import unjudged_share
from selfplay.recipe_file import parse_yaml
from selfplay.report_measure import print_measure

PLAIN_WIDTH = 110  # columns of a table that goes to a file or a pipe
MAX_SHOWN = 900  # characters of one completion

# Whole escape sequences, so that no "[31m" is left standing: CSI, terminated OSC/DCS/APC strings, two-character ones.
# What is no whole sequence loses its escape character below.
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[ -/]*[0-OQ-WYZ\\`-~]")
_BIDI = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)])  # they reorder text around them


def safe_text(text: str) -> str:
    """`text` without terminal escapes, control characters other than newline and tab, and direction overrides; lone
    surrogates, which no terminal takes, become U+FFFD.
    """
    text = _ESCAPES.sub("", text).replace("\r\n", "\n").replace("\r", "\n").translate(_BIDI)
    kinds = [(char, unicodedata.category(char)) for char in text]
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if kind == "Cs" else char for char, kind in kinds if kind != "Cc" or char in "\n\t"
    )


def shown(text: str, limit: int = MAX_SHOWN) -> Text:
    """Safe text for a table or a line, never read as markup; cut after `limit` characters."""
    safe = safe_text(text)
    return Text(safe if len(safe) <= limit else safe[:limit] + " ...")


def make_console() -> Console:
    """Standard output; of a fixed width where it is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def print_run(run: Path, figures: Mapping[str, Any], console: Console) -> None:
    """The tables of a run and its gain; `figures` is metrics.status(run)."""
    recipe, _ = parse_yaml(store.read_bytes(run / "recipe.yaml").decode(), str(run / "recipe.yaml"))
    print_panel(figures, console, temperature=recipe["evaluate"]["temperature"])
    done = [row for row in figures["rounds"] if row["state"] == "done"]
    if done:
        print_table("training", training_table(done), console)
        if any("sources" in row for row in done):
            print_table("training, by source", sources_table(done), console)
        print_table("dropped, by reason", drops_table(done, figures["prompts"]), console)
        # runs from before there were filters have none
        filtered = [(row["round"], count) for row in done for count in row["counts"].get("filters", [])]
        for index, count in filtered:
            console.print(Text(f"round {index}, filter {filter_line(count)}"))
        if filtered:
            console.print()
    audited = [own for row in done for own in _audited(row) if own["audit"] is not None]
    if audited:
        print_table("audit of the judge", audit_table(audited), console)
        if asked := figures["initial"].get("judge_usage"):
            cost = "" if asked["cost"] is None else f", cost {number(asked['cost'], 4)}"
            console.print(f"the panel of the initial policy: {asked['num_calls']} calls{cost}")
        for row in audited:
            if row["audit"].get("canaries"):  # rounds from before there were canaries have none
                said = f"round {row['round']}, canaries that lost: {canary_line(row['audit']['canaries'])}"
                console.print(Text(said), soft_wrap=True)
            for line in audit_lines(row["audit"]):
                console.print(Text(f"round {row['round']}, {line}"), soft_wrap=True)
            print_alarms(row, console)
        _print_calibrated(done[-1], console)
    print_table("seconds of each stage", seconds_table(figures), console)
    for row in figures["rounds"]:
        if row["state"] != "done":
            count = f" {row['num_done']} of {row['num_prompts']} prompts" if "num_done" in row else ""
            console.print(f"round {row['round']}: not finished, {row['state']}{count} so far")
    print_gain(figures, console)


def print_table(title: str, table: Table, console: Console) -> None:
    """A table under its title; a title of the table's own would be wrapped to the table's width."""
    console.print(Text(title, style="bold"))
    # rules are drawn for eyes at a terminal; a log or a README wants the columns alone
    table.box = SIMPLE_HEAD if console.is_terminal else None
    table.pad_edge = False
    console.print(table)
    if not console.is_terminal:
        console.print()


def make_table(first: str, *columns: str) -> Table:
    table = Table()
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def number(value: float | None, digits: int = 3, sign: str = "") -> str:
    """A figure, or "-" where it could not be had."""
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def interval(value: Sequence[float] | None, sign: str = "") -> str:
    return "-" if value is None else f"[{value[0]:{sign}.3f}, {value[1]:{sign}.3f}]"


def print_panel(figures: Mapping[str, Any], console: Console, *, temperature: float) -> None:
    """The held-out panel: a row for the initial policy and one for each round's, and below it one for each source."""
    rows = [part for name, row in (("initial", figures["initial"]), *_policies(figures)) for part in _parts(name, row)]
    print_table(_panel_title(temperature), panel_table(rows), console)
    print_measure(figures["initial"], console)


def print_policy(name: str, figures: Mapping[str, Any], console: Console, *, temperature: float) -> None:
    """The held-out panel of one policy; `figures` is its eval.json."""
    print_table(_panel_title(temperature), panel_table(_parts(safe_text(name), figures)), console)
    print_measure(figures, console)


def _parts(name: str, figures: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """A policy's figures, and those of each source that holds prompts out."""
    sources = figures.get("sources", {}).items()
    return [(name, figures), *((f"  {source}", own) for source, own in sources if own["mean_length"] is not None)]


def _audited(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What the audit of a round is of: its judge, or each source's."""
    sources = row.get("sources", {})
    return [{**own, "round": f"{row['round']}, {name}"} for name, own in sources.items()] if sources else [row]


def _panel_title(temperature: float) -> str:
    return f"held-out prompts (temperature {temperature:g}; length in tokens; entropy and KL in nats per token)"


def _policies(figures: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(f"round {row['round']}", row) for row in figures["rounds"] if row["mean_length"] is not None]


def panel_table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """A row per policy. Lengths are tokens, entropy and KL nats per token; length to KL are of the sampled completions. Where
    the judge gave no verdict on some, a column says on what share.
    """
    unjudged = any(_unjudged(row) for _, row in rows)
    columns = ("score", "95 % interval", "greedy", "on topic", "length", "truncated", "entropy", "KL")
    table = make_table("policy", *columns, *(["no verdict"] if unjudged else []))
    for name, row in rows:
        table.add_row(
            name,
            number(row["heldout_score"]),
            interval(row["heldout_interval"]),
            number(row["heldout_greedy"]),
            number(row["on_topic"]),
            number(row["mean_length"], 1),
            number(row["truncated"]),
            number(row["entropy"]),
            number(row["kl"], 4),
            *([number(_unjudged(row))] if unjudged else []),
        )
    return table


def _unjudged(panel: Mapping[str, Any]) -> float | None:
    """What `metrics.panel_row` says of it, or the panel's own figures."""
    found: float | None = panel["unjudged"] if "unjudged" in panel else unjudged_share(panel)
    return found


def training_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row per finished round: what went in, what came out, and how training went."""
    columns = ("prompts", "completions", "pairs", "no pair", "steps", "loss first -> last", "accuracy", "margin")
    table = make_table("round", *columns)
    for row in rows:
        counts, train = row["counts"], row["train"]
        table.add_row(
            str(row["round"]),
            str(counts["num_prompts"]),
            str(counts["num_completions"]),
            str(counts["num_pairs"]),
            str(sum(counts["num_prompts_without_pair"].values())),
            str(train["num_steps"]),
            f"{train['loss_first']:.3f} -> {train['loss_last']:.3f}",
            number(train["rewards/accuracies"]),
            number(train["rewards/margins"]),
        )
    return table


def sources_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each source of a finished round: its prompts, the mean score of its completions, its pairs."""
    table = make_table("round", "source", "prompts", "completions", "mean score", "pairs", "no pair")
    for row in rows:
        for name, own in row["sources"].items():
            counts = own["counts"]
            table.add_row(
                str(row["round"]),
                name,
                str(counts["num_prompts"]),
                str(counts["num_completions"]),
                number(own["mean_score"]),
                str(counts["num_pairs"]),
                str(sum(counts["num_prompts_without_pair"].values())),
            )
    return table


def drops_table(rows: Sequence[Mapping[str, Any]], read: Mapping[str, Any] | None = None) -> Table:
    """Why prompts gave no pair and completions entered none, and how many pairs were over max_length; first, where there are
    any, the rows of the data set that were dropped when it was `read`.
    """
    table = Table()
    table.add_column("round", no_wrap=True)
    table.add_column("prompts without a pair")
    table.add_column("completions not used")
    table.add_column("too long", justify="right")
    if read is not None and read["dropped"]:
        table.add_row("reading", reasons(read["dropped"]), "-", "-")
    for row in rows:
        counts = row["counts"]
        prompts, completions = counts["num_prompts_without_pair"], counts["num_unusable_completions"]
        table.add_row(str(row["round"]), reasons(prompts), reasons(completions), str(counts["num_pairs_too_long"]))
    return table


def filter_line(count: Mapping[str, Any]) -> str:
    """What one filter did to the pairs of a round."""
    added = f" + {count['num_added']} of earlier rounds" if count["num_added"] else ""
    name = safe_text(count["filter"])
    return f"{name}: {count['num_in']} pairs{added} - {count['num_dropped']} dropped = {count['num_out']}"


def audit_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row per finished round; the figures of audit.py. `canaries` is the share of them that lost."""
    keys = {
        "parsed": "parse_rate",
        "ties": "tie_rate",
        "swap agrees": "swap_consistency",
        "self agrees": "self_agreement",
        "at top": "ceiling_share",
        "score~length": "length_correlation",
        "chosen longer": "chosen_longer",
        "canaries": "canary_loss_rate",
    }
    columns = (*keys, "calls", "cost")
    table = make_table("round", *columns)
    for row in rows:
        found, usage = row["audit"], row["judge_usage"] or {}
        figures = [number(found.get(key)) for key in keys.values()]  # rounds from before a figure existed have none
        table.add_row(str(row["round"]), *figures, str(usage.get("num_calls", "-")), number(usage.get("cost"), 4))
    return table


def canary_line(table: Mapping[str, Mapping[str, int]]) -> str:
    """Of each kind of canary how many lost, of those that have a verdict, and what became of the others."""
    others = {"won": "num_won", "tied": "num_tied", "without a verdict": "num_unjudged"}
    parts = []
    for kind, row in table.items():
        told = ", ".join(f"{row[key]} {name}" for name, key in others.items() if row[key])
        parts.append(f"{kind} {row['num_lost']} of {sum(row.values()) - row['num_unjudged']}{told and f' ({told})'}")
    return ", ".join(parts)


def audit_lines(found: Mapping[str, Any]) -> list[str]:
    """What the table of an audit has no room for: verdicts that could not be read, members of a combination, labelled pairs.
    Rounds from before a figure existed have none.
    """
    lines = []
    scored = found.get("scored_rate")
    if found["parse_rate"] != scored and scored is not None:
        lines.append(
            f"verdicts that could be read: {number(found['parse_rate'])}, completions with a score: {number(scored)}"
        )
    for name, own in found.get("members", {}).items():
        parts = {"parsed": "parse_rate", "self agrees": "self_agreement", "self reliability": "self_reliability"}
        lines.append(f"{name}: " + ", ".join(f"{said} {number(own[key])}" for said, key in parts.items()))
    if labelled := found.get("labelled"):
        accuracy = f"{number(labelled['accuracy'])} {interval(labelled['accuracy_interval'])}"
        counts = f"{labelled['num_judged']} of {labelled['num_pairs']} pairs"
        lines.append(f"judge on {safe_text(labelled['pairs'])}: accuracy {accuracy}, {counts} with both verdicts")
    return lines


def _print_calibrated(row: Mapping[str, Any], console: Console) -> None:
    """How good the reward models of each source are on their calibration files, where they have some."""
    for name, own in row.get("sources", {"": row}).items():
        found = own["audit"].get("calibration") or []  # rounds from before there were any have none,
        judges = [found] if isinstance(found, dict) else found  # older ones those of one judge
        for judge in judges:
            accuracy = f"{number(judge['accuracy'])} {interval(judge['accuracy_interval'])}"
            which = f" {judge['model']}" if len(judges) > 1 else ""
            whose = f"judge{which} of {name}" if name else f"judge{which}"
            console.print(Text(f"{whose} on {judge['pairs']}: accuracy {accuracy}"), soft_wrap=True)


def print_alarms(row: Mapping[str, Any], console: Console) -> None:
    """What the audit of a round says is far out, one line each."""
    for alarm in row["audit"]["alarms"]:
        print_alarm(alarm, console, f"round {row['round']}: ")


def reasons(counts: Mapping[str, int]) -> str:
    """Counts by reason, the largest first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return "; ".join(f"{count} {reason}" for reason, count in ordered) or "none"


def seconds_table(figures: Mapping[str, Any]) -> Table:
    """Seconds of each stage. The panel of a round is that of the policy that it made."""
    rows = [("initial", figures["initial"]["seconds"])]
    rows += [(f"round {row['round']}", row.get("seconds", {})) for row in figures["rounds"]]
    stages = list(dict.fromkeys(stage for _, seconds in rows for stage in seconds))
    table = make_table("policy of", *stages, "all")
    for name, seconds in rows:
        found = [number(seconds.get(stage), 1) for stage in stages]
        table.add_row(name, *found, number(sum(seconds.values()), 1))
    return table


def print_alarm(alarm: str | None, console: Console, whose: str = "") -> None:
    """An alarm, if there is one, after the words that say of what."""
    if alarm is not None:
        console.print(Text(f"{whose}ALARM: {alarm}", style="bold red"), soft_wrap=True)


def print_gain(figures: Mapping[str, Any], console: Console) -> None:
    """The last policy against the initial one, for each source where there are several."""
    sources = figures.get("sources", {"": figures})
    for source, own in sources.items():
        whose = f" on {source}" if source else ""
        for name, key in (("sampled", "gain"), ("greedy", "greedy_gain")):
            if own[key] is not None:
                between = interval(own[f"{key}_interval"], "+")
                console.print(f"gain over the initial policy{whose}, {name}: {number(own[key], 3, '+')} {between}")
                print_alarm(own[f"{key}_alarm"], console)
    if any(own["gain"] is not None for own in sources.values()):
        console.print("(means over held-out prompts; 95 % intervals from a bootstrap over prompts, paired)")
