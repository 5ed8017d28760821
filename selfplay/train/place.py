"""A model on the device of this process, or cut over the devices of all of them, after the probe."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from selfplay.train.logps import TokenLogps
from selfplay.train.model import probe
from selfplay.train.optim import Masters
from selfplay.train.shard import ShardedMasters, shard
from selfplay.train.world import World

R = TypeVar("R")
FP32_SHARE = 0.8  # of the free memory that weights in fp32 may take for a moment; the probe needs some beside them


@dataclass(frozen=True, slots=True)
class Placed:
    """`shared` says whether packs may share prompts, `difference` by how much they then differ; None where not probed."""

    module: TokenLogps
    masters: Masters
    shared: bool | None
    difference: float | None


def place(load: Callable[[], Any], world: World, *, bf16: bool, check: bool) -> Placed:
    """What `load` returns, in fp32, made ready: probed where `check` says so, computing in bf16 or fp32, its masters beside it.

    A model that is to be sharded may be too large for any one device. It is then probed on the CPU, by the first process,
    and the processes of a machine load it one after the other.
    """
    if world.sharding is not None:
        return _place_sharded(load, world, bf16=bf16, check=check)
    model = load()
    probed = moved(model, world.device, bf16=bf16, look=lambda at: probe(model, at) if check else (None, None))
    masters = Masters(model, compute_dtype=torch.bfloat16 if bf16 else torch.float32)
    shared, difference = world.first(lambda: probed)
    return Placed(TokenLogps(model), masters, shared, difference)


def moved(model: nn.Module, device: torch.device, *, bf16: bool, look: Callable[[torch.device], R]) -> R:
    """Moves an fp32 model to a device, and returns what `look` finds at the device that it is told. Where frozen weights will
    be bf16, and in fp32 wouldn't fit, it looks where the model was loaded, and they are bf16 before they move.
    """
    frozen = [param for param in model.parameters() if not param.requires_grad]
    room = FP32_SHARE * free_bytes(device)
    if not (bf16 and frozen and sum(param.nbytes for param in model.parameters()) > room):
        model.to(device)
        return look(device)
    found = look(frozen[0].device)
    narrow(frozen)
    model.to(device)
    return found


def narrow(frozen: Iterable[nn.Parameter]) -> None:
    """Casts weights that don't train to bf16: nothing is lost to rounding."""
    for param in frozen:
        if param.is_floating_point():
            param.data = param.data.to(torch.bfloat16)


def free_bytes(device: torch.device) -> float:
    """What a CUDA device has free; of a CPU, where the model is already, no limit."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


@contextmanager
def _all_cores(device: torch.device) -> Iterator[None]:
    """In the block a process beside a GPU computes with all cores of its machine. The launcher gives each one thread, and
    to probe 70 billion weights in fp32 is 40 TFLOP, while the others wait.
    """
    before = torch.get_num_threads()
    if device.type == "cuda":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _place_sharded(load: Callable[[], Any], world: World, *, bf16: bool, check: bool) -> Placed:
    probed: tuple[bool | None, float | None] = (None, None)

    def load_and_shard() -> tuple[TokenLogps, Masters]:
        nonlocal probed
        model = load()
        if check and world.is_first:
            probed = probe(model, torch.device("cpu"))
        if bf16:
            narrow(param for param in model.parameters() if not param.requires_grad)
        module = TokenLogps(model)
        shard(module, world, bf16=bf16)
        return module, ShardedMasters(module, world)

    with _all_cores(world.device):
        module, masters = world.in_turn(load_and_shard)
    shared, difference = world.first(lambda: probed)
    return Placed(module, masters, shared, difference)
