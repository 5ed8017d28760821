"""Where a model is looked at and in which dtype it moves, decided from the memory that is free."""

from pathlib import Path

import pytest
import torch
from torch import nn

from selfplay import store
from selfplay.errors import RecipeError
from selfplay.train import kl, place
from selfplay.train.kl import KLJob, run_kl
from selfplay.train.model import load_model, probe
from selfplay.train.place import moved
from selfplay.types import Completion, Group, Prompt

CPU = torch.device("cpu")
META = torch.device("meta")  # stands for a device that the model is not loaded on


def half_frozen() -> nn.Sequential:
    """200 bytes of weights that don't train, and 200 that do."""
    model = nn.Sequential(nn.Linear(5, 10, bias=False), nn.Linear(10, 5, bias=False))
    model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("free", "bf16", "seen_at", "dtype"),
    [
        pytest.param(600.0, True, META, torch.float32, id="fits in fp32"),
        pytest.param(480.0, True, CPU, torch.bfloat16, id="does not"),
        pytest.param(480.0, False, META, torch.float32, id="does not and stays fp32"),
    ],
)
def test_a_frozen_base_that_fits_in_bf16_alone_is_looked_at_where_it_was_loaded(
    free: float, bf16: bool, seen_at: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "free_bytes", lambda device: free)
    model = half_frozen()
    seen = moved(model, META, bf16=bf16, look=lambda at: (at, {(p.device, p.dtype) for p in model.parameters()}))
    assert seen == (seen_at, {(seen_at, torch.float32)})
    assert [(p.device, p.dtype) for p in model.parameters()] == [(META, dtype), (META, torch.float32)]


def test_weights_that_all_train_move_in_fp32_whatever_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "free_bytes", lambda device: 0.0)
    model = half_frozen().requires_grad_()
    assert moved(model, META, bf16=True, look=lambda at: at) == META
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_probe_computes_in_fp32_where_the_environment_asks_for_less(tiny: Path) -> None:
    model, seen = load_model(str(tiny)), set[str]()
    model.register_forward_pre_hook(lambda *_: seen.add(torch.get_float32_matmul_precision()))
    model.base_model.register_forward_pre_hook(lambda *_: seen.add(torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision("high")
    try:
        assert probe(model, CPU)[0]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == {"highest"}


def test_an_initial_policy_that_is_too_large_to_score_names_the_field(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object, **others: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(kl, "moved", full)
    groups = tmp_path / "groups.jsonl"
    store.write_records(groups, [Group(Prompt("p", ()), (7,), (Completion("x", (8,), (-1.0,)),))], Group)
    with pytest.raises(RecipeError, match=r"evaluate\.kl: false"):
        run_kl(KLJob(str(tiny), (str(groups),), bf16=True, max_pack_tokens=None), lambda *_: None)
