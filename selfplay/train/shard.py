"""FSDP2: a policy whose weights, gradients and optimizer state are cut over processes.

Every decoder layer, and what is left of the module, is gathered when it runs and given back afterwards. Each process keeps
rows of every fp32 weight; what the optimizer sees are these rows as plain tensors, so any element-wise optimizer works.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from selfplay.errors import RecipeError
from selfplay.train.logps import TokenLogps
from selfplay.train.optim import Masters
from selfplay.train.world import World


def shard(module: TokenLogps, world: World, *, bf16: bool) -> None:
    """Cuts a module that holds the same weights in every process, in place. It then computes in bf16 or fp32; gradients are
    summed over the processes, not averaged, in fp32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    assert world.sharding is not None
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # masks and rotary angles stay what they are where nothing is sharded
    )
    names = set(world.sharding.layers or module.model._no_split_modules or ())
    layers = [m for m in module.model.modules() if type(m).__name__ in names]
    missing = names - {
        type(layer).__name__ for layer in layers
    }  # the model's own list may name layers of its relatives
    if not layers or (world.sharding.layers and missing):
        raise RecipeError(
            f"the accelerate configuration asks for FSDP, but this model has no layers named {', '.join(sorted(missing))}. "
            "Name their class in fsdp_transformer_layer_cls_to_wrap, or take a configuration without FSDP"
        )
    for part in [*reversed(layers), module]:  # inner ones before those around them
        again = None if part is module else world.sharding.reshard_after_forward
        sharded = fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=again)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no sum that multiplies


class ShardedMasters(Masters):
    """The rows of the weights that this process keeps; `named` gives these, `whole` the weights."""

    def __init__(self, module: Any, world: World) -> None:
        super().__init__(module.model, compute_dtype=None)
        self.module, self.world = module, world
        # they share memory with the parameters: what the optimizer writes is gathered next time
        self.weights = [p.to_local().detach().requires_grad_() for p in self.compute if isinstance(p, DTensor)]
        assert len(self.weights) == len(self.compute), "every trained parameter is sharded"
        tables = set(map(id, self.embeddings))
        self.embeddings = [w for w, p in zip(self.weights, self.compute, strict=True) if id(p) in tables]

    def accumulate(self) -> None:
        for weight, param in zip(self.weights, self.compute, strict=True):
            if isinstance(param.grad, DTensor):
                grad = param.grad.to_local()
                weight.grad = grad if weight.grad is None else weight.grad.add_(grad)
                param.grad = None

    def sum_gradients(self, world: World) -> None:
        """Nothing: each backward pass has summed them."""

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        super().load(weights)
        self._reshard()

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        super().update(optimizer)
        self._reshard()

    def _reshard(self) -> None:
        from torch.distributed.fsdp import FSDPModule

        # After a forward pass without gradients the outermost part stays gathered, and without reshard_after_forward every
        # layer does: these would be the old weights.
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    @torch.no_grad()
    def grad_norm(self) -> float:
        squares = [w.grad.double().square().sum() for w in self.weights if w.grad is not None]
        return float(self.world.total([float(torch.stack(squares).sum()) if squares else 0.0])[0] ** 0.5)

    @torch.no_grad()
    def whole(self) -> Iterator[tuple[str, Tensor]]:
        for name, param in zip(self.names, self.compute, strict=True):
            assert isinstance(param, DTensor)
            whole = param.full_tensor()
            if self.world.is_first:
                yield name, whole.cpu()

    def gathered(self, weight: Tensor, rows: Tensor) -> Tensor:
        if rows.shape != weight.shape:  # a count of steps
            return rows
        param = self._param_of(weight)
        like = DTensor.from_local(
            rows, param.device_mesh, [Shard(0)], shape=param.shape, stride=param.stride(), run_check=False
        )
        whole: Tensor = like.full_tensor()
        return whole

    def own_rows(self, weight: Tensor, whole: Tensor) -> Tensor:
        if whole.shape != self.shape(weight):
            return whole
        parts = torch.chunk(whole, self.world.size)
        return parts[self.world.rank].clone() if self.world.rank < len(parts) else whole[:0].clone()

    def shape(self, weight: Tensor) -> torch.Size:
        return self._param_of(weight).shape

    def _param_of(self, weight: Tensor) -> DTensor:
        param = next(p for w, p in zip(self.weights, self.compute, strict=True) if w is weight)
        assert isinstance(param, DTensor)
        return param
