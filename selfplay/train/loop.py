"""The training of one round: reference pass, checks, optimizer steps, the new policy.

One copy of the weights serves twice: before its first step the policy is the reference, so its logps come from a pass
without gradients over packs, and from disk ever after. A job that was stopped goes on from its last checkpoint.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from selfplay import faults, store
from selfplay.errors import NonFiniteError, NoPairsError, RecipeError, Stopped
from selfplay.losses import reward_metrics, total_loss
from selfplay.train.checkpoint import Checkpoints, Due, Found
from selfplay.train.logps import TokenLogps
from selfplay.train.memory import free_memory, in_smaller_packs
from selfplay.train.model import default_device, load_model, probe, save_policy
from selfplay.train.optim import (
    Masters,
    carry_optimizer,
    cast_parameters,
    make_optimizer,
    make_schedule,
    save_optimizer,
)
from selfplay.train.pack import Pack, build_packs, form_steps
from selfplay.train.progress import SILENT, Progress
from selfplay.train.reference import ReferenceLogps, audit_engine, check_zero_logratios, pair_logps, score_pairs
from selfplay.train.settings import TrainJob, TrainSettings
from selfplay.train.stop import stopping
from selfplay.types import Group, PreferencePair


@dataclass(slots=True)
class Trainer:
    """What the steps of one job share. `max_pack_tokens` is the recipe's, or less where memory ran out."""

    module: Any  # TokenLogps as accelerate prepared it
    masters: Masters
    optimizer: torch.optim.Optimizer
    schedule: Any
    accelerator: Any
    reference: ReferenceLogps
    settings: TrainSettings
    shared: bool
    max_pack_tokens: int
    halved: list[dict[str, int]]  # where memory ran out: the step and the cap from there on
    note: Callable[[str], None]
    pack: Pack | None = None  # the last one that was worked on

    def step(
        self, pairs: Sequence[PreferencePair], indices: Sequence[int], *, number: int, check_zero: bool
    ) -> dict[str, float]:
        """One optimizer step over the mean loss of some pairs; returns its metrics under Hugging Face's names.

        Where memory runs out the gradient of the same pairs is taken anew, in packs of half the size.
        """
        faults.hit("train.step")
        while True:
            try:
                sums = self._accumulate(pairs, indices, check_zero=check_zero)
                break
            except torch.OutOfMemoryError:
                if self.pack is None or len(self.pack.pair_B) == 1:  # a pair is never split
                    raise
            # outside the except block, whose traceback holds what the failed pack took
            self._halve(number)
        grad_norm = self._update(pairs, indices)
        return {**sums, "grad_norm": grad_norm, "num_pairs": len(indices)}

    def _accumulate(
        self, pairs: Sequence[PreferencePair], indices: Sequence[int], *, check_zero: bool
    ) -> dict[str, float]:
        settings, device = self.settings, self.accelerator.device
        sums: dict[str, float] = {"loss": 0.0, "num_tokens": 0}
        seen = []
        for pack in build_packs(pairs, indices, max_pack_tokens=self.max_pack_tokens, shared=self.shared):
            self.pack = pack = pack.to(device)
            faults.hit("train.pack")
            logps = pair_logps(pack, self.module(pack), self.reference)
            losses_B = total_loss(
                logps, names=settings.loss_type, weights=settings.loss_weights, beta=settings.beta
            ) * torch.tensor([pairs[i].weight for i in pack.pair_B], device=device)
            if faults.hit("train.loss"):
                losses_B = losses_B * float("nan")
            loss = losses_B.sum() / len(indices)
            _require_finite(losses_B, pack, pairs, "loss")
            self.accelerator.backward(loss)
            self.masters.accumulate()
            seen.append(logps)
            for name, value in reward_metrics(logps, settings.beta).items():
                sums[name] = sums.get(name, 0.0) + value / len(indices)
            sums["loss"] += loss.item()
            sums["num_tokens"] += pack.num_tokens
        if check_zero:
            dtype = torch.bfloat16 if self.masters.is_copy else torch.float32
            sums["audit/zero_logratio"] = check_zero_logratios(seen, compute_dtype=dtype)
        return sums

    def _halve(self, step: int) -> None:
        assert self.pack is not None
        self.max_pack_tokens = min(self.max_pack_tokens, self.pack.num_tokens) // 2
        self.pack = None
        self.halved.append({"step": step, "max_pack_tokens": self.max_pack_tokens})
        self.masters.clear_gradients()
        free_memory()
        self.note(
            f"training: out of memory at step {step}; from here on packs hold at most {self.max_pack_tokens} tokens. "
            "The pairs of a step stay the same"
        )

    def _update(self, pairs: Sequence[PreferencePair], indices: Sequence[int]) -> float:
        if faults.hit("train.gradient"):
            next(w.grad for w in self.masters.weights if w.grad is not None).mul_(float("nan"))
        norm = self.masters.grad_norm()
        if not norm < float("inf"):
            raise NonFiniteError(
                f"the gradient of this step is {norm}; no update was made. Its prompts: {_ids(pairs, indices)}. Look at "
                "these pairs, lower train.learning_rate, or set train.bf16: false"
            )
        self.masters.scale_gradients(min(1.0, self.settings.max_grad_norm / (norm + 1e-6)))
        faults.hit("train.update")
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.masters.refresh()
        faults.hit("train.updated")
        return norm


def _require_finite(losses_B: torch.Tensor, pack: Pack, pairs: Sequence[PreferencePair], what: str) -> None:
    bad = [i for i, ok in zip(pack.pair_B, losses_B.isfinite().tolist(), strict=True) if not ok]
    if bad:
        raise NonFiniteError(
            f"the {what} of pairs with prompts {_ids(pairs, bad)} is not finite; no update was made. Look at these rows of "
            "pairs.jsonl, lower train.learning_rate, or set train.bf16: false"
        )


def _ids(pairs: Sequence[PreferencePair], indices: Sequence[int]) -> str:
    return ", ".join(dict.fromkeys(pairs[i].prompt_id for i in indices))


def run_training(job: TrainJob, progress: Progress = SILENT) -> dict[str, Any]:
    """Trains `job.policy` on its pairs and writes, under `job.out`: reference.safetensors, train/steps.jsonl,
    train/result.json and policy/. Returns the result.

    While it trains it keeps checkpoints in train/checkpoints/, and goes on from the last one that it finds. Raises
    NoPairsError, NonFiniteError and AuditError before a policy is written; Stopped at the step boundary after a request.
    """
    try:
        return _train(job, progress)
    except torch.OutOfMemoryError as error:
        raise RecipeError(
            f"the device has too little memory for one pair, or for the optimizer ({error}). Set "
            "train.gradient_checkpointing: true, lower train.max_length, or take train.optim: adamw_bnb_8bit"
        ) from error


def _train(job: TrainJob, progress: Progress) -> dict[str, Any]:
    settings, out = job.settings, Path(job.out)
    pairs, num_too_long = _read_pairs(job)
    checkpoints = Checkpoints(out / "train" / "checkpoints", job, note=progress.note)
    found = checkpoints.newest()
    torch.manual_seed(job.seed)
    steps = _plan(job, pairs)
    result: dict[str, Any] = found.result if found is not None else {"num_too_long": num_too_long, "out_of_memory": []}
    model, trainer = _prepare(job, pairs, len(steps), found, result, progress)
    rows = found.rows if found is not None else []
    _run_steps(job, trainer, pairs, steps, rows, result, checkpoints, progress)
    result |= _summary(rows, len(pairs), settings)
    if job.keep_optimizer_state:
        save_optimizer(trainer.optimizer, out / "train" / "optimizer.safetensors", settings.optim)
    store.write_json(out / "train" / "result.json", result)
    masters, template = trainer.masters, job.chat_template
    save_policy(model, masters, job.policy, out / "policy", dtype=settings.save_dtype, chat_template=template)
    store.remove_folder(checkpoints.folder)
    return result


def _prepare(
    job: TrainJob,
    pairs: Sequence[PreferencePair],
    num_steps: int,
    found: Found | None,
    result: dict[str, Any],
    progress: Progress,
) -> tuple[Any, Trainer]:
    """(model, trainer), at the step of the checkpoint that was found. Fills `result` with what is measured at the start."""
    from accelerate import Accelerator

    settings, device = job.settings, default_device()
    accelerator = Accelerator(cpu=device.type == "cpu")
    model = load_model(job.policy, lora=settings.lora, gradient_checkpointing=settings.gradient_checkpointing)
    model = model.to(device)
    if found is None:
        result["shared_prompts"], result["probe_difference"] = probe(model, device)
    shared: bool = result["shared_prompts"]
    masters = Masters(model, compute_dtype=torch.bfloat16 if settings.bf16 else torch.float32)
    module = TokenLogps(model)
    if found is None:
        result |= audit_engine(module, _groups(job), bound=settings.max_audit_difference, device=device) or {}
    cap = found.max_pack_tokens if found is not None else settings.max_pack_tokens

    def halved(smaller: int) -> None:
        nonlocal cap
        cap = smaller
        result["out_of_memory"].append({"step": 0, "max_pack_tokens": cap})
        progress.note(f"training: out of memory before the first step; from here on packs hold at most {cap} tokens")

    def score(max_pack_tokens: int) -> ReferenceLogps:
        smaller = replace(job, settings=replace(settings, max_pack_tokens=max_pack_tokens))
        return _reference(smaller, pairs, module, shared, device, progress)

    # before a checkpoint is loaded: the weights may themselves be the reference
    reference = in_smaller_packs(score, cap, halved=halved)
    optimizer = make_optimizer(masters, settings)
    if job.optimizer_state is not None and found is None:
        carry_optimizer(optimizer, Path(job.optimizer_state), settings.optim)
    if found is not None:
        found.restore(masters, optimizer)
    schedule = make_schedule(optimizer, job, num_steps, done=found.step if found is not None else 0)
    prepared, log = accelerator.prepare(module), result["out_of_memory"]
    trainer = Trainer(
        prepared, masters, optimizer, schedule, accelerator, reference, settings, shared, cap, log, progress.note
    )
    return model, trainer


def _run_steps(
    job: TrainJob,
    trainer: Trainer,
    pairs: Sequence[PreferencePair],
    steps: Sequence[tuple[float, list[int]]],
    rows: list[dict[str, Any]],
    result: dict[str, Any],
    checkpoints: Checkpoints,
    progress: Progress,
) -> None:
    """The steps after those in `rows`, which it adds to, in train/steps.jsonl as well. Stopped where the user asked."""
    path = Path(job.out) / "train" / "steps.jsonl"
    store.rewrite(path, store.json_lines(rows))
    due = Due(job.settings.save_steps)
    with stopping() as stop:
        for number, (epoch, indices) in enumerate(steps[len(rows) :], len(rows) + 1):
            rate = trainer.schedule.get_last_lr()[0]
            check_zero = number == 1 and job.reference is None
            figures = trainer.step(pairs, indices, number=number, check_zero=check_zero)
            rows.append({"step": number, "epoch": epoch, "learning_rate": rate, **figures})
            store.append_json_line(path, rows[-1])
            progress("train", number, len(steps))
            faults.hit("train.boundary")
            asked = stop.asked  # once: a signal may come between two looks
            if asked or (number < len(steps) and due.after(number)):
                started = time.monotonic()
                cap = trainer.max_pack_tokens
                folder = checkpoints.save(
                    trainer.masters, trainer.optimizer, max_pack_tokens=cap, result=result, rows=rows
                )
                due.written(started)
            if asked:
                raise Stopped(
                    f"stopped after training step {number} of {len(steps)}; what is done is in {folder}. "
                    "The same command goes on from there"
                )
    if stop.asked:  # in the moment after the last look
        raise Stopped("stopped after the last training step. The same command goes on from the last checkpoint")


def _read_pairs(job: TrainJob) -> tuple[list[PreferencePair], int]:
    pairs = store.read_records(Path(job.pairs), PreferencePair)
    limit = job.settings.max_length
    fitting = [p for p in pairs if limit is None or _length(p) <= limit]
    if not fitting:
        raise NoPairsError(f"{job.pairs}: no pair to train on ({len(pairs)} read, the rest over max_length {limit})")
    return fitting, len(pairs) - len(fitting)


def _length(pair: PreferencePair) -> int:
    return len(pair.prompt_token_ids) + max(len(pair.chosen_token_ids), len(pair.rejected_token_ids))


def _groups(job: TrainJob) -> list[Group]:
    return [g for path in job.groups[:1] for g in store.read_records(Path(path), Group)]


def _reference(
    job: TrainJob,
    pairs: Sequence[PreferencePair],
    module: TokenLogps,
    shared: bool,
    device: torch.device,
    progress: Progress,
) -> ReferenceLogps:
    path = Path(job.out) / "reference.safetensors"
    if path.exists():
        return ReferenceLogps.load(path)
    settings = job.settings
    steps = form_steps(pairs, batch_size=settings.batch_size, seed=job.seed, epoch=0, shuffle=settings.shuffle)
    frozen = module
    if job.reference is not None:
        other = load_model(job.reference).to(device)
        cast_parameters(other, next(module.parameters()).dtype)
        frozen = TokenLogps(other)
    reference = score_pairs(
        frozen,
        pairs,
        steps,
        max_pack_tokens=settings.max_pack_tokens,
        shared=shared,
        device=device,
        progress=lambda done: progress("reference", done, len(pairs)),
    )
    reference.save(path)
    return reference


def _plan(job: TrainJob, pairs: Sequence[PreferencePair]) -> list[tuple[float, list[int]]]:
    """(epoch, indices) of every optimizer step; max_steps goes on into further epochs, as in transformers."""
    settings = job.settings
    steps: list[tuple[float, list[int]]] = []
    epoch = 0
    while len(steps) < settings.max_steps if settings.max_steps > 0 else epoch < settings.num_train_epochs:
        cut = form_steps(pairs, batch_size=settings.batch_size, seed=job.seed, epoch=epoch, shuffle=settings.shuffle)
        steps += [(round(epoch + (n + 1) / len(cut), 4), indices) for n, indices in enumerate(cut)]
        epoch += 1
    return steps[: settings.max_steps] if settings.max_steps > 0 else steps


def _summary(rows: list[dict[str, Any]], num_pairs: int, settings: TrainSettings) -> dict[str, Any]:
    last = rows[-1]
    final = [row for row in rows if row["epoch"] > last["epoch"] - 1]  # the last epoch
    in_final = sum(row["num_pairs"] for row in final)
    return {
        "num_pairs": num_pairs,
        "num_steps": len(rows),
        "num_tokens": sum(row["num_tokens"] for row in rows),
        "loss_first": rows[0]["loss"],
        "loss_last": last["loss"],
        "rewards/accuracies": sum(r["rewards/accuracies"] * r["num_pairs"] for r in final) / in_final,
        "rewards/margins": last["rewards/margins"],
        "audit/zero_logratio": rows[0].get("audit/zero_logratio"),
        "settings": asdict(settings),
    }
