"""The processes that train one policy together: which of them this one is, and what they do in common.

Every process runs the same program on the same steps, so each call below is made by all of them, in the same order. A process
that fails ends, and the launcher then ends the others. With one process nothing is exchanged and values come back as they are.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from selfplay.errors import RecipeError

R = TypeVar("R")
# What the others may wait for: rank 0 that writes a policy, or the processes of a machine that load one in turn.
PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True, slots=True)
class Sharding:
    """How FSDP2 cuts a policy: whole layers are given back after their forward pass or kept for the backward one, and the
    class names of these layers, where the model's own are not wanted.
    """

    reshard_after_forward: bool = True
    layers: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class World:
    """`rank` of `size` processes, on `device`. `sharding` is None where every process holds all weights (DDP)."""

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # processes on this machine
    sharding: Sharding | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes what all of them made."""
        return self.rank == 0

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Sums each tensor over the processes, in place: the same bits everywhere afterwards."""
        if self.size > 1:
            # all of them under way before the first is waited for
            for work in [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
                assert work is not None
                work.wait()

    def total(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes."""
        if self.size == 1:
            return list(values)
        return self._reduced(torch.tensor(values, dtype=torch.float64), torch.distributed.ReduceOp.SUM)

    def most(self, *values: int) -> list[int]:
        """The largest of each value: with 0 and 1, whether it holds for any process."""
        if self.size == 1:
            return list(values)
        return self._reduced(torch.tensor(values), torch.distributed.ReduceOp.MAX)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes by rank. They travel as JSON, so what they are is plain."""
        if self.size == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        torch.distributed.all_gather(lengths, torch.tensor([len(own)], device=self.device))
        sizes = [int(length) for length in lengths]
        padded = [torch.zeros(max(sizes), dtype=torch.uint8, device=self.device) for _ in sizes]
        torch.distributed.all_gather(padded, torch.nn.functional.pad(own, (0, max(sizes) - len(own))))
        return [json.loads(bytes(t[:n].tolist())) for t, n in zip(padded, sizes, strict=True)]

    def first(self, work: Callable[[], R]) -> R:
        """What `work` returns in process 0, which alone does it. JSON values."""
        if self.size == 1:
            return work()
        value: R = self.gather(work() if self.is_first else None)[0]
        return value

    def wait(self) -> None:
        """Returns when all have come here."""
        self.most(0)

    def in_turn(self, work: Callable[[], R]) -> R:
        """What `work` returns, done by the processes of a machine one after the other: its memory holds one at a time."""
        done: list[R] = []
        for turn in range(self.most(self.local_size)[0]):
            if turn == self.local_rank:
                done.append(work())
            self.wait()
        return done[0]

    def _reduced(self, values: Tensor, operation: Any) -> list[Any]:
        values = values.to(self.device)
        torch.distributed.all_reduce(values, op=operation)
        found: list[Any] = values.tolist()
        return found


def join_world(*, use_cpu: bool, sharding: Sharding | None) -> World:
    """The world that accelerate's launcher, or torchrun, has put this process into: by RANK, WORLD_SIZE, LOCAL_RANK and
    MASTER_ADDR of its environment. Where they aren't set this process is alone. RecipeError where several are to train on GPUs
    and this machine has too few: one that trained on its CPU would take the others' time.
    """
    on_cuda = torch.cuda.is_available() and not use_cpu
    local_rank, size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and not use_cpu and local_rank >= torch.cuda.device_count():
        raise RecipeError(
            f"the accelerate configuration asks for {os.environ['LOCAL_WORLD_SIZE']} GPUs of this machine, "
            f"which has {torch.cuda.device_count()}: lower num_processes (and gpu_ids), or say use_cpu: true"
        )
    device = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    if size == 1:
        return World(device)
    torch.distributed.init_process_group("nccl" if on_cuda else "gloo", timeout=PATIENCE)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
    return World(device, int(os.environ["RANK"]), size, local_rank, local_size, sharding)


def leave_world(world: World) -> None:
    """Ends what `join_world` began: a process that exits without it warns, or waits for the others."""
    if world.size > 1:
        torch.distributed.destroy_process_group()
