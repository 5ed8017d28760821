"""Where memory runs out the step starts over in smaller packs; where numbers go wrong nothing is updated."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import ALONE, job_of, random_pairs, settings, steps
from tiny import make_tiny_model
from torch import Tensor

from selfplay import faults, store
from selfplay.errors import NonFiniteError, RecipeError
from selfplay.train.budget import CPU_PACK_TOKENS
from selfplay.train.logps import TokenLogps
from selfplay.train.loop import run_training
from selfplay.train.model import load_model
from selfplay.train.optim import Masters, make_optimizer, make_schedule
from selfplay.train.pack import build_packs
from selfplay.train.progress import SILENT
from selfplay.train.reference import ReferenceLogps
from selfplay.train.settings import TrainJob
from selfplay.train.trainer import Trainer
from selfplay.types import PreferencePair


def trainer_of(model: Path, pairs: Sequence[PreferencePair], **changes: Any) -> Trainer:
    """A trainer at its first step; the reference is any numbers near the model's logps."""
    chosen = settings(**changes)
    network = load_model(str(model), gradient_checkpointing=chosen.gradient_checkpointing)
    masters = Masters(network, compute_dtype=torch.bfloat16 if chosen.bf16 else torch.float32)
    optimizer = make_optimizer(masters, chosen)
    logps = torch.tensor([[-6.0 * len(p.chosen_token_ids), -6.0 * len(p.rejected_token_ids)] for p in pairs])
    return Trainer(
        module=TokenLogps(network),
        masters=masters,
        optimizer=optimizer,
        schedule=make_schedule(optimizer, TrainJob("", "", "", chosen, seed=0), 4, done=0),
        world=ALONE,
        reference=ReferenceLogps(logps[:, 0].contiguous(), logps[:, 1].contiguous()),
        win_rates_2B=None,
        settings=chosen,
        shared=True,
        max_pack_tokens=chosen.max_pack_tokens or CPU_PACK_TOKENS,
        halved=[],
        note=SILENT.note,
    )


def gradients(trainer: Trainer, pairs: Sequence[PreferencePair], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Of one step over all pairs, as the optimizer sees them before clipping."""
    seen: list[Tensor] = []

    def grab(factor: float) -> None:
        seen.extend(w.grad.clone() for w in trainer.masters.weights if w.grad is not None)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.masters, "scale_gradients", grab)
        trainer.step(pairs, range(len(pairs)), number=1, check_zero=False)
    return seen


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Relative L2 distance of all gradients together."""
    one, other = (torch.cat([g.flatten() for g in side]) for side in (ours, theirs))
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_gradients_of_packs_are_the_same_with_gradient_checkpointing(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = {"sliding_window": 16, "sliding_window_pattern": 2, "query_pre_attn_scalar": 32}
    model = make_tiny_model(tmp_path, family=family, **(window if family != "llama" else {}))
    drawn = random_pairs(prompt_length=40, length=20)
    plain = gradients(trainer_of(model, drawn), drawn, monkeypatch)
    recomputed = trainer_of(model, drawn, gradient_checkpointing=True)
    forwards = 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    recomputed.module.model.base_model.layers[0].self_attn.register_forward_hook(count)
    packs = build_packs(drawn, range(len(drawn)), max_pack_tokens=2048, shared=True)
    assert difference(gradients(recomputed, drawn, monkeypatch), plain) < 1e-6
    assert forwards == 2 * len(packs), "activations are computed anew in the backward pass"


@pytest.mark.parametrize("times", [1, 2])
def test_out_of_memory_halves_the_packs_and_leaves_the_gradient(
    times: int, tiny: Path, pairs: Sequence[PreferencePair], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gradients(trainer_of(tiny, pairs), pairs, monkeypatch)
    trainer = trainer_of(tiny, pairs)
    real = faults.hit
    failed: list[int] = []

    def too_large(point: str) -> bool:
        if point == "train.pack" and len(failed) < times:
            assert trainer.pack is not None
            failed.append(trainer.pack.num_tokens)
            raise torch.OutOfMemoryError
        return real(point)

    monkeypatch.setattr(faults, "hit", too_large)
    assert difference(gradients(trainer, pairs, monkeypatch), whole) < 1e-5
    assert [row["max_pack_tokens"] for row in trainer.halved] == [size // 2 for size in failed]
    assert trainer.max_pack_tokens == failed[-1] // 2


def test_gradients_of_a_step_that_ran_out_of_memory_half_way_are_forgotten(
    tiny: Path,
    pairs: Sequence[PreferencePair],
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[str | None], None],
) -> None:
    whole = gradients(trainer_of(tiny, pairs), pairs, monkeypatch)
    for bf16 in (False, True):
        trainer = trainer_of(tiny, pairs, max_pack_tokens=120, bf16=bf16)
        fault("train.pack@2=oom")  # the first pack has been accumulated already
        found = gradients(trainer, pairs, monkeypatch)
        assert trainer.halved
        assert difference(found, whole) < (0.05 if bf16 else 1e-5)


def test_out_of_memory_is_recorded_and_kept_over_a_resume(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path, fault: Callable[[str | None], None]
) -> None:
    rig: dict[str, Any] = {"max_steps": 4, "save_steps": 1}
    fault("train.pack@2=oom")  # one pack a step: step 2
    plain = job_of(tmp_path / "plain", tiny, pairs, **rig)
    result = run_training(plain)
    assert [row["step"] for row in result["out_of_memory"]] == [2]
    cap = result["out_of_memory"][0]["max_pack_tokens"]
    assert cap < 2048
    assert store.read_json(tmp_path / "plain/out/train/result.json") == result
    # in two goes: the second one has no fault, and its packs are small from its first step on
    job = job_of(tmp_path / "two", tiny, pairs, **rig)
    fault("train.pack@2=oom")
    calls = 0
    real = faults.hit

    def stop_after_three(point: str) -> bool:
        nonlocal calls
        calls += point == "train.boundary"
        if calls == 4:
            raise faults.InjectedError
        return real(point)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "hit", stop_after_three)
        with pytest.raises(faults.InjectedError):
            run_training(job)
    fault(None)
    assert run_training(job) == result
    assert steps(tmp_path / "two") == steps(tmp_path / "plain")
    ours, theirs = (tmp_path / name / "out/policy/model.safetensors" for name in ("two", "plain"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_reference_pass_that_runs_out_of_memory_sets_the_size_of_packs_from_the_start(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import selfplay.train.reference_pass as reference_pass

    real, tried = reference_pass.score_rows, []

    def small(*arguments: Any, max_pack_tokens: int, **others: Any) -> ReferenceLogps:
        tried.append(max_pack_tokens)
        if max_pack_tokens > 200:
            raise torch.OutOfMemoryError
        return real(*arguments, max_pack_tokens=max_pack_tokens, **others)

    monkeypatch.setattr(reference_pass, "score_rows", small)
    result = run_training(job_of(tmp_path, tiny, pairs, max_pack_tokens=600, max_steps=2))
    assert tried == [600, 300, 150]
    assert result["out_of_memory"] == [{"step": 0, "max_pack_tokens": 300}, {"step": 0, "max_pack_tokens": 150}]
    assert result["audit/zero_logratio"] == 0, "the steps take the very packs of the reference pass"
    tried.clear()
    monkeypatch.setattr(reference_pass, "score_rows", lambda *_, **others: small(max_pack_tokens=9999))
    with pytest.raises(RecipeError, match="too little memory"):
        run_training(job_of(tmp_path / "never", tiny, pairs, max_pack_tokens=600, max_steps=2))
    assert len(tried) == 4


def test_memory_too_small_for_one_pair_says_what_to_change(
    tiny: Path, tmp_path: Path, fault: Callable[[str | None], None]
) -> None:
    fault("train.pack@1=oom")
    with pytest.raises(RecipeError, match=r"one pair.*gradient_checkpointing: true"):
        run_training(job_of(tmp_path, tiny, random_pairs(num_prompts=1, num_completions=2)))
    assert not (tmp_path / "out" / "policy").exists()


@pytest.mark.parametrize("point", ["train.loss", "train.gradient"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_no_weight_changes_where_a_loss_or_a_gradient_is_not_finite(
    point: str, bf16: bool, tiny: Path, pairs: Sequence[PreferencePair], fault: Callable[[str | None], None]
) -> None:
    trainer = trainer_of(tiny, pairs, bf16=bf16)
    indices = range(len(pairs))
    trainer.step(pairs, indices, number=1, check_zero=False)
    held = [*dict(trainer.masters.named()).values(), *trainer.masters.compute]
    before = [weight.detach().clone() for weight in held]
    moments = [state["exp_avg"].clone() for state in trainer.optimizer.state.values()]
    fault(f"{point}@1=nan")
    with pytest.raises(NonFiniteError) as caught:
        trainer.step(pairs, indices, number=2, check_zero=False)
    assert caught.value.exit_code == 76
    assert pairs[0].prompt_id in str(caught.value)
    held = [*dict(trainer.masters.named()).values(), *trainer.masters.compute]
    assert all(torch.equal(weight, old) for weight, old in zip(held, before, strict=True))
    after = [state["exp_avg"] for state in trainer.optimizer.state.values()]
    assert all(torch.equal(one, other) for one, other in zip(after, moments, strict=True))
