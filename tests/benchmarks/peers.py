"""The peers of the training benchmarks. Each trains the same work from the same weights and is timed from loaded weights to
the end of the last step: reference pass, packing, forward, backward, optimizer.
"""

import contextlib
import functools
import io
import logging
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import Setup, new_model
from work import BETA, LEARNING_RATE, Work

from selfplay.types import PreferencePair

Timed = Callable[[Setup, Work], float]  # -> seconds


def ours(setup: Setup, work: Work) -> float:
    """selfplay: packs with shared prompts, bf16 copies of fp32 masters, reference logps from the policy itself."""
    trainer, pairs, steps = _our_trainer(setup, work)
    started = _now(setup)
    trainer.reference = _our_reference(trainer, pairs, steps)
    for number, indices in enumerate(steps, 1):
        trainer.step(pairs, indices, number=number, check_zero=False)
    return _now(setup) - started


def ours_engine(setup: Setup, work: Work) -> float:
    """The same where the reference's logps are known already, as they are when the engine returned them while sampling."""
    trainer, pairs, steps = _our_trainer(setup, work)
    trainer.reference = _our_reference(trainer, pairs, steps)
    started = _now(setup)
    for number, indices in enumerate(steps, 1):
        trainer.step(pairs, indices, number=number, check_zero=False)
    return _now(setup) - started


def naive(setup: Setup, work: Work) -> float:
    """Two models, padded rows, autocast: the DPO loop as a tutorial writes it, a pair at a time."""
    policy, reference = (new_model(setup, torch.float32) for _ in range(2))
    reference.requires_grad_(False)
    optimizer = _plain_optimizer(setup, policy)
    started = _now(setup)
    for start in range(0, len(work.pairs), work.pairs_per_step):
        naive_backward(policy, reference, work.pairs[start : start + work.pairs_per_step], setup.bf16)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return _now(setup) - started


def trl_tuned(setup: Setup, work: Work, *, batch_size: int) -> float:
    """TRL's DPOTrainer as well as we could set it: reference logps computed beforehand, no checkpointing, bf16 autocast, and
    the best of the batch sizes: a pair at a time (no padding between pairs) on a CPU, on a GPU whichever of several is best.
    """
    changes = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
    return _trl(setup, work, changes | {"per_device_train_batch_size": math.gcd(batch_size, work.pairs_per_step)})


def trl_default(setup: Setup, work: Work) -> float:
    """TRL's DPOTrainer with its defaults: gradient checkpointing, a reference model beside the policy; a step is a batch, on a
    GPU of at most eight pairs.
    """
    batch_size = work.pairs_per_step if setup.device == "cpu" else math.gcd(8, work.pairs_per_step)
    return _trl(setup, work, {"per_device_train_batch_size": batch_size})


TUNED = "trl tuned"
PEERS: dict[str, Timed] = {
    "selfplay": ours,
    "selfplay, engine logps": ours_engine,
    TUNED: functools.partial(trl_tuned, batch_size=1),
    f"{TUNED}, batch 4": functools.partial(trl_tuned, batch_size=4),
    f"{TUNED}, batch 16": functools.partial(trl_tuned, batch_size=16),
    "trl default": trl_default,
    "naive": naive,
}


def peers_on(device: str) -> tuple[str, ...]:
    """The peers that are run, those that take long last: which of them time allows is judged by those before."""
    tuned = (TUNED,) if device == "cpu" else (f"{TUNED}, batch 4", f"{TUNED}, batch 16")
    return ("selfplay", "selfplay, engine logps", *tuned, "trl default", "naive")


def needs(peer: str, setup: Setup) -> tuple[str, ...]:
    """The packages that a peer can't run without."""
    trl = ("trl", "datasets") if peer.startswith("trl") else ()
    return (*trl, *(("bitsandbytes",) if setup.optim == "adamw_bnb_8bit" else ()))


def _now(setup: Setup) -> float:
    """Seconds, once the device has done what it was given."""
    if setup.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _plain_optimizer(setup: Setup, policy: Any) -> Any:
    if setup.optim == "adamw_bnb_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    return torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)


def naive_backward(policy: Any, reference: Any, pairs: Sequence[PreferencePair], bf16: bool) -> None:
    """Adds the gradient of the mean DPO loss of some pairs, from plain rows and two models."""
    for pair in pairs:
        with torch.autocast(policy.device.type, dtype=torch.bfloat16, enabled=bf16):
            chosen, rejected = (
                _row_logp(policy, pair, ids) for ids in (pair.chosen_token_ids, pair.rejected_token_ids)
            )
            with torch.no_grad():
                ref_chosen, ref_rejected = (
                    _row_logp(reference, pair, ids) for ids in (pair.chosen_token_ids, pair.rejected_token_ids)
                )
        margin = BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))
        (-torch.nn.functional.logsigmoid(margin) / len(pairs)).backward()


def gradient_of_ours(setup: Setup, work: Work) -> torch.Tensor:
    """The gradient of the first step in fp32, one vector in the model's own order."""
    trainer, pairs, steps = _our_trainer(setup, work)
    trainer.reference = _our_reference(trainer, pairs, steps)
    trainer._accumulate(pairs, steps[0])  # all of a step but the update
    return torch.cat([w.grad.flatten() for w in trainer.masters.weights])


def gradient_of_naive(setup: Setup, work: Work) -> torch.Tensor:
    """The same from plain rows and two models."""
    policy = new_model(setup, torch.float32)
    naive_backward(policy, policy, work.pairs[: work.pairs_per_step], False)
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def _row_logp(model: Any, pair: PreferencePair, completion: tuple[int, ...]) -> torch.Tensor:
    prompt, device = len(pair.prompt_token_ids), model.device
    ids = torch.tensor([[*pair.prompt_token_ids, *completion]], device=device)
    logits_TV = model(ids).logits[0, prompt - 1 : -1].float()
    return logits_TV.log_softmax(-1).gather(1, torch.tensor(completion, device=device)[:, None]).sum()


def _our_model(setup: Setup) -> Any:
    """As selfplay loads it; random weights get what `load_model` would give them."""
    from selfplay.train import attention
    from selfplay.train.model import load_model

    if not setup.is_random:
        return load_model(setup.model).to(setup.device)
    attention.register()
    return new_model(setup, torch.float32, attn_implementation=attention.IMPLEMENTATION).eval()


def _our_trainer(setup: Setup, work: Work) -> tuple[Any, list[PreferencePair], list[list[int]]]:
    from selfplay.recipe_train import TrainRecipe
    from selfplay.train.budget import pack_tokens, with_pack_length
    from selfplay.train.logps import TokenLogps
    from selfplay.train.optim import Masters, make_optimizer
    from selfplay.train.progress import SILENT
    from selfplay.train.reference import ReferenceLogps
    from selfplay.train.settings import settings_at
    from selfplay.train.steps import form_steps
    from selfplay.train.trainer import Trainer
    from selfplay.train.world import World

    recipe = TrainRecipe(
        learning_rate=LEARNING_RATE,
        beta=BETA,
        batch_size=work.pairs_per_step,
        lr_scheduler_type="constant",
        optim=setup.optim,
    )
    settings = settings_at(recipe, 0, bf16=setup.bf16)
    pairs = list(work.pairs)
    steps = list(form_steps(pairs, batch_size=work.pairs_per_step, seed=0, epoch=0, shuffle=False))
    loaded = _our_model(setup)
    settings = with_pack_length(settings, loaded)
    masters = Masters(loaded, compute_dtype=torch.bfloat16 if setup.bf16 else torch.float32)
    nothing = ReferenceLogps(torch.zeros(0), torch.zeros(0))
    module = TokenLogps(loaded)
    with tempfile.TemporaryDirectory() as folder:  # a run measures it once, before its first training
        budget, world = Path(folder) / "pack_budget.json", World(torch.device(setup.device))
        cap = pack_tokens(budget, module, masters, settings, shared=True, world=world)
    optimizer = make_optimizer(masters, settings)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = Trainer(
        module=module,
        masters=masters,
        optimizer=optimizer,
        schedule=schedule,
        world=world,
        reference=nothing,
        win_rates_2B=None,
        settings=settings,
        shared=True,
        max_pack_tokens=cap,
        halved=[],
        note=SILENT.note,
    )
    return trainer, pairs, steps


def _our_reference(trainer: Any, pairs: list[PreferencePair], steps: list[list[int]]) -> Any:
    from selfplay.train.reference import ReferenceLogps
    from selfplay.train.reference_pass import score_rows

    cap, longest, world = trainer.max_pack_tokens, trainer.settings.max_pack_length, trainer.world
    sums_CB = score_rows(
        trainer.module, pairs, steps, max_pack_tokens=cap, max_pack_length=longest, shared=True, world=world
    )
    return ReferenceLogps(*sums_CB)


def same_ids_trainer() -> Any:
    """TRL's DPOTrainer, which takes token ids as they are: every peer trains on the same ones, and tokenizing is not timed."""
    from trl import DPOTrainer

    class SameIds(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    return SameIds


def ids_row(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> dict[str, Any]:
    """A pair as that trainer takes it."""
    ids = {"prompt_ids": list(prompt), "chosen_ids": list(chosen), "rejected_ids": list(rejected)}
    return {"prompt": "", "chosen": "", "rejected": "", **ids}


def _trl(setup: Setup, work: Work, changes: dict[str, Any]) -> float:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig

    logging.getLogger("transformers").setLevel(logging.ERROR)
    rows = [ids_row(p.prompt_token_ids, p.chosen_token_ids, p.rejected_token_ids) for p in work.pairs]
    batch = changes["per_device_train_batch_size"]
    args = DPOConfig(
        output_dir=str(Path(setup.model).parent / "unused"),
        gradient_accumulation_steps=work.pairs_per_step // batch,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        beta=BETA,
        max_length=None,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        use_cpu=setup.device == "cpu",
        bf16=setup.bf16,
        dataloader_pin_memory=setup.device == "cuda",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **changes,
        **({"optim": setup.optim} if setup.optim == "adamw_bnb_8bit" else {}),
    )
    policy = new_model(setup, torch.float32)
    # TRL would load its reference from the policy's folder, where random weights don't lie
    by_hand = setup.is_random and "precompute_ref_log_probs" not in changes
    reference = new_model(setup, torch.float32) if by_hand else None
    tokenizer = AutoTokenizer.from_pretrained(setup.model)
    data = Dataset.from_list(rows)
    with contextlib.redirect_stdout(io.StringIO()):
        started = _now(setup)
        same_ids_trainer()(policy, reference, args=args, train_dataset=data, processing_class=tokenizer).train()
        return _now(setup) - started
