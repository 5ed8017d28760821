"""The token budget of packs: measured within the memory that there is, kept in the run, and without a say in the gradient."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import ALONE, job_of, settings, steps
from tiny import make_tiny_model

from selfplay import store
from selfplay.errors import RecipeError
from selfplay.train import budget
from selfplay.train.budget import CPU_PACK_TOKENS, DENSE_PACK_LENGTH, SIZES, grow, measured, with_pack_length
from selfplay.train.logps import TokenLogps
from selfplay.train.loop import run_training
from selfplay.train.model import load_model
from selfplay.train.optim import Masters
from selfplay.train.world import Sharding, World
from selfplay.types import PreferencePair

CPU = torch.device("cpu")


class FakeMeter:
    """A device on which a token takes a byte, beside `held` bytes of weights; more than `room` is out of memory."""

    def __init__(self, module: TokenLogps, *, held: int, limit: int, room: int) -> None:
        self.held, self._limit, self.room = held, limit, room
        self.tokens = 0
        module.register_forward_pre_hook(self._count)

    def _count(self, module: object, inputs: tuple[Any]) -> None:
        self.tokens = inputs[0].num_tokens
        if self.held + self.tokens > self.room:
            raise torch.OutOfMemoryError

    def limit(self, promised: int) -> int:
        return self._limit - promised

    def peak(self, work: Callable[[], object]) -> int:
        work()
        return self.held + self.tokens


@pytest.mark.parametrize("cost", [lambda t: 1000 + 3 * t, lambda t: 1000 + t * t // 500], ids=["linear", "square"])
def test_no_size_is_tried_whose_peak_would_be_beyond_the_limit(cost: Callable[[int], int]) -> None:
    tried = grow(cost, 20_000)
    assert [tokens for tokens, _ in tried] == list(SIZES[: len(tried)])
    assert len(tried) > 2
    assert all(peak <= 20_000 for _, peak in tried)


def test_the_largest_sizes_are_tried_where_there_is_room_for_them() -> None:
    assert [tokens for tokens, _ in grow(lambda tokens: tokens, 1 << 40)] == list(SIZES)


def test_a_size_that_runs_out_of_memory_ends_the_search() -> None:
    def peak(tokens: int) -> int:
        if tokens > 1024:
            raise torch.OutOfMemoryError
        return 0

    assert [tokens for tokens, _ in grow(peak, 1)] == [256, 512, 1024]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_measuring_forwards_real_packs_and_leaves_no_trace(bf16: bool, tiny: Path) -> None:
    chosen = settings(bf16=bf16)
    model = load_model(str(tiny))
    module = TokenLogps(model)
    masters = Masters(model, compute_dtype=torch.bfloat16 if bf16 else torch.float32)
    before = [w.detach().clone() for w in (*dict(masters.named()).values(), *masters.compute)]
    random_state = torch.get_rng_state()
    state = 8 * sum(w.numel() for w in masters.weights)
    meter = FakeMeter(module, held=10, limit=state + 3000, room=state + 4000)
    found = measured(module, masters, chosen, meter, shared=True, world=ALONE)
    assert found["limit_bytes"] == 3000, "what AdamW will hold is left free"
    assert [tokens for tokens, _ in found["peak_bytes"]] == [256, 512, 1024]
    for tokens, peak in found["peak_bytes"]:
        assert tokens * 0.7 < peak <= tokens + 10
    assert found["max_pack_tokens"] == 1024
    assert all(w.grad is None for w in (*masters.weights, *masters.compute))
    after = (*dict(masters.named()).values(), *masters.compute)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_device_with_too_little_memory_for_any_size_gets_the_smallest(tiny: Path) -> None:
    model = load_model(str(tiny))
    module, masters = TokenLogps(model), Masters(model, compute_dtype=torch.float32)
    meter = FakeMeter(module, held=0, limit=0, room=10)
    assert measured(module, masters, settings(), meter, shared=True, world=ALONE)["max_pack_tokens"] == SIZES[0]


def test_a_device_of_several_with_cut_weights_that_runs_out_of_memory_ends_the_job(tiny: Path) -> None:
    model = load_model(str(tiny))
    module, masters = TokenLogps(model), Masters(model, compute_dtype=torch.float32)
    state = 8 * sum(w.numel() for w in masters.weights)
    meter = FakeMeter(module, held=0, limit=state + 100_000, room=1500)
    with pytest.raises(RecipeError, match=r"at a pack of 2048 tokens.*Set train\.max_pack_tokens to less than 2048"):
        measured(module, masters, settings(), meter, shared=True, world=World(CPU, sharding=Sharding()))


def test_the_budget_is_recorded_once_and_taken_from_there(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    kept = tmp_path / "run" / "pack_budget.json"
    job, one_step = {"pack_budget": str(kept)}, {"max_steps": 1, "batch_size": 12}
    first = run_training(job_of(tmp_path / "one", tiny, pairs, job=job, **one_step))
    assert first["max_pack_tokens"] == store.read_json(kept)["max_pack_tokens"] == CPU_PACK_TOKENS
    store.write_json(kept, {"max_pack_tokens": 50, "device": "another"})
    second = run_training(job_of(tmp_path / "two", tiny, pairs, job=job, **one_step))
    assert second["max_pack_tokens"] == 50
    fixed = run_training(job_of(tmp_path / "three", tiny, pairs, job=job, **one_step, max_pack_tokens=20))
    assert fixed["max_pack_tokens"] == 20
    # prompts that are parted by the smaller packs are forwarded with each of their parts
    tokens = [steps(tmp_path / name)[0]["num_tokens"] for name in ("one", "two", "three")]
    assert tokens[0] < tokens[1] < tokens[2]


def test_a_job_that_names_no_file_keeps_its_budget_in_its_own_folder(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    run_training(job_of(tmp_path, tiny, pairs, max_steps=1))
    assert store.read_json(tmp_path / "out" / "pack_budget.json")["device"] == "cpu"


def test_only_models_with_dense_masks_get_a_length_of_rows_by_themselves(tiny: Path, tmp_path: Path) -> None:
    dense = make_tiny_model(tmp_path, family="gemma2", attn_logit_softcapping=2.0, query_pre_attn_scalar=32)
    chosen = settings()
    assert with_pack_length(chosen, load_model(str(tiny))).max_pack_length is None
    assert with_pack_length(chosen, load_model(str(dense))).max_pack_length == DENSE_PACK_LENGTH
    assert with_pack_length(settings(max_pack_length=9), load_model(str(dense))).max_pack_length == 9


def test_the_length_of_rows_reaches_training_and_the_reference_pass(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import selfplay.train.reference_pass as reference_pass
    import selfplay.train.trainer as trainer

    widths: dict[str, list[int]] = {"reference_pass": [], "trainer": []}
    for module in (reference_pass, trainer):
        name = module.__name__.rpartition(".")[2]

        def spy(*arguments: Any, real: Any = module.own_packs, name: str = name, **named: Any) -> Any:
            made = real(*arguments, **named)
            widths[name] += [pack.input_ids_RT.shape[1] for pack, _ in made]
            return made

        monkeypatch.setattr(module, "own_packs", spy)
    result = run_training(job_of(tmp_path, tiny, pairs, max_steps=1, batch_size=12, max_pack_length=130))
    assert result["audit/zero_logratio"] == 0, "the reference pass takes the very packs of the first step"
    assert widths["trainer"]
    assert max(widths["trainer"]) <= 130 < result["num_tokens"]
    assert set(widths["trainer"]) <= set(widths["reference_pass"])


def test_8_bit_states_of_embeddings_are_counted_as_the_fp32_that_they_are(tiny: Path) -> None:
    masters = Masters(load_model(str(tiny)), compute_dtype=torch.float32)
    (table,) = (w.numel() for w in masters.embeddings)
    every = sum(w.numel() for w in masters.weights)
    assert budget.state_bytes(masters, "adamw_bnb_8bit") == 8 * table + 2 * (every - table)
    assert budget.state_bytes(masters, "rmsprop") == 4 * every


def test_on_cuda_the_limit_is_a_share_of_what_is_free_beside_the_optimizer_s_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 321)
    meter = budget.CudaMeter(CPU)
    assert meter.limit(300) == 100 + 0.8 * 700
    assert meter.peak(lambda: None) == 321
