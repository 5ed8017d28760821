"""How much memory this machine and its GPUs have, without a CUDA context and without torch."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20
CGROUP = Path("/sys/fs/cgroup/memory.max")
BF16_FLAGS = {"avx512bw", "avx_ne_convert", "bf16"}  # of x86 and of ARM: what oneDNN takes bf16 products by


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes of memory, of this machine and of each visible GPU; None where the system doesn't say. `bf16` is of its CPU."""

    memory: int | None
    gpus: tuple[int | None, ...] = ()
    bf16: bool = False

    @property
    def has_gpu(self) -> bool:
        return bool(self.gpus)

    @property
    def gpu(self) -> int | None:
        """The memory of its smallest GPU; None without one, and where it isn't known of one."""
        known = [size for size in self.gpus if size is not None]
        return min(known, default=None) if len(known) == len(self.gpus) else None


def this_machine() -> Machine:
    """The one that the plan is made on."""
    return Machine(_memory(), _gpus(), _computes_bf16())


def _memory() -> int | None:
    """Physical memory, or the limit of a container where that is less."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    limit = CGROUP.read_text().strip() if CGROUP.is_file() else "max"
    return min(total, int(limit)) if limit.isdigit() else total


def _gpus() -> tuple[int | None, ...]:
    """What nvidia-smi says of the visible ones; none where there is no such command. It knows nothing of other makers', and not
    how large a MIG part of one is.
    """
    command = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines() if line.strip()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = None if visible is None else [name.strip() for name in visible.split(",")]
    if rows and any(name.startswith("MIG-") for name in shown or ()):
        return (None,)  # CUDA uses one such part, and nothing beside it
    return tuple(
        int(memory) * MIB
        for index, uuid, memory in rows
        if memory.isdigit() and (shown is None or any(_names(name, index, uuid) for name in shown))
    )


def _names(name: str, index: str, uuid: str) -> bool:
    """Whether an entry of CUDA_VISIBLE_DEVICES is this GPU: its index, or a beginning of its UUID that tells it from others."""
    return name == index or (name.startswith("GPU-") and uuid.startswith(name))


def _computes_bf16() -> bool:
    """Whether bfloat16 is fast on this CPU, as its flags say; the trainer asks torch."""
    path = Path("/proc/cpuinfo")
    return path.is_file() and bool(BF16_FLAGS & set(path.read_text().split()))
