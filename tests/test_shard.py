"""Weights that are cut over processes, here over one: no old weights are used, and layers that a user names are there."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from selfplay.errors import RecipeError
from selfplay.train.logps import TokenLogps
from selfplay.train.model import load_model
from selfplay.train.pack import build_packs
from selfplay.train.shard import ShardedMasters, shard
from selfplay.train.world import Sharding, World
from selfplay.types import PreferencePair


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A group of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def world_of(**sharding: object) -> World:
    return World(torch.device("cpu"), sharding=Sharding(**sharding))  # type: ignore[arg-type]


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("again", [True, False], ids=["reshard", "keep"])
def test_weights_that_are_loaded_after_a_pass_without_gradients_are_used_from_there_on(
    again: bool, tiny: Path, pairs: Sequence[PreferencePair]
) -> None:
    world, module = world_of(reshard_after_forward=again), TokenLogps(load_model(str(tiny)))
    shard(module, world, bf16=False)
    masters = ShardedMasters(module, world)
    pack = build_packs(pairs, range(len(pairs)), max_pack_tokens=1 << 20, shared=True)[0]
    with torch.no_grad():
        before = module(pack)
        masters.load([(name, weight * 0.5) for name, weight in masters.named()])
        after = module(pack)
        plain = TokenLogps(load_model(str(tiny)))
        for weight in plain.parameters():
            weight.mul_(0.5)
        assert torch.equal(after, plain(pack))
    assert not torch.equal(before, after)


@pytest.mark.usefixtures("group")
def test_a_class_of_layers_that_the_model_has_not_is_named(tiny: Path) -> None:
    world = world_of(layers=("LlamaDecoderLayer", "LlamaLayer"))
    with pytest.raises(RecipeError, match=r"this model has no layers named LlamaLayer\. Name"):
        shard(TokenLogps(load_model(str(tiny))), world, bf16=False)
