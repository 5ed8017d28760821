"""What the forward pass keeps for the backward one, and what is made again because that is cheap.

In a layer of Llama's kind about half of what autograd keeps follows from the rest by a few operations on each number: what a
norm gives, its input once more in fp32, and of the gated MLP the activation and the product. Norms and MLPs are replaced by
ones that keep their own input alone, and layers that keep what these gave keep instead how it is made. A module is replaced
only where the new class gives the same bits on a trial. Matrix products and attention are never run again.
Shapes: T tokens (any leading dimensions), D hidden.
"""

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class _Kept:
    """A tensor as it was. autograd's own check is off where tensors are kept by hooks."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version

    def take(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError("the model has changed in place what its backward pass needs")
        return self.tensor


class Made:
    """How a tensor is made again of some others, and how many layers have kept it: they use it one after another, so it is
    made once.
    """

    def __init__(self, again: Callable[..., Tensor], *made_of: Tensor) -> None:
        self.again = again
        self.made_of = [_Kept(tensor) for tensor in made_of]
        self.uses = 0
        self.value: Tensor | None = None

    def take(self) -> Tensor:
        value = self.value
        if value is None:
            with torch.no_grad():
                value = self.again(*(kept.take() for kept in self.made_of))
        self.uses -= 1
        self.value = value if self.uses > 0 else None
        return value


# What the forward pass that is under way can make again, by address, with its version. Memory is given out anew: an entry
# counts only as long as its tensor is there.
_Table = dict[int, tuple[weakref.ref[Tensor], int, Made]]
_table: ContextVar[_Table | None] = ContextVar("table", default=None)


@contextmanager
def keeping_less() -> Iterator[None]:
    """Within it, layers that would keep what a replaced module gave keep how to make it."""
    table: _Table = {}

    def pack(kept: Tensor) -> Any:
        if (entry := table.get(kept.data_ptr())) is None:
            return _Kept(kept)
        alive, version, made = entry
        given = alive()
        if given is None or given._version != version or not kept.is_contiguous():
            return _Kept(kept)
        if (kept.numel(), kept.dtype) != (given.numel(), given.dtype):
            return _Kept(kept)
        made.uses += 1
        return made, kept.shape

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, _Kept):
            return packed.take()
        made, shape = packed
        value: Tensor = made.take().view(shape)
        return value

    token = _table.set(table)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _table.reset(token)


def _remember(given: Tensor, again: Callable[..., Tensor], *made_of: Tensor) -> None:
    table = _table.get()
    if table is not None and given.is_contiguous():
        table[given.data_ptr()] = weakref.ref(given), given._version, Made(again, *(t.detach() for t in made_of))


class LeanNorm(nn.Module):
    """Llama's RMSNorm: weight * (x / sqrt(mean(x^2) + epsilon)), the mean in fp32, the product in the dtype of x."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        given: Tensor
        with torch.no_grad():
            scale = torch.rsqrt(hidden_states.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        given = _Norm.apply(hidden_states, self.weight, scale)  # type: ignore[no-untyped-call]
        _remember(given, _normed, hidden_states, self.weight, scale)
        return given


class LeanMLP(nn.Module):
    """Llama's gated MLP: down(act(gate(x)) * up(x))."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        product = _Gated.apply(gate, up, self.act_fn)  # type: ignore[no-untyped-call]
        _remember(product, partial(_gated, act=self.act_fn), gate, up)
        given: Tensor = self.down_proj(product)
        return given


def _normed(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return weight * (x.float() * scale).to(x.dtype)


def _gated(gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    return act(gate) * up


class _Norm(torch.autograd.Function):
    """With n = x * scale: d x = scale (g - n mean(g n)), g = grad * weight; d weight = the sum over T of grad n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, scale)
        return _normed(x, weight, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed.to(x.dtype)).flatten(0, -2).sum(0).to(weight.dtype)
        inner = (grad * weight).float()
        mean = (inner * normed).mean(-1, keepdim=True)
        return (inner - normed.mul_(mean)).mul_(scale).to(x.dtype), grad_weight, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return _gated(gate, up, act)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            active = ctx.act(gate)
        (grad_gate,) = torch.autograd.grad(active, gate, grad * up)
        return grad_gate, active.detach().mul_(grad), None


def replace_modules(model: Any) -> int:
    """Has a model's norms and MLPs keep less, where they are of the kinds above; returns how many. Those that were replaced
    before stay as they are.
    """
    lean: dict[type, type | None] = {}
    count = 0
    for module in model.modules():
        kind = type(module)
        if kind not in lean:
            lean[kind] = _lean_class(module, model)
        if (found := lean[kind]) is not None:
            # not a new forward in the module itself: it would hold the module, and a model that is let go would stay
            module.__class__ = found
            count += 1
    return count


def _lean_class(module: nn.Module, model: Any) -> type | None:
    """The class of modules like this one that keeps less; None where there is none that gives the same bits."""
    if isinstance(module, LeanNorm | LeanMLP):
        return None
    names, children = set(dict(module.named_parameters(recurse=False))), set(dict(module.named_children()))
    if names == {"weight"} and not children and "variance_epsilon" in vars(module):
        # in bf16 and with a weight of any numbers, where formulas that differ in rounding alone differ too
        trial = copy.deepcopy(module).to("cpu", torch.bfloat16)
        weight = trial.get_parameter("weight")
        weight.data = _drawn(*weight.shape, like=weight)
        return _if_same(LeanNorm, trial, _drawn(3, len(weight), like=weight))
    if children == {"gate_proj", "up_proj", "down_proj", "act_fn"} and not names:
        width = model.config.get_text_config().hidden_size
        return _if_same(LeanMLP, module, _drawn(2, width, like=model.get_input_embeddings().weight))
    return None


def _if_same(lean: type[nn.Module], module: nn.Module, x: Tensor) -> type | None:
    kind = type(module)
    found = type(kind.__name__, (lean, kind), {"__module__": kind.__module__})
    with torch.no_grad():
        wanted = module(x)
        module.__class__ = found
        given = module(x)
        module.__class__ = kind
    return found if given.dtype == wanted.dtype and torch.equal(given, wanted) else None


def _drawn(*shape: int, like: Tensor) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)
