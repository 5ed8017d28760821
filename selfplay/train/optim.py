"""fp32 master weights of a bf16 model, the optimizer over them, the schedule."""

import json
import math
from collections.abc import Container, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfplay import store
from selfplay.errors import DataError, RecipeError
from selfplay.train.four_bit import compute_in
from selfplay.train.halves import join, split
from selfplay.train.memory import trim_memory
from selfplay.train.settings import TrainJob, TrainSettings
from selfplay.train.world import World

TRIMS = 6  # of the memory of a CPU in a backward pass; each costs a few hundredths of a second


class Masters:
    """The weights that the optimizer sees, in fp32, whatever the model computes in.

    Pure bf16 weights lose updates silently at DPO's learning rates: a step of 1e-6 is below bf16's spacing near 0.01.
    Where the model computes in bf16 its parameters are the upper halves of the fp32 weights, and `lower` has the other halves
    (halves.py): 4 bytes a weight. `weights` are then shapes without memory, which carry the gradients; the optimizer gets one
    of them at a time, filled. Their values come from `named`. Where the model itself is fp32 its own parameters are the
    masters, as those of `wide` are in any case. A `compute_dtype` of None leaves it as it is.
    """

    def __init__(
        self, model: nn.Module, *, compute_dtype: torch.dtype | None, wide: Sequence[nn.Parameter] = ()
    ) -> None:
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.compute = [p for p in model.parameters() if p.requires_grad]
        assert compute_dtype in (None, torch.float32, torch.bfloat16), "the upper half of fp32"
        self.is_cut = compute_dtype == torch.bfloat16
        spared = set(map(id, wide))
        self.lower = [_cut(p) if self.is_cut and id(p) not in spared else None for p in self.compute]
        if compute_dtype is not None:
            cast_parameters(model, compute_dtype, spared=spared)
        self.weights: list[Tensor] = []
        for param, lower in zip(self.compute, self.lower, strict=True):
            weight = param if lower is None else _shell(param)
            self.weights.append(weight)
            if lower is not None:
                # during the backward pass, so that the gradients in bf16 never lie beside each other
                param.register_post_accumulate_grad_hook(partial(_take_gradient, weight))  # type: ignore[no-untyped-call]
        for milestone in _milestones(self.compute) if compute_dtype is not None else ():
            milestone.register_post_accumulate_grad_hook(_trim_beside)  # type: ignore[no-untyped-call]
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        self.embeddings = [w for w, p in zip(self.weights, self.compute, strict=True) if id(p) in tables]

    def accumulate(self) -> None:
        """Adds the gradients of the last backward pass to the masters', in fp32. Nothing to do: they are where the masters'
        belong, or the backward pass has taken them there.
        """

    def sum_gradients(self, world: World) -> None:
        """Sums the gradients of a step over all processes."""
        world.add(w.grad for w in self.weights if w.grad is not None)

    @torch.no_grad()
    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """One step of the optimizer, which then has no gradients any more."""
        if not self.is_cut:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return
        grads = [weight.grad for weight in self.weights]
        optimizer.zero_grad(set_to_none=True)
        # room for one weight at a time; on a CPU memory that is new costs as much time as the rest
        most = max(
            (p.numel() for p, lower in zip(self.compute, self.lower, strict=True) if lower is not None), default=0
        )
        room = torch.empty(most, dtype=torch.float32, device=self.weights[0].device)
        # an optimizer passes over weights without a gradient, so each call takes the one weight that has memory
        for number, weight in enumerate(self.weights):
            weight.grad, grads[number] = grads[number], None
            if weight.grad is None:
                continue
            upper, lower, shell = self.compute[number], self.lower[number], weight.data
            if lower is None:
                optimizer.step()
            else:
                weight.data = room[: weight.numel()].view(weight.shape)
                join(upper.data, lower, weight.data)
                optimizer.step()
                split(weight.data, upper.data, lower)
                weight.data = shell
            weight.grad = None

    def clear_gradients(self) -> None:
        """Forgets the gradients of a step that is given up."""
        for weight in (*self.weights, *self.compute):
            weight.grad = None

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over stored weights, as `named` gave them."""
        own = {name: number for number, name in enumerate(self.names)}
        for name, weight in weights:
            param, lower = self.compute[own[name]], self.lower[own[name]]
            if lower is not None:
                split(weight.to(param.device).contiguous(), param.data, lower)
            else:
                self.weights[own[name]].copy_(weight)

    @torch.no_grad()
    def grad_norm(self) -> float:
        """L2 norm of all gradients."""
        norms = [w.grad.norm() for w in self.weights if w.grad is not None]
        return float(torch.stack(norms).norm()) if norms else 0.0

    @torch.no_grad()
    def scale_gradients(self, factor: float) -> None:
        """Clipping, with the norm that is known already."""
        if factor < 1.0:
            torch._foreach_mul_([w.grad for w in self.weights if w.grad is not None], factor)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """(name, fp32 weight), each made when its turn comes where the model computes in bf16."""
        for number, name in enumerate(self.names):
            weight, lower = self.weights[number].detach(), self.lower[number]
            if lower is not None:
                weight = torch.empty_like(weight)
                join(self.compute[number].data, lower, weight)
            yield name, weight

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """The same with all rows of each weight, for the first process; all processes ask for it together."""
        return self.named()

    def gathered(self, weight: Tensor, rows: Tensor) -> Tensor:
        """The whole of an optimizer state of a weight, of which this process has `rows`; all processes ask together."""
        return rows

    def own_rows(self, weight: Tensor, whole: Tensor) -> Tensor:
        """What this process keeps of such a whole."""
        return whole

    def shape(self, weight: Tensor) -> torch.Size:
        """That of the whole weight."""
        return weight.shape


def _cut(param: Tensor) -> Tensor:
    """Leaves the upper half of an fp32 parameter in its place, and returns the lower one."""
    whole = param.detach().float().contiguous()
    lower = torch.empty_like(whole, dtype=torch.int16)
    param.data = torch.empty_like(whole, dtype=torch.bfloat16)
    split(whole, param.data, lower)
    return lower


def _shell(param: Tensor) -> Tensor:
    """An fp32 tensor of a parameter's shape and device, without memory behind it."""
    shell = torch.empty_like(param, dtype=torch.float32)
    shell.untyped_storage().resize_(0)
    return shell.requires_grad_()


def _take_gradient(weight: Tensor, param: Tensor) -> None:
    assert param.grad is not None
    weight.grad = param.grad.float() if weight.grad is None else weight.grad.add_(param.grad)
    param.grad = None


def _milestones(params: Sequence[Tensor]) -> list[Tensor]:
    """Those of the parameters after whose gradients another share of all gradients has been made."""
    total, done, found = sum(p.numel() for p in params), 0, list[Tensor]()
    for param in reversed(params):  # about the order of a backward pass
        done += param.numel()
        if done * TRIMS >= (len(found) + 1) * total:
            found.append(param)
    return found


def _trim_beside(param: Tensor) -> None:
    # the gradients that come don't fit the holes that the activations leave
    trim_memory(param.device)


def cast_parameters(model: nn.Module, dtype: torch.dtype, *, spared: Container[int] = ()) -> None:
    """Casts the parameters in place and no buffer: `model.to(dtype)` would round the rotary frequencies as well, and move
    the logps of late positions. 4-bit weights stay as they are, and compute in `dtype`; `spared` ids stay too.
    """
    for param in model.parameters():
        if param.is_floating_point() and param.dtype != dtype and id(param) not in spared:
            param.data = param.data.to(dtype)
    compute_in(model, dtype)


def make_optimizer(masters: Masters, settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer that a recipe names. Weight decay spares vectors (norms, biases), as transformers does."""
    weights = masters.weights
    groups = [
        {"params": [w for w in weights if w.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
    ]
    rate, epsilon = settings.learning_rate, settings.adam_epsilon
    betas = (settings.adam_beta1, settings.adam_beta2)
    if settings.optim == "rmsprop":
        return torch.optim.RMSprop(groups, lr=rate, eps=epsilon)
    if settings.optim == "adamw_bnb_8bit":
        return _eight_bit(groups, masters.embeddings, lr=rate, betas=betas, eps=epsilon)
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=epsilon, fused=True)


def _eight_bit(groups: list[dict[str, Any]], embeddings: list[Tensor], **settings: Any) -> torch.optim.Optimizer:
    """AdamW whose two states take a byte each, in blocks of 256 with a scale (arXiv:2110.02861). States of fewer than 4096
    values and of embeddings stay in fp32, as in transformers: rare tokens' gradients are too uneven for 8 bits.
    """
    from bitsandbytes.optim import AdamW, GlobalOptimManager

    for weight in embeddings:
        GlobalOptimManager.get_instance().override_config(weight, "optim_bits", 32)
    optimizer: torch.optim.Optimizer = AdamW(groups, optim_bits=8, **settings)
    return optimizer


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by "number of the weight/key"; empty before its first step."""
    return {
        # bitsandbytes' code tables are one tensor for all weights, and safetensors takes no shared memory
        f"{n}/{key}": torch.as_tensor(v).clone() if key.startswith("qmap") else torch.as_tensor(v).contiguous()
        for n, weight in enumerate(_weights(optimizer))
        for key, v in optimizer.state.get(weight, {}).items()
    }


def _weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _description(optimizer: torch.optim.Optimizer, masters: Masters, kind: str) -> dict[str, Any]:
    """What a stored state must have been made by."""
    return {"optim": kind, "shapes": [list(masters.shape(w)) for w in _weights(optimizer)]}


def load_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Takes over what `state_tensors` gave of an optimizer of the same kind. Learning rates stay this one's."""
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition("/")
        # a count that was a plain number is one again
        state.setdefault(int(index), {})[key] = int(tensor) if tensor.dtype == torch.int64 else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_optimizer(optimizer: torch.optim.Optimizer, masters: Masters, path: Path, kind: str, *, world: World) -> None:
    """The state as one file, for the optimizer of the next round."""
    from safetensors.torch import save_file

    weights = _weights(optimizer)
    # one key: safetensors writes several in any order, and the file is to have the same bytes every time
    metadata = {"made_by": json.dumps(_description(optimizer, masters, kind))}
    tensors: dict[str, Tensor] = {}
    for name, tensor in state_tensors(optimizer).items():
        whole = masters.gathered(weights[int(name.partition("/")[0])], tensor)
        tensors |= {name: whole.cpu()} if world.is_first else {}
    if world.is_first:
        store.write_file(path, lambda temporary: save_file(tensors, temporary, metadata))


def carry_optimizer(optimizer: torch.optim.Optimizer, masters: Masters, path: Path, kind: str) -> None:
    """Takes over such a file. DataError where it is of another kind of optimizer or of another model."""
    from safetensors import safe_open

    store.check_file(path)
    weights = _weights(optimizer)
    with safe_open(path, framework="pt") as file:
        found = json.loads((file.metadata() or {}).get("made_by", "{}"))
        wanted = _description(optimizer, masters, kind)
        if found.get("optim") != kind:
            raise DataError(
                f"{path}: this optimizer state is of {found.get('optim', 'an unknown optim')}, but train.optim is "
                f"{kind}. Name the same optim, or start with train.optimizer_state: fresh"
            )
        if found != wanted:
            raise DataError(f"{path}: this optimizer state is of another model: its weights have other shapes")
        names = list(file.keys())
        parts = {n: masters.own_rows(weights[int(n.partition("/")[0])], file.get_tensor(n)) for n in names}
        load_state(optimizer, parts)


def make_schedule(optimizer: torch.optim.Optimizer, job: TrainJob, length: int, *, done: int) -> Any:
    """transformers' schedule of the recipe's name over `length` steps, or over those of the run, `done` steps into the job. A
    warmup_steps below 1 is a share of it. A schedule is a function of the step alone, so its place is all there is to resume.
    """
    from transformers import get_scheduler

    settings = job.settings
    total = job.total_steps or length
    warmup = settings.warmup_steps
    warmup_steps = math.ceil(warmup * total) if warmup < 1 else int(warmup)
    decay_steps = settings.lr_scheduler_kwargs.get("num_decay_steps", 0)
    if warmup_steps + int(decay_steps) > total:
        raise RecipeError(
            f"train: {warmup_steps} warm-up steps and num_decay_steps {decay_steps} don't fit the {total} steps of the "
            "schedule: lower them"
        )
    schedule = get_scheduler(
        settings.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=total,
        scheduler_specific_kwargs=dict(settings.lr_scheduler_kwargs),
    )
    for _ in range(job.first_step + done):
        optimizer._opt_called = True  # type: ignore[attr-defined]  # torch warns of a schedule that runs ahead; here it must
        schedule.step()
    return schedule
