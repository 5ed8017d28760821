"""fp32 master weights under a bf16 model, the optimizer over them, the schedule."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from selfplay.train.settings import TrainJob, TrainSettings


class Masters:
    """The weights that the optimizer sees, in fp32, whatever the model computes in.

    Pure bf16 weights lose updates silently at DPO's learning rates: a step of 1e-6 is below bf16's spacing near 0.01.
    Where the model itself is fp32 its own parameters are the masters.
    """

    def __init__(self, model: nn.Module, *, compute_dtype: torch.dtype) -> None:
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.compute = [p for p in model.parameters() if p.requires_grad]
        self.is_copy = compute_dtype != torch.float32
        masters = [p.detach().float().clone() for p in self.compute] if self.is_copy else []
        cast_parameters(model, compute_dtype)
        self.weights: list[Tensor] = [m.requires_grad_() for m in masters] if self.is_copy else list(self.compute)

    def accumulate(self) -> None:
        """Adds the gradients of the last backward pass to the masters', in fp32."""
        if not self.is_copy:
            return
        for master, param in zip(self.weights, self.compute, strict=True):
            if param.grad is not None:
                grad = param.grad.float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                param.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Casts the masters to the compute copies: once a step, where autocast would cast in every forward."""
        if self.is_copy:
            for master, param in zip(self.weights, self.compute, strict=True):
                param.copy_(master)

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


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the parameters in place and no buffer: `model.to(dtype)` would round the rotary frequencies as well, and move
    the logps of late positions.
    """
    for param in model.parameters():
        param.data = param.data.to(dtype)


def make_optimizer(weights: list[Tensor], settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer that a recipe names. Weight decay spares vectors (norms, biases), as transformers does."""
    groups = [
        {"params": [w for w in weights if w.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
    ]
    if settings.optim == "rmsprop":
        return torch.optim.RMSprop(groups, lr=settings.learning_rate, eps=settings.adam_epsilon)
    betas = (settings.adam_beta1, settings.adam_beta2)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.adam_epsilon, fused=True)


def make_schedule(optimizer: torch.optim.Optimizer, job: TrainJob, num_steps: int) -> Any:
    """transformers' schedule of the recipe's name. A warmup_steps below 1 is a share of the schedule."""
    from transformers import get_scheduler

    total = job.total_steps or num_steps
    warmup = job.settings.warmup_steps
    warmup_steps = round(warmup * total) if warmup < 1 else int(warmup)
    schedule = get_scheduler(
        job.settings.lr_scheduler_type, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total
    )
    for _ in range(job.first_step):
        optimizer._opt_called = True  # type: ignore[attr-defined]  # torch warns of a schedule that runs ahead; here it must
        schedule.step()
    return schedule
