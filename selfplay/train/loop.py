"""The training of one round: reference pass, checks, optimizer steps, the new policy.

One copy of the weights serves twice: before its first step the policy is the reference, so its logps come from a pass
without gradients over packs, and from disk ever after.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from selfplay import store
from selfplay.errors import DataError, NonFiniteError
from selfplay.losses import reward_metrics, total_loss
from selfplay.recipe_train import reads
from selfplay.train.logps import TokenLogps
from selfplay.train.model import default_device, load_model, probe, save_policy
from selfplay.train.optim import Masters, make_optimizer, make_schedule
from selfplay.train.pack import Pack, build_packs, form_steps
from selfplay.train.reference import ReferenceLogps, audit_engine, check_zero_logratios, pair_logps
from selfplay.train.reference_pass import find_reference, win_rates
from selfplay.train.rows import read_rows
from selfplay.train.settings import TrainJob, TrainSettings
from selfplay.types import Group, TrainRow

Progress = Callable[[str, int, int], None]  # what, done, total


def _silent(what: str, done: int, total: int) -> None:
    pass


@dataclass(slots=True)
class Trainer:
    """What the steps of one job share."""

    module: Any  # TokenLogps as accelerate prepared it
    masters: Masters
    optimizer: torch.optim.Optimizer
    schedule: Any
    accelerator: Any
    reference: ReferenceLogps | None  # None in a reference-free job
    settings: TrainSettings
    shared: bool
    win_rates_2B: torch.Tensor | None = None  # of chosen and rejected; None where no loss reads them

    def step(self, pairs: Sequence[TrainRow], indices: Sequence[int], *, check_zero: bool) -> dict[str, float]:
        """One optimizer step over the mean loss of some pairs; returns its metrics under Hugging Face's names."""
        settings, device = self.settings, self.accelerator.device
        sums: dict[str, float] = {"loss": 0.0, "num_tokens": 0}
        seen = []
        for pack in build_packs(pairs, indices, max_pack_tokens=settings.max_pack_tokens, shared=self.shared):
            pack = pack.to(device)
            rates_2B = None if self.win_rates_2B is None else self.win_rates_2B[:, list(pack.pair_B)].to(device)
            logps = pair_logps(pack, self.module(pack), self.reference, rates_2B)
            losses_B = total_loss(
                logps, names=settings.loss_type, weights=settings.loss_weights, numbers=settings.loss_numbers
            ) * torch.tensor([pairs[i].weight for i in pack.pair_B], device=device)
            loss = losses_B.sum() / len(indices)
            _require_finite(losses_B, pack, pairs, "loss")
            self.accelerator.backward(loss)
            self.masters.accumulate()
            seen.append(logps)
            for name, value in reward_metrics(logps, settings.beta).items():
                sums[name] = sums.get(name, 0.0) + value / len(indices)
            sums["loss"] += loss.item()
            sums["num_tokens"] += pack.num_tokens
        if check_zero and self.reference is not None and self.reference.zero_tolerance is not None:
            sums["audit/zero_logratio"] = check_zero_logratios(seen, tolerance=self.reference.zero_tolerance)
        grad_norm = self._update(pairs, indices)
        return {**sums, "grad_norm": grad_norm, "num_pairs": len(indices)}

    def _update(self, pairs: Sequence[TrainRow], indices: Sequence[int]) -> float:
        norm = self.masters.grad_norm()
        if not norm < float("inf"):
            raise NonFiniteError(
                f"the gradient of this step is {norm}; no update was made. Its prompts: {_ids(pairs, indices)}. Look at "
                "these pairs, lower train.learning_rate, or set train.bf16: false"
            )
        self.masters.scale_gradients(min(1.0, self.settings.max_grad_norm / (norm + 1e-6)))
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.masters.refresh()
        return norm


def _require_finite(losses_B: torch.Tensor, pack: Pack, pairs: Sequence[TrainRow], what: str) -> None:
    bad = [i for i, ok in zip(pack.pair_B, losses_B.isfinite().tolist(), strict=True) if not ok]
    if bad:
        raise NonFiniteError(
            f"the {what} of pairs with prompts {_ids(pairs, bad)} is not finite; no update was made. Look at these rows of "
            "pairs.jsonl, lower train.learning_rate, or set train.bf16: false"
        )


def _ids(pairs: Sequence[TrainRow], indices: Sequence[int]) -> str:
    return ", ".join(dict.fromkeys(pairs[i].prompt_id for i in indices))


def run_training(job: TrainJob, progress: Progress = _silent) -> dict[str, Any]:
    """Trains `job.policy` on its pairs and writes, under `job.out`: reference.safetensors (and reference/, where it is an
    ema) if a loss reads a reference, train/steps.jsonl, train/result.json and policy/. Returns the result.

    Raises NoPairsError, NonFiniteError and AuditError before a weight has changed on disk.
    """
    from accelerate import Accelerator

    settings, out = job.settings, Path(job.out)
    pairs, num_too_long = read_rows(job)
    rates_2B = win_rates(pairs) if "win_rates" in reads(settings.loss_type) else None
    torch.manual_seed(job.seed)
    device = default_device()
    accelerator = Accelerator(cpu=device.type == "cpu")
    model = load_model(job.policy, lora=settings.lora, gradient_checkpointing=settings.gradient_checkpointing).to(
        device
    )
    shared, difference = probe(model, device)
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    masters = Masters(model, compute_dtype=dtype)
    module = TokenLogps(model)
    result: dict[str, Any] = {"shared_prompts": shared, "probe_difference": difference, "num_too_long": num_too_long}
    result |= audit_engine(module, _groups(job), bound=settings.max_audit_difference, device=device) or {}
    reference = find_reference(job, pairs, module, masters, shared=shared, device=device, progress=progress)
    steps = _plan(job, pairs)
    optimizer = make_optimizer(masters.weights, settings)
    if job.optimizer_state is not None:
        optimizer.load_state_dict(_load_optimizer(optimizer, Path(job.optimizer_state)))
    schedule = make_schedule(optimizer, job, len(steps))
    prepared = accelerator.prepare(module)
    trainer = Trainer(prepared, masters, optimizer, schedule, accelerator, reference, settings, shared, rates_2B)
    rows = []
    for number, (epoch, indices) in enumerate(steps):
        rate = schedule.get_last_lr()[0]
        figures = trainer.step(pairs, indices, check_zero=number == 0)
        rows.append({"step": number + 1, "epoch": epoch, "learning_rate": rate, **figures})
        progress("train", number + 1, len(steps))
    result |= _summary(rows, len(pairs), settings)
    if job.keep_optimizer_state:
        _save_optimizer(optimizer, out / "train" / "optimizer.safetensors")
    store.write_json_lines(out / "train" / "steps.jsonl", rows)
    store.write_json(out / "train" / "result.json", result)
    save_policy(model, masters, job.policy, out / "policy", dtype=settings.save_dtype, chat_template=job.chat_template)
    return result


def _groups(job: TrainJob) -> list[Group]:
    return [g for path in job.groups[:1] for g in store.read_records(Path(path), Group)]


def _plan(job: TrainJob, pairs: Sequence[TrainRow]) -> list[tuple[float, list[int]]]:
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
        # no rewards where the loss is sft alone
        "rewards/accuracies": sum(r["rewards/accuracies"] * r["num_pairs"] for r in final) / in_final
        if "rewards/accuracies" in last
        else None,
        "rewards/margins": last.get("rewards/margins"),
        "audit/zero_logratio": rows[0].get("audit/zero_logratio"),
        "settings": asdict(settings),
    }


def _save_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    from safetensors.torch import save_file

    state = optimizer.state_dict()["state"]
    tensors = {f"{i}/{k}": torch.as_tensor(v).contiguous() for i, entry in state.items() for k, v in entry.items()}
    store.write_file(path, lambda temporary: save_file(tensors, temporary))


def _load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> dict[str, Any]:
    """The state of another optimizer of the same kind; learning rates stay this one's."""
    from safetensors.torch import load_file

    store.check_file(path)
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in load_file(path).items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = tensor
    fresh = optimizer.state_dict()
    if len(state) != sum(len(g["params"]) for g in fresh["param_groups"]):
        raise DataError(f"{path}: this optimizer state is of another model or another optim")
    return {**fresh, "state": state}
