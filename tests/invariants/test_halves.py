"""fp32 weights kept as two halves of 16 bits beside nothing else."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from jobs import random_pairs, settings
from test_memory import trainer_of
from torch import Tensor

from selfplay.train import halves
from selfplay.train.halves import join, split
from selfplay.train.model import load_model
from selfplay.train.optim import Masters, make_optimizer
from selfplay.types import PreferencePair


def every_kind_of_weight() -> Tensor:
    """Zeros, the smallest and the largest numbers, infinities, and numbers around every half between two of bf16's."""
    upper = torch.arange(0, 0x7F80, 7)
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    positive = torch.cat([((upper[:, None] << 16) | lower).flatten(), torch.tensor([0x7F80_0000])])
    return torch.cat([positive.to(torch.int32), (positive - (1 << 31)).to(torch.int32)]).view(torch.float32)


@pytest.mark.parametrize("chunk", [1 << 16, 1000], ids=["whole", "chunks"])
def test_halves_give_back_every_bit_and_the_upper_one_is_the_nearest(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(halves.CHUNKS, "cpu", chunk)
    weight = every_kind_of_weight()
    upper, lower = torch.empty_like(weight, dtype=torch.bfloat16), torch.empty_like(weight, dtype=torch.int16)
    split(weight, upper, lower)
    back = torch.full_like(weight, 7.0)
    join(upper, lower, back)
    assert torch.equal(back.view(torch.int32), weight.view(torch.int32))
    tie = lower == -(1 << 15)
    assert tie.any()
    assert torch.equal(upper[~tie].view(torch.int16), weight[~tie].bfloat16().view(torch.int16))
    assert (upper[tie].double().abs() > weight[tie].double().abs()).all(), "a half goes away from zero"


def memory_of(tensors: Sequence[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


def test_weights_that_compute_in_bf16_take_four_bytes_and_are_the_loaded_ones(tiny: Path) -> None:
    model = load_model(str(tiny))
    loaded = {name: p.detach().clone() for name, p in model.named_parameters()}
    masters = Masters(model, compute_dtype=torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    assert memory_of([*masters.weights, *masters.compute, *masters.lower]) == 4 * count
    assert all(torch.equal(weight, loaded[name]) for name, weight in masters.named())


@pytest.mark.parametrize("optim", ["adamw_torch", "rmsprop"])
def test_weights_in_halves_take_the_very_steps_of_fp32_ones(optim: str, tiny: Path) -> None:
    chosen = settings(optim=optim, weight_decay=0.1)
    cut = Masters(load_model(str(tiny)), compute_dtype=torch.bfloat16)
    plain = Masters(load_model(str(tiny)), compute_dtype=torch.float32)
    optimizers = [make_optimizer(masters, chosen) for masters in (cut, plain)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for one, other in zip(cut.weights, plain.weights, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for masters, optimizer in zip((cut, plain), optimizers, strict=True):
            masters.update(optimizer)
    changed = [name for name, weight in plain.named() if not torch.equal(weight, dict(cut.named())[name])]
    assert changed == []
    assert memory_of(cut.weights) == 0, "they have memory only while the optimizer works on them"
    assert all(w.grad is None for w in (*cut.weights, *plain.weights))


def test_no_two_weights_have_a_gradient_in_bf16_at_a_time(tiny: Path) -> None:
    drawn: list[PreferencePair] = random_pairs()
    trainer = trainer_of(tiny, drawn, bf16=True)
    held: list[int] = []
    for param in trainer.masters.compute:
        param.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(p.grad is not None for p in trainer.masters.compute))
        )
    trainer._accumulate(drawn, range(len(drawn)))
    assert held
    assert set(held) == {0}
    assert all(w.grad is not None and w.grad.dtype == torch.float32 for w in trainer.masters.weights)


def test_gradients_of_packs_add_up_in_fp32(tiny: Path) -> None:
    drawn = random_pairs()
    trainer = trainer_of(tiny, drawn, bf16=True)
    trainer._accumulate(drawn, range(len(drawn)))
    once = [w.grad.clone() for w in trainer.masters.weights if w.grad is not None]
    trainer._accumulate(drawn, range(len(drawn)))
    for first, weight in zip(once, trainer.masters.weights, strict=True):
        assert weight.grad is not None
        assert torch.equal(weight.grad, first + first)
