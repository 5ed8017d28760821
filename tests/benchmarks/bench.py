"""`make bench`: time selfplay against its peers, and say how far from the machine's limit it is.

    python tests/benchmarks/bench.py [ID...] [--runs N]

Every run is a process of its own, peers interleaved (A B A B), figures are medians with the smallest and largest. A training
benchmark first compares gradients in fp32; where they differ its ratio does not count. Results go to .bench/ID.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from flops import Size, padded_flops, shared_flops
from rich.console import Console
from rich.table import Table
from work import make_work

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "smollm2-135m-instruct"
OUT = ROOT / ".bench"
TRAINING = ("train-pair", "train-long-prompt", "train-group-m3", "train-group-m6")
MEMORY = ("memory", "memory-double")
GRADIENT_BOUND = 1e-4  # relative L2, fp32
GIB = 2**30
Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", metavar="ID", help=f"of {', '.join((*TRAINING, *MEMORY))}; none: all")
    parser.add_argument("--runs", type=int, default=3, help="runs of each peer (default 3)")
    chosen = parser.parse_args()
    unknown = set(chosen.ids) - {*TRAINING, *MEMORY}
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join((*TRAINING, *MEMORY))}")
    if not (MODEL / "config.json").exists():
        parser.error(f"{MODEL} is missing: make model")
    OUT.mkdir(exist_ok=True)
    rate = gemm_rate()
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, bf16 GEMM {rate / 1e9:.0f} GFLOP/s", flush=True)
    results = []
    for id in chosen.ids or (*TRAINING, *MEMORY):
        result = measure(id, chosen.runs, rate)
        (OUT / f"{id}.json").write_text(json.dumps(result, indent=2) + "\n")
        results.append(result)
    print_results(results)


def measure(id: str, runs: int, rate: float) -> Result:
    """Times all peers of a benchmark. Ratios are of seconds (of peak bytes for memory): theirs / ours."""
    names = ("selfplay", "selfplay, engine logps", "trl tuned", "trl default", "naive")
    check = gradient_check(id)
    print(f"{id}: gradient check {check:.1e} ({'ok' if check <= GRADIENT_BOUND else 'FAILED: ratios do not count'})")
    found: dict[str, list[Result]] = {name: [] for name in names}
    for run in range(runs):
        for name in names:
            found[name].append(timed(name, id))
            print(f"  run {run + 1}, {name}: {found[name][-1]['seconds']:.1f} s", flush=True)
    key = "peak_bytes" if id in MEMORY else "seconds"
    middle = {name: statistics.median(r[key] for r in rows) for name, rows in found.items()}
    size, work = model_size(), make_work(id)
    least = shared_flops(size, work.pairs, reference_pass=True)
    theirs = padded_flops(size, work.pairs, batch_size=1, reference_pass=True)
    seconds = statistics.median(r["seconds"] for r in found["selfplay"])
    return {
        "id": id,
        "measures": key,
        "ratio_tuned": middle["trl tuned"] / middle["selfplay"],
        "ratio_tuned_engine_logps": middle["trl tuned"] / middle["selfplay, engine logps"],
        "ratio_default": middle["trl default"] / middle["selfplay"],
        "ratio_naive": middle["naive"] / middle["selfplay"],
        "bound": theirs / least,
        "percent_of_limit": 100 * least / (seconds * rate),
        "gemm_flops_per_second": rate,
        "gradient_check": check,
        "counts": check <= GRADIENT_BOUND,
        "peers": {n: {k: [r[k] for r in rows] for k in ("seconds", "peak_bytes")} for n, rows in found.items()},
        "versions": {p: version(p) for p in ("torch", "transformers", "trl", "accelerate")}
        | {"python": platform.python_version()},
    }


def timed(peer: str, id: str) -> Result:
    """Seconds and peak bytes of one run, in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("peer.py")), peer, id, str(MODEL), "bf16"]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False)
    if done.returncode != 0:
        sys.exit(f"{peer} failed on {id}:\n{done.stderr}")
    found: Result = json.loads(done.stdout.splitlines()[-1])
    return found


def _environment() -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1", **os.environ}


def gradient_check(id: str) -> float:
    """Relative L2 distance of the first step's gradient from that of plain rows and two models, fp32."""
    from peers import gradient_of_naive, gradient_of_ours

    work = make_work(id)
    own, plain = gradient_of_ours(str(MODEL), work), gradient_of_naive(str(MODEL), work)
    return float((own - plain).norm() / plain.norm())


def model_size() -> Size:
    """Of the benchmark's model: decoder weights without embeddings, and the head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(MODEL)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = config.vocab_size * config.hidden_size
    embeddings = head if config.tie_word_embeddings else 2 * head
    return Size(sum(p.numel() for p in model.parameters()) - embeddings, head)


def gemm_rate() -> float:
    """FLOPs per second of bf16 matrix products of this model's kind, the best of several: the limit to be judged by."""
    left, right = (torch.randn(1536, 1536).bfloat16() for _ in range(2))

    def once() -> float:
        started = time.perf_counter()
        for _ in range(10):
            left @ right
        return 10 * 2 * 1536**3 / (time.perf_counter() - started)

    once()
    return max(once() for _ in range(5))


def print_results(results: Sequence[Result]) -> None:
    """One table: a row per benchmark."""
    table = Table(box=None, pad_edge=False)
    columns: dict[str, Callable[[Result], str]] = {
        "benchmark": lambda r: r["id"],
        "selfplay": lambda r: _spread(r, "selfplay"),
        "TRL tuned": lambda r: _spread(r, "trl tuned"),
        "TRL default": lambda r: _spread(r, "trl default"),
        "x tuned": lambda r: f"{r['ratio_tuned']:.2f}",
        "x engine logps": lambda r: f"{r['ratio_tuned_engine_logps']:.2f}",
        "x default": lambda r: f"{r['ratio_default']:.2f}",
        "bound": lambda r: "-" if r["measures"] == "peak_bytes" else f"{r['bound']:.2f}",
        "% of limit": lambda r: f"{r['percent_of_limit']:.0f}",
        "gradient": lambda r: f"{r['gradient_check']:.0e}" + ("" if r["counts"] else " FAILED"),
    }
    for name in columns:
        table.add_column(name, justify="left" if name == "benchmark" else "right", no_wrap=True)
    for result in results:
        table.add_row(*(show(result) for show in columns.values()))
    console = Console(width=160)
    console.print(table)
    console.print(
        "seconds (memory: peak GiB above the imports), median [min, max]; x: theirs / ours; bound: the ratio to TRL tuned that "
        "counting FLOPs allows; limit: least FLOPs at the GEMM rate above"
    )


def _spread(result: Result, peer: str) -> str:
    unit, digits = (GIB, 2) if result["measures"] == "peak_bytes" else (1, 1)
    values = sorted(value / unit for value in result["peers"][peer][result["measures"]])
    return f"{statistics.median(values):.{digits}f} [{values[0]:.{digits}f}, {values[-1]:.{digits}f}]"


if __name__ == "__main__":
    main()
