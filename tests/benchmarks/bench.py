"""`make bench`: time selfplay against its peers, and say how far from the machine's limit it is.

    python tests/benchmarks/bench.py [ID...] [--runs N]

Every run is a process of its own, peers interleaved (A B A B), figures are medians with the smallest and largest. A training
benchmark first compares gradients in fp32; where they differ its ratio does not count. Results go to .bench/ID.json.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from runs import MODEL, ROOT, Result, interleaved, versions
from training import MEMORY, TRAINING, gemm_rate, measure

OUT = ROOT / ".bench"
GENERATION = str(Path(__file__).with_name("generation.py"))
# id -> (peers, ours first; what is compared: tokens per second, or seconds)
ENGINES: dict[str, tuple[tuple[str, ...], str]] = {
    "generate": (("vllm", "transformers", "transformers.generate"), "tokens_per_second"),
    "hand-off": (("hand-off",), "seconds"),
    "judge": (("judge", "judge, rubric last"), "seconds"),
}
IDS = (*TRAINING, *MEMORY, *ENGINES)
# What each may take on two cores, gradient check apart, so that all end within half an hour.
SECONDS = {
    "train-pair": 260,
    "train-long-prompt": 240,
    "train-group-m3": 200,
    "train-group-m6": 220,
    "memory": 130,
    "memory-double": 190,
    "generate": 150,
    "hand-off": 60,
    "judge": 130,
}
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", metavar="ID", help=f"of {', '.join(IDS)}; none: all")
    parser.add_argument("--runs", type=int, default=3, help="runs of each peer (default 3)")
    parser.add_argument("--full", action="store_true", help="all runs, however long they take")
    chosen = parser.parse_args()
    if unknown := set(chosen.ids) - set(IDS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(IDS)}")
    if not (MODEL / "config.json").exists():
        parser.error(f"{MODEL} is missing: make quickstart fetches it")
    OUT.mkdir(exist_ok=True)
    rate = gemm_rate()
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, bf16 GEMM {rate / 1e9:.0f} GFLOP/s", flush=True)
    results = []
    for id in chosen.ids or IDS:
        budget = float("inf") if chosen.full else SECONDS[id]
        if id in ENGINES:
            result = measure_engines(id, chosen.runs, budget=budget)
        else:
            result = measure(id, chosen.runs, rate, budget=budget)
        (OUT / f"{id}.json").write_text(json.dumps(result, indent=2) + "\n")
        results.append(result)
    console = Console(width=160)
    print_training([r for r in results if r["id"] not in ENGINES], console)
    print_engines([r for r in results if r["id"] in ENGINES], console)


def measure_engines(id: str, runs: int, *, budget: float) -> Result:
    """Times the peers of a benchmark of engines; ratios are to the last peer, above 1 where ours is faster."""
    names, measured = ENGINES[id]
    print(f"{id}:", flush=True)
    # the last peer is the one that ratios are to: it comes second
    order = (names[0], *names[:0:-1])
    found, left_out = interleaved({name: [GENERATION, name, str(MODEL)] for name in order}, runs, seconds=budget)
    rows = {name: [r | {"tokens_per_second": r["tokens"] / r["seconds"]} for r in peer] for name, peer in found.items()}
    middle = {name: statistics.median(r[measured] for r in peer) for name, peer in rows.items()}
    last = middle.get(names[-1])
    compared = [n for n in names[:-1] if n in middle and last is not None]
    ratios = {n: middle[n] / last if measured == "tokens_per_second" else last / middle[n] for n in compared}
    # no trainer is compared here, so there is no gradient to check and no count of FLOPs
    nothing = dict.fromkeys(("ratio_default", "bound", "percent_of_limit", "gradient_check"))
    return {
        "id": id,
        "measures": measured,
        "ratio_tuned": ratios.get(names[0]),
        **nothing,
        "ratios": ratios,
        "left_out": left_out,
        "peers": rows,
        "versions": versions(),
    }


def print_training(results: Sequence[Result], console: Console) -> None:
    """A row per training benchmark."""
    if not results:
        return
    columns: dict[str, Callable[[Result], str]] = {
        "benchmark": lambda r: r["id"],
        "selfplay": lambda r: _spread(r, "selfplay"),
        "TRL tuned": lambda r: _spread(r, "trl tuned"),
        "TRL default": lambda r: _spread(r, "trl default"),
        "x tuned": lambda r: _number(r["ratio_tuned"]),
        "x engine logps": lambda r: _number(r["ratio_tuned_engine_logps"]),
        "x default": lambda r: _number(r["ratio_default"]),
        "bound": lambda r: _number(r["bound"]),
        "% of limit": lambda r: f"{r['percent_of_limit']:.0f}",
        "gradient": lambda r: f"{r['gradient_check']:.0e}" + ("" if r["counts"] else " FAILED"),
    }
    _print(columns, results, console)
    console.print(
        "seconds (memory: peak GiB above the imports), median [min, max]; x: theirs / ours; bound: the ratio to TRL tuned that "
        "counting FLOPs allows; limit: least FLOPs at the GEMM rate above",
        markup=False,
    )


def print_engines(results: Sequence[Result], console: Console) -> None:
    """A row per peer of the other benchmarks."""
    rows = [(result, name) for result in results for name in result["peers"]]
    if not rows:
        return
    table = Table(box=None, pad_edge=False)
    for column in ("benchmark", "peer", "seconds", "tokens/s", "ratio"):
        table.add_column(column, justify="left" if column in ("benchmark", "peer") else "right", no_wrap=True)
    for result, name in rows:
        ratio = result["ratios"].get(name)
        tokens = "-" if result["measures"] == "seconds" else _spread(result, name, "tokens_per_second", 0)
        shown = "" if ratio is None else f"{ratio:.2f}"
        table.add_row(result["id"], name, _spread(result, name, "seconds"), tokens, shown)
    console.print(table)
    console.print(
        "median [min, max]; ratio: to the last peer of the benchmark, above 1 where ours is faster", markup=False
    )


def _print(columns: Mapping[str, Callable[[Result], str]], results: Sequence[Result], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name == "benchmark" else "right", no_wrap=True)
    for result in results:
        table.add_row(*(show(result) for show in columns.values()))
    console.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _spread(result: Result, peer: str, measured: str | None = None, digits: int | None = None) -> str:
    measured = measured or result["measures"]
    if peer not in result["peers"]:
        return "left out"
    unit, places = (GIB, 2) if measured == "peak_bytes" else (1, 1)
    values = sorted(row[measured] / unit for row in result["peers"][peer])
    places = places if digits is None else digits
    return f"{statistics.median(values):.{places}f} [{values[0]:.{places}f}, {values[-1]:.{places}f}]"


if __name__ == "__main__":
    main()
