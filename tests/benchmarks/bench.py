"""`make bench`: time selfplay against its peers, and say how far from the machine's limit it is.

    python tests/benchmarks/bench.py [ID...] [--runs N] [--full]                     # on the CPU, a model of 135M weights
    python tests/benchmarks/bench.py [ID...] --device cuda --size 8b                 # `make bench-gpu`: random weights

Every run is a process of its own, peers interleaved (A B A B), figures are medians with the smallest and largest. A training
benchmark first compares gradients in fp32; where they differ its ratio does not count. A peer whose packages are not installed,
or that runs out of memory, is named as left out. Results go to .bench/ID.json, of random weights to .bench/ID-SIZE.json.
"""

import argparse
import json
import os

import torch
from machine import MODEL, OUT, SIZES, TRAINED, Setup, make_setup
from measured import Result
from rich.console import Console
from tables import print_left_out, print_others, print_training
from training import MEMORY, TRAINING, gemm_rate, measure
from wholes import ENGINES, measure_engines, measure_round, measure_scale

IDS = (*TRAINING, *MEMORY, *ENGINES, "round", "scale")
# Seconds of each on two cores after which no further peer is started: with the gradient checks, and the peers that are
# running then, all end within half an hour. What the goals are about comes first, and TRL with its defaults on long prompts and
# groups is left to --full.
SECONDS = {
    "train-pair": 240,
    "train-long-prompt": 90,
    "train-group-m3": 90,
    "train-group-m6": 150,
    "memory": 90,
    "memory-double": 100,
    "generate": 120,
    "hand-off": 40,
    "judge": 90,
    "round": 300,
    "scale": 100,
}


def main() -> None:
    chosen = _arguments()
    OUT.mkdir(exist_ok=True)
    setup = make_setup(chosen.device, chosen.size)
    rate = gemm_rate(chosen.device)
    where = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name() if chosen.device == "cuda" else where
    print(f"{where}, bf16 GEMM {rate / 1e9:.0f} GFLOP/s", flush=True)
    results = []
    # the prompts of `scale` cost the same whatever model there is
    for id in chosen.ids or [id for id in IDS if not (setup.is_random and id == "scale")]:
        result = measured(id, chosen.runs, rate, setup, full=chosen.full)
        name = f"{id}-{chosen.size}" if setup.is_random else id
        (OUT / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        results.append(result)
    trainers = {*TRAINING, *MEMORY}
    console = Console(width=160)
    print_training([r for r in results if r["id"] in trainers], console)
    print_others([r for r in results if r["id"] not in trainers], console)
    print_left_out(results, console)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", metavar="ID", help=f"of {', '.join(IDS)}; none: all")
    parser.add_argument("--runs", type=int, default=3, help="runs of each peer (default 3)")
    parser.add_argument("--full", action="store_true", help="all runs and sizes, however long they take")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=SIZES, default=TRAINED, help="135m: the model of the quickstart; else random")
    chosen = parser.parse_args()
    if unknown := set(chosen.ids) - set(IDS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(IDS)}")
    if chosen.size == TRAINED and not (MODEL / "config.json").exists():
        parser.error(f"{MODEL} is missing: make quickstart fetches it")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here, so nothing was measured")
    return chosen


def measured(id: str, runs: int, rate: float, setup: Setup, *, full: bool) -> Result:
    """The result of one benchmark. A GPU is given all the time that it takes."""
    budget = float("inf") if full or setup.device == "cuda" else SECONDS[id]
    if id in ENGINES:
        return measure_engines(id, runs, budget=budget, setup=setup)
    if id == "round":
        return measure_round(runs, rate, budget=budget, setup=setup)
    if id == "scale":
        return measure_scale(runs, budget=budget, full=full)
    return measure(id, runs, rate, budget=budget, setup=setup)


if __name__ == "__main__":
    main()
