"""`make bench`: time selfplay against its peers, and say how far from the machine's limit it is.

    python tests/benchmarks/bench.py [ID...] [--runs N] [--full]                     # on the CPU, a model of 135M weights
    python tests/benchmarks/bench.py [ID...] --device cuda --size 8b                 # `make bench-gpu`: random weights

Every run is a process of its own, peers interleaved (A B A B), figures are medians with the smallest and largest. A training
benchmark first compares gradients in fp32; where they differ its ratio does not count. A peer whose packages are not installed,
that runs out of memory or that fails is named as left out; after a failure the exit code is 1. Results go to .bench/ID.json, of
random weights to .bench/ID-SIZE.json, when the benchmark is over, and every run to .bench/ID-runs.jsonl when it is.

A GPU that is there for some minutes at a time is measured in slices. Each is a command; what would not end by --seconds is not
started, and named. torch, transformers, pydantic, rich and typer are enough, and nothing has to be installed or fetched:

    python -m pytest -q tests/test_flash.py                                          # the attention kernel, first
    python tests/benchmarks/bench.py train-pair train-group-m6 --device cuda --size 1b --runs 2 --seconds 400
    python tests/benchmarks/bench.py train-pair memory --device cuda --size 8b --optim adamw_torch --runs 1 --seconds 400
    python tests/benchmarks/bench.py round generate --device cuda --size 1b --runs 1 --seconds 400
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

import torch
from machine import MODEL, OUT, SIZES, TRAINED, Setup, make_setup
from measured import FAILED, Result
from rich.console import Console
from tables import print_left_out, print_others, print_training
from training import MEMORY, SAME_WORK, TRAINING, gemm_rate, measure
from wholes import ENGINES, measure_engines, measure_round, measure_scale

from selfplay.train.settings import STATE_BYTES

IDS = (*TRAINING, *MEMORY, *ENGINES, "scale", "round")
# Seconds of each on two cores, its gradient check included, after which nothing is started but what a headline needs, once.
# Those of the set are 27 minutes: `memory` is read off the runs of train-pair, and memory-double is left to --full.
SECONDS = {
    "train-pair": 290,
    "train-long-prompt": 165,
    "train-group-m3": 140,
    "train-group-m6": 210,
    "memory": 155,
    "memory-double": 200,
    "generate": 130,
    "hand-off": 35,
    "judge": 130,
    "scale": 195,
    "round": 320,
}


def main() -> None:
    chosen = _arguments()
    OUT.mkdir(exist_ok=True)
    begun = time.monotonic()
    setup = make_setup(chosen.device, chosen.size, chosen.optim)
    rate = gemm_rate(chosen.device)
    where = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name() if chosen.device == "cuda" else where
    print(f"{where}, bf16 GEMM {rate / 1e9:.0f} GFLOP/s", flush=True)
    full = chosen.full or chosen.device == "cuda"  # a GPU is given all the time that it takes
    ids = sorted(chosen.ids or the_set(full=full, is_random=setup.is_random), key=IDS.index)
    results: list[Result] = []
    late = 0.0  # what those before have taken beyond their seconds
    for id, share in shares(ids).items():
        started = time.monotonic()
        left = chosen.seconds - (started - begun)
        if left <= 0:
            print(f"{id}: left out: no time", flush=True)
            continue
        budget = min(float("inf") if full else share - late, left)
        result = measured(id, chosen.runs, rate, setup, full=full, budget=budget, before=results)
        result |= {"machine": where, "setup": asdict(setup)}
        late = max(0.0, late + time.monotonic() - started - share)
        name = f"{id}-{chosen.size}" if setup.is_random else id
        (OUT / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        results.append(result)
    trainers = {*TRAINING, *MEMORY}
    console = Console(width=160)
    print_training([r for r in results if r["id"] in trainers], console)
    print_others([r for r in results if r["id"] not in trainers], console)
    print_left_out(results, console)
    if not chosen.ids:
        for id in (id for id in IDS if id not in ids):
            console.print(f"{id}: left out: runs where it is named", markup=False)
    sys.exit(any(FAILED in line for result in results for line in result["left_out"]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", metavar="ID", help=f"of {', '.join(IDS)}; none: half an hour of them")
    parser.add_argument("--runs", type=int, default=3, help="runs of each peer (default 3)")
    parser.add_argument("--full", action="store_true", help="all runs and sizes, however long they take")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=SIZES, default=TRAINED, help="135m: the model of the quickstart; else random")
    parser.add_argument("--optim", choices=STATE_BYTES, help="default: adamw_bnb_8bit for 8b, else adamw_torch")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing that would end later")
    chosen = parser.parse_args()
    if unknown := set(chosen.ids) - set(IDS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(IDS)}")
    if chosen.size == TRAINED and not (MODEL / "config.json").exists():
        parser.error(f"{MODEL} is missing: make quickstart fetches it")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here, so nothing was measured")
    return chosen


def the_set(*, full: bool, is_random: bool) -> list[str]:
    """The benchmarks where none is named. The prompts of `scale` cost the same whatever model there is."""
    left = {"scale"} if is_random else set()
    left |= set() if full else {"memory-double"}
    return [id for id in IDS if id not in left]


def shares(ids: Sequence[str]) -> dict[str, float]:
    """Seconds of each; none of one that is read off the runs of another."""
    return {id: 0.0 if SAME_WORK.get(id) in ids else SECONDS[id] for id in ids}


def measured(
    id: str, runs: int, rate: float, setup: Setup, *, full: bool, budget: float, before: Sequence[Result]
) -> Result:
    """The result of one benchmark; `before` has those of the others."""
    if id in ENGINES:
        return measure_engines(id, runs, budget=budget, setup=setup)
    if id == "round":
        return measure_round(runs, rate, budget=budget, setup=setup)
    if id == "scale":
        return measure_scale(runs, budget=budget, full=full)
    return measure(id, runs, rate, budget=budget, full=full, setup=setup, before=before)


if __name__ == "__main__":
    main()
