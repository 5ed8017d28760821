"""One optimizer step: packs, losses, gradients, the update."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from selfplay import faults
from selfplay.errors import NonFiniteError
from selfplay.losses import reward_metrics, total_loss
from selfplay.train.memory import free_memory
from selfplay.train.optim import Masters
from selfplay.train.pack import Pack, build_packs
from selfplay.train.reference import ReferenceLogps, check_zero_logratios, pair_logps
from selfplay.train.settings import TrainSettings
from selfplay.types import TrainRow


@dataclass(slots=True)
class Trainer:
    """What the steps of one job share. `max_pack_tokens` is the recipe's, or less where memory ran out."""

    module: Any  # TokenLogps as accelerate prepared it
    masters: Masters
    optimizer: torch.optim.Optimizer
    schedule: Any
    accelerator: Any
    reference: ReferenceLogps | None  # None in a reference-free job
    win_rates_2B: torch.Tensor | None  # of chosen and rejected; None where no loss reads them
    settings: TrainSettings
    shared: bool
    max_pack_tokens: int
    halved: list[dict[str, int]]  # where memory ran out: the step and the cap from there on
    note: Callable[[str], None]
    pack: Pack | None = None  # the last one that was worked on

    def step(
        self, pairs: Sequence[TrainRow], indices: Sequence[int], *, number: int, check_zero: bool
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

    def _accumulate(self, pairs: Sequence[TrainRow], indices: Sequence[int], *, check_zero: bool) -> dict[str, float]:
        settings, device = self.settings, self.accelerator.device
        sums: dict[str, float] = {"loss": 0.0, "num_tokens": 0}
        seen = []
        cap, longest = self.max_pack_tokens, settings.max_pack_length
        for pack in build_packs(pairs, indices, max_pack_tokens=cap, shared=self.shared, max_pack_length=longest):
            self.pack = pack = pack.to(device)
            faults.hit("train.pack")
            rates_2B = None if self.win_rates_2B is None else self.win_rates_2B[:, list(pack.pair_B)].to(device)
            logps = pair_logps(pack, self.module(pack), self.reference, rates_2B)
            losses_B = total_loss(
                logps, names=settings.loss_type, weights=settings.loss_weights, numbers=settings.loss_numbers
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
        if check_zero and self.reference is not None and self.reference.zero_tolerance is not None:
            sums["audit/zero_logratio"] = check_zero_logratios(seen, tolerance=self.reference.zero_tolerance)
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

    def _update(self, pairs: Sequence[TrainRow], indices: Sequence[int]) -> float:
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


def _require_finite(losses_B: torch.Tensor, pack: Pack, pairs: Sequence[TrainRow], what: str) -> None:
    bad = [i for i, ok in zip(pack.pair_B, losses_B.isfinite().tolist(), strict=True) if not ok]
    if bad:
        raise NonFiniteError(
            f"the {what} of pairs with prompts {_ids(pairs, bad)} is not finite; no update was made. Look at these rows of "
            "pairs.jsonl, lower train.learning_rate, or set train.bf16: false"
        )


def _ids(pairs: Sequence[TrainRow], indices: Sequence[int]) -> str:
    return ", ".join(dict.fromkeys(pairs[i].prompt_id for i in indices))
