"""The tables that `make bench` ends in: one of trainers, one of engines, rounds and sizes, and what was left out."""

import statistics
from collections.abc import Callable, Mapping, Sequence

from measured import Result
from rich.console import Console
from rich.table import Table

GIB = 2**30


def print_training(results: Sequence[Result], console: Console) -> None:
    """A row per training benchmark."""
    if not results:
        return
    columns: dict[str, Callable[[Result], str]] = {
        "benchmark": lambda r: r["id"],
        "selfplay": lambda r: _spread(r, "selfplay"),
        "TRL tuned": lambda r: _spread(r, r["tuned"]),
        "TRL default": lambda r: _spread(r, "trl default"),
        "x tuned": lambda r: _number(r["ratio_tuned"]),
        "x engine logps": lambda r: _number(r["ratio_tuned_engine_logps"]),
        "x default": lambda r: _number(r["ratio_default"]),
        "bound": lambda r: _number(r["bound"]),
        "% of limit": lambda r: _number(r["percent_of_limit"], 0),
        "gradient": lambda r: f"{r['gradient_check']:.0e}" + ("" if r["counts"] else " FAILED"),
    }
    _print(columns, results, console)
    console.print(
        "seconds (memory: peak GiB above the imports), median [min, max]; x: theirs / ours; bound: the ratio to TRL tuned that "
        "counting FLOPs allows; limit: least FLOPs at the GEMM rate above",
        markup=False,
    )


def print_others(results: Sequence[Result], console: Console) -> None:
    """A row per peer of the other benchmarks."""
    rows = [(result, name) for result in results for name in result["peers"]]
    if not rows:
        return
    columns: dict[str, Callable[[tuple[Result, str]], str]] = {
        "benchmark": lambda row: row[0]["id"],
        "peer": lambda row: row[1],
        "seconds": lambda row: _spread(*row, "seconds"),
        "CPU seconds": lambda row: _spread(*row, "cpu_seconds") if _measures(row[0], "cpu_seconds") else "-",
        "tokens/s": lambda row: (
            _spread(*row, "tokens_per_second", 0) if _measures(row[0], "tokens_per_second") else "-"
        ),
        "peak GiB": lambda row: _spread(*row, "peak_bytes") if row[0]["id"] == "scale" else "-",
        "ratio": lambda row: _ranged(row[0], row[1]),
        "bound": lambda row: _number(row[0]["bound"]) if row[1] == "rival" else "-",
    }
    _print(columns, rows, console)
    for result in results:
        for line in result.get("notes", ()):
            console.print(f"{result['id']}: {line}", markup=False)
    console.print(
        "median [min, max]; ratio: above 1 where ours is faster, to the last peer of the benchmark (round: theirs / ours; "
        "scale: CPU seconds per prompt over those of the smallest size)",
        markup=False,
    )


def print_left_out(results: Sequence[Result], console: Console) -> None:
    """What has no figure above, and why, in a line for each benchmark. Nothing where all was run."""
    for result in results:
        if result["left_out"]:
            console.print(f"{result['id']}: left out: {'; '.join(result['left_out'])}", markup=False)


def _measures(result: Result, key: str) -> bool:
    found: bool = result["measures"] == key
    return found


def _print(columns: Mapping[str, Callable[..., str]], rows: Sequence[object], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in ("benchmark", "peer") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(show(row) for show in columns.values()))
    console.print(table)


def _number(value: float | None, places: int = 2) -> str:
    return "-" if value is None else f"{value:.{places}f}"


def _ranged(result: Result, name: str) -> str:
    """The ratio of a peer, with the range of the runs side by side where it is known."""
    ratio, span = result["ratios"].get(name), result.get("ratio_ranges", {}).get(name)
    if ratio is None:
        return ""
    return f"{ratio:.2f}" + (f" [{span[0]:.2f}, {span[1]:.2f}]" if span else "")


def _spread(result: Result, peer: str | None, measured: str | None = None, digits: int | None = None) -> str:
    measured = measured or result["measures"]
    if peer not in result["peers"]:
        return "left out"
    unit, places = (GIB, 2) if measured == "peak_bytes" else (1, 1)
    values = sorted(row[measured] / unit for row in result["peers"][peer])
    places = places if digits is None else digits
    return f"{statistics.median(values):.{places}f} [{values[0]:.{places}f}, {values[-1]:.{places}f}]"
