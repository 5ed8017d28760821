"""A model on the device of this process, or cut over the devices of all of them, after the probe."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from selfplay.train.logps import TokenLogps
from selfplay.train.model import probe
from selfplay.train.optim import Masters
from selfplay.train.shard import ShardedMasters, shard
from selfplay.train.world import World


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
    model = load().to(world.device)
    shared, difference = probe(model, world.device) if check else (None, None)
    masters = Masters(model, compute_dtype=torch.bfloat16 if bf16 else torch.float32)
    shared, difference = world.first(lambda: (shared, difference))
    return Placed(TokenLogps(model), masters, shared, difference)


def _place_sharded(load: Callable[[], Any], world: World, *, bf16: bool, check: bool) -> Placed:
    probed: tuple[bool | None, float | None] = (None, None)

    def load_and_shard() -> tuple[TokenLogps, Masters]:
        nonlocal probed
        model = load()
        if check and world.is_first:
            probed = probe(model, torch.device("cpu"))
        if bf16:
            for param in model.parameters():
                if not param.requires_grad:  # below an adapter: nothing is lost to rounding
                    param.data = param.data.to(torch.bfloat16)
        module = TokenLogps(model)
        shard(module, world, bf16=bf16)
        return module, ShardedMasters(module, world)

    module, masters = world.in_turn(load_and_shard)
    shared, difference = world.first(lambda: probed)
    return Placed(module, masters, shared, difference)
