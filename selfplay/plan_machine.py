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
    gpus: tuple[int, ...] = ()
    bf16: bool = False

    @property
    def gpu(self) -> int | None:
        """The memory of its smallest GPU; None without one."""
        return min(self.gpus, default=None)


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


def _gpus() -> tuple[int, ...]:
    """What nvidia-smi says of the visible ones; none where there is no such command. It knows nothing of other makers'."""
    command = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines() if line.strip()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = None if visible is None else [name.strip() for name in visible.split(",")]
    return tuple(
        int(memory) * MIB
        for index, uuid, memory in rows
        if memory.isdigit() and (shown is None or {index, uuid} & {*shown})
    )


def _computes_bf16() -> bool:
    """Whether bfloat16 is fast on this CPU, as its flags say; the trainer asks torch."""
    path = Path("/proc/cpuinfo")
    return path.is_file() and bool(BF16_FLAGS & set(path.read_text().split()))
