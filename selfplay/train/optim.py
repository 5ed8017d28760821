"""fp32 master weights under a bf16 model, the optimizer over them, the schedule."""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfplay import store
from selfplay.errors import DataError, RecipeError
from selfplay.train.four_bit import compute_in
from selfplay.train.settings import TrainJob, TrainSettings
from selfplay.train.world import World


class Masters:
    """The weights that the optimizer sees, in fp32, whatever the model computes in.

    Pure bf16 weights lose updates silently at DPO's learning rates: a step of 1e-6 is below bf16's spacing near 0.01.
    Where the model itself is fp32 its own parameters are the masters. A `compute_dtype` of None leaves it as it is.
    """

    def __init__(self, model: nn.Module, *, compute_dtype: torch.dtype | None) -> None:
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.compute = [p for p in model.parameters() if p.requires_grad]
        self.is_copy = compute_dtype not in (None, torch.float32)
        masters = [p.detach().float().clone() for p in self.compute] if self.is_copy else []
        if compute_dtype is not None:
            cast_parameters(model, compute_dtype)
        self.weights: list[Tensor] = [m.requires_grad_() for m in masters] if self.is_copy else list(self.compute)
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        self.embeddings = [w for w, p in zip(self.weights, self.compute, strict=True) if id(p) in tables]

    def accumulate(self) -> None:
        """Adds the gradients of the last backward pass to the masters', in fp32."""
        if not self.is_copy:
            return
        for master, param in zip(self.weights, self.compute, strict=True):
            if param.grad is not None:
                grad = param.grad.float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                param.grad = None

    def sum_gradients(self, world: World) -> None:
        """Sums the gradients of a step over all processes."""
        world.add(w.grad for w in self.weights if w.grad is not None)

    @torch.no_grad()
    def refresh(self) -> None:
        """Casts the masters to the compute copies: once a step, where autocast would cast in every forward."""
        if self.is_copy:
            for master, param in zip(self.weights, self.compute, strict=True):
                param.copy_(master)

    def clear_gradients(self) -> None:
        """Forgets the gradients of a step that is given up."""
        for weight in (*self.weights, *self.compute):
            weight.grad = None

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over stored weights, as `named` gave them."""
        own = dict(zip(self.names, self.weights, strict=True))
        for name, weight in weights:
            own[name].copy_(weight)
        self.refresh()

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
        """(name, fp32 weight)."""
        return ((n, w.detach()) for n, w in zip(self.names, self.weights, strict=True))

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


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the parameters in place and no buffer: `model.to(dtype)` would round the rotary frequencies as well, and move
    the logps of late positions. 4-bit weights stay as they are, and compute in `dtype`.
    """
    for param in model.parameters():
        if param.is_floating_point() and param.dtype != dtype:
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


def make_schedule(optimizer: torch.optim.Optimizer, job: TrainJob, num_steps: int, *, done: int) -> Any:
    """transformers' schedule of the recipe's name, `done` steps into the job. A warmup_steps below 1 is a share of the
    schedule. A schedule is a function of the step alone, so its place is all there is to resume.
    """
    from transformers import get_scheduler

    settings = job.settings
    total = job.total_steps or num_steps
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
