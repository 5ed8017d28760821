"""The peers of the training benchmarks. Each trains the same work from the same weights and is timed from loaded weights to
the end of the last step: reference pass, packing, forward, backward, optimizer.
"""

import contextlib
import io
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from work import BETA, LEARNING_RATE, Work

from selfplay.types import PreferencePair

Timed = Callable[[str, Work, bool], float]  # model folder, work, bf16 -> seconds


def ours(model: str, work: Work, bf16: bool) -> float:
    """selfplay: packs with shared prompts, bf16 copies of fp32 masters, reference logps from the policy itself."""
    trainer, pairs, steps = _our_trainer(model, work, bf16)
    started = time.perf_counter()
    trainer.reference = _our_reference(trainer, pairs, steps)
    for number, indices in enumerate(steps, 1):
        trainer.step(pairs, indices, number=number, check_zero=False)
    return time.perf_counter() - started


def ours_engine(model: str, work: Work, bf16: bool) -> float:
    """The same where the reference's logps are known already, as they are when the engine returned them while sampling."""
    trainer, pairs, steps = _our_trainer(model, work, bf16)
    trainer.reference = _our_reference(trainer, pairs, steps)
    started = time.perf_counter()
    for number, indices in enumerate(steps, 1):
        trainer.step(pairs, indices, number=number, check_zero=False)
    return time.perf_counter() - started


def naive(model: str, work: Work, bf16: bool) -> float:
    """Two models, padded rows, autocast: the DPO loop as a tutorial writes it, a pair at a time."""
    from transformers import AutoModelForCausalLM

    policy, reference = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    started = time.perf_counter()
    for start in range(0, len(work.pairs), work.pairs_per_step):
        naive_backward(policy, reference, work.pairs[start : start + work.pairs_per_step], bf16)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started


def trl_tuned(model: str, work: Work, bf16: bool) -> float:
    """TRL's DPOTrainer as well as we could set it: reference logps computed beforehand, no checkpointing, a pair at a time (no
    padding between pairs), bf16 autocast.
    """
    changes = {"precompute_ref_log_probs": True, "gradient_checkpointing": False, "per_device_train_batch_size": 1}
    return _trl(model, work, bf16, changes)


def trl_default(model: str, work: Work, bf16: bool) -> float:
    """TRL's DPOTrainer with its defaults: gradient checkpointing, a reference model beside the policy; a step is a batch."""
    return _trl(model, work, bf16, {"per_device_train_batch_size": work.pairs_per_step})


PEERS: dict[str, Timed] = {
    "selfplay": ours,
    "selfplay, engine logps": ours_engine,
    "trl tuned": trl_tuned,
    "trl default": trl_default,
    "naive": naive,
}


def naive_backward(policy: Any, reference: Any, pairs: Sequence[PreferencePair], bf16: bool) -> None:
    """Adds the gradient of the mean DPO loss of some pairs, from plain rows and two models."""
    for pair in pairs:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            chosen, rejected = (
                _row_logp(policy, pair, ids) for ids in (pair.chosen_token_ids, pair.rejected_token_ids)
            )
            with torch.no_grad():
                ref_chosen, ref_rejected = (
                    _row_logp(reference, pair, ids) for ids in (pair.chosen_token_ids, pair.rejected_token_ids)
                )
        margin = BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))
        (-torch.nn.functional.logsigmoid(margin) / len(pairs)).backward()


def gradient_of_ours(model: str, work: Work) -> torch.Tensor:
    """The gradient of the first step in fp32, one vector in the model's own order."""
    trainer, pairs, steps = _our_trainer(model, work, False)
    trainer.reference = _our_reference(trainer, pairs, steps)
    trainer._accumulate(pairs, steps[0], check_zero=False)  # all of a step but the update
    return torch.cat([w.grad.flatten() for w in trainer.masters.weights])


def gradient_of_naive(model: str, work: Work) -> torch.Tensor:
    """The same from plain rows and two models."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    naive_backward(policy, policy, work.pairs[: work.pairs_per_step], False)
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def _row_logp(model: Any, pair: PreferencePair, completion: tuple[int, ...]) -> torch.Tensor:
    prompt = len(pair.prompt_token_ids)
    logits_TV = model(torch.tensor([[*pair.prompt_token_ids, *completion]])).logits[0, prompt - 1 : -1].float()
    return logits_TV.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum()


def _our_trainer(model: str, work: Work, bf16: bool) -> tuple[Any, list[PreferencePair], list[list[int]]]:
    from selfplay.recipe_train import TrainRecipe
    from selfplay.train.budget import CPU_PACK_TOKENS
    from selfplay.train.logps import TokenLogps
    from selfplay.train.model import load_model
    from selfplay.train.optim import Masters, make_optimizer
    from selfplay.train.pack import form_steps
    from selfplay.train.progress import SILENT
    from selfplay.train.reference import ReferenceLogps
    from selfplay.train.settings import settings_at
    from selfplay.train.trainer import Trainer
    from selfplay.train.world import World

    recipe = TrainRecipe(
        learning_rate=LEARNING_RATE, beta=BETA, batch_size=work.pairs_per_step, lr_scheduler_type="constant"
    )
    settings = settings_at(recipe, 0, bf16=bf16)
    pairs = list(work.pairs)
    steps = form_steps(pairs, batch_size=work.pairs_per_step, seed=0, epoch=0, shuffle=False)
    loaded = load_model(model)
    masters = Masters(loaded, compute_dtype=torch.bfloat16 if bf16 else torch.float32)
    optimizer = make_optimizer(masters, settings)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    nothing = ReferenceLogps(torch.zeros(0), torch.zeros(0))
    module = TokenLogps(loaded)
    trainer = Trainer(
        module=module,
        masters=masters,
        optimizer=optimizer,
        schedule=schedule,
        world=World(torch.device("cpu")),
        reference=nothing,
        win_rates_2B=None,
        settings=settings,
        shared=True,
        max_pack_tokens=CPU_PACK_TOKENS,
        halved=[],
        note=SILENT.note,
    )
    return trainer, pairs, steps


def _our_reference(trainer: Any, pairs: list[PreferencePair], steps: list[list[int]]) -> Any:
    from selfplay.train.reference import ReferenceLogps
    from selfplay.train.reference_pass import score_rows

    cap, world = trainer.max_pack_tokens, trainer.world
    return ReferenceLogps(*score_rows(trainer.module, pairs, steps, max_pack_tokens=cap, shared=True, world=world))


def _trl(model: str, work: Work, bf16: bool, changes: dict[str, Any]) -> float:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class SameIds(DPOTrainer):
        """Takes token ids as they are, so that every peer trains on the same ones and tokenizing is not timed."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    logging.getLogger("transformers").setLevel(logging.ERROR)
    rows = [
        {
            "prompt": "",
            "chosen": "",
            "rejected": "",
            "prompt_ids": list(p.prompt_token_ids),
            "chosen_ids": list(p.chosen_token_ids),
            "rejected_ids": list(p.rejected_token_ids),
        }
        for p in work.pairs
    ]
    batch = changes["per_device_train_batch_size"]
    args = DPOConfig(
        output_dir=str(Path(model).parent / "unused"),
        gradient_accumulation_steps=work.pairs_per_step // batch,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        beta=BETA,
        max_length=None,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        bf16=bf16,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **changes,
    )
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = Dataset.from_list(rows)
    with contextlib.redirect_stdout(io.StringIO()):
        started = time.perf_counter()
        SameIds(policy, args=args, train_dataset=data, processing_class=tokenizer).train()
        return time.perf_counter() - started
