"""What the forward pass keeps for the backward one, and that the gradients stay what they are."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import random_pairs
from test_memory import difference, gradients, trainer_of
from tiny import make_tiny_model
from torch import Tensor, nn

from selfplay.plan_models import facts_in
from selfplay.train import logps, optim, trainer
from selfplay.train.activations import LeanMLP, LeanNorm, keeping_less, replace_modules
from selfplay.train.attention import mask_blocks
from selfplay.train.logps import TokenLogps
from selfplay.train.model import load_model
from selfplay.train.pack import build_packs
from selfplay.train.sizes import PackSize

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 32},  # its norms add 1 to the weight, its activation is gelu
    "phi3": {},  # gate and up are one matrix
}
LEAN = ("llama", "qwen3")
HOOKS = torch.autograd.graph.saved_tensors_hooks


def packed_as_it_is(packed: Any) -> bool:
    return not isinstance(packed, tuple)


def kept_bytes(module: TokenLogps, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that a forward pass of packs keeps for the backward one, weights left out."""
    found: dict[int, Tensor] = {}
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def counting(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> Any:
        def counted(kept: Tensor) -> Any:
            packed = pack(kept)
            if packed_as_it_is(packed) and kept.untyped_storage().data_ptr() not in weights:
                found[kept.untyped_storage().data_ptr()] = kept
            return packed

        return HOOKS(counted, unpack)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", counting)
    drawn = random_pairs(prompt_length=40, length=20)
    module(build_packs(drawn, range(len(drawn)), max_pack_tokens=2048, shared=True)[0]).sum().backward()
    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", HOOKS)
    return sum(t.untyped_storage().nbytes() for t in found.values())


@pytest.mark.parametrize("family", LEAN)
def test_a_forward_pass_keeps_little_more_than_half(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_model(tmp_path, family=family, intermediate_size=256)
    lean = kept_bytes(TokenLogps(load_model(str(model)).bfloat16()), monkeypatch)
    monkeypatch.setattr(logps, "replace_modules", lambda model: 0)
    assert lean < 0.6 * kept_bytes(TokenLogps(load_model(str(model)).bfloat16()), monkeypatch)


@pytest.mark.parametrize("width", [2, 4], ids=["bf16", "fp32"])
def test_what_layers_keep_is_about_what_is_counted(width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_model(tmp_path, intermediate_size=256, num_hidden_layers=4)
    module = TokenLogps(load_model(str(model)).to(torch.bfloat16 if width == 2 else torch.float32))
    drawn = random_pairs(prompt_length=40, length=20)  # as kept_bytes draws them
    pack = build_packs(drawn, range(len(drawn)), max_pack_tokens=2048, shared=True)[0]
    blocks = mask_blocks(module.mask(pack)).parts  # type: ignore[arg-type]
    seen = sum((b.end - b.start) * (b.num_shared + b.end - b.start) for b in blocks)
    size = PackSize(pack.num_tokens, 0, width, seen // pack.num_tokens, on_gpu=False, checkpointing=False)
    dimensions = facts_in(model).dimensions
    assert dimensions is not None
    assert 4 * size.layer_bytes(dimensions) == pytest.approx(kept_bytes(module, monkeypatch), rel=0.2)
    less = replace(size, checkpointing=True)
    assert less.bytes_of(dimensions) < size.bytes_of(dimensions)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_models_own_modules(
    family: str, bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_model(tmp_path, family=family, **FAMILIES[family])
    drawn = random_pairs(prompt_length=40, length=20)
    lean = trainer_of(model, drawn, bf16=bf16)
    replaced = sum(isinstance(m, LeanNorm | LeanMLP) for m in lean.module.modules())
    assert replaced > 0 or family == "phi3"
    found = gradients(lean, drawn, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(logps, "replace_modules", lambda model: 0)
        plain = trainer_of(model, drawn, bf16=bf16)
    # the norms' backward pass stays in fp32 where torch rounds between its operations
    assert difference(found, gradients(plain, drawn, monkeypatch)) < (5e-3 if bf16 else 1e-6)


@pytest.mark.parametrize("family", LEAN)
def test_logps_are_the_same_to_the_last_bit(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_model(tmp_path, family=family)
    drawn = random_pairs(prompt_length=40, length=20)
    pack = build_packs(drawn, range(len(drawn)), max_pack_tokens=2048, shared=True)[0]
    lean = TokenLogps(load_model(str(model)).bfloat16())
    monkeypatch.setattr(logps, "replace_modules", lambda model: 0)
    plain = TokenLogps(load_model(str(model)).bfloat16())
    assert torch.equal(lean(pack), plain(pack))


def test_a_norm_that_rounds_elsewhere_stays_as_it_is(tmp_path: Path) -> None:
    class Other(nn.Module):
        """Olmo2's: the weight is multiplied in fp32."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(32))
            self.variance_epsilon = 1e-6

        def forward(self, hidden_states: Tensor) -> Tensor:
            x = hidden_states.float()
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
            return (self.weight.float() * x).to(hidden_states.dtype)

    norm = Other()
    assert replace_modules(norm) == 0
    assert type(norm) is Other


def test_what_a_model_changes_in_place_is_kept_as_it_became_or_refused(tiny: Path) -> None:
    norm = load_model(str(tiny)).base_model.norm
    replace_modules(norm)
    x, other = torch.randn(2, 3, 64, requires_grad=True).unbind(0)
    with keeping_less():
        changed = norm(x).mul_(2.0)
        loss = (changed * other).sum()
    wanted = 2 * norm(x.detach())
    assert torch.equal(torch.autograd.grad(loss, other)[0], wanted)
    with keeping_less():
        held = x * 1.0
        loss = norm(held).sum()
        held.mul_(2.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_a_model_is_replaced_once_and_let_go_with_its_last_name(tiny: Path) -> None:
    model = load_model(str(tiny))
    assert replace_modules(model) > 0
    assert replace_modules(model) == 0
    alive = weakref.ref(model.base_model.layers[0].mlp)
    del model
    assert alive() is None, "a reference is released before the optimizer takes memory"


def test_memory_goes_back_to_the_system_around_and_within_every_backward_pass(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = random_pairs()
    made = trainer_of(tiny, drawn, max_pack_tokens=60)
    between: list[torch.device] = []
    within: list[torch.device] = []
    for module in (trainer, logps):
        monkeypatch.setattr(module, "trim_memory", between.append)
    monkeypatch.setattr(optim, "trim_memory", within.append)
    made.step(drawn, range(len(drawn)), number=1, check_zero=False)
    packs = build_packs(drawn, range(len(drawn)), max_pack_tokens=60, shared=True)
    assert len(packs) > 1
    assert len(between) == 2 * len(packs) + 1, "before the head, after the backward pass, after the update"
    assert optim.TRIMS / 2 <= len(within) / len(packs) <= optim.TRIMS
