"""One optimizer step: packs, losses, gradients, the update."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from selfplay import faults
from selfplay.errors import NonFiniteError
from selfplay.losses import PairLogps, reward_metrics, total_loss
from selfplay.train.deal import own_packs
from selfplay.train.memory import SmallerPacksError, free_memory, trim_memory
from selfplay.train.optim import Masters
from selfplay.train.pack import Pack
from selfplay.train.reference import ReferenceLogps, check_zero_logratios, pair_logps
from selfplay.train.settings import TrainSettings
from selfplay.train.world import World
from selfplay.types import TrainRow


@dataclass(slots=True)
class Trainer:
    """What the steps of one job share. `max_pack_tokens` is the recipe's, or less where memory ran out."""

    module: Any  # TokenLogps, or the same with its weights sharded
    masters: Masters
    optimizer: torch.optim.Optimizer
    schedule: Any
    world: World
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

        Where memory runs out the gradient of the same pairs is taken anew, in packs of half the size. SmallerPacksError where
        weights are sharded.
        """
        faults.hit("train.step")
        while True:
            cap, done, said = self.max_pack_tokens, _Sums(), ""
            try:
                done = self._accumulate(pairs, indices)
            except torch.OutOfMemoryError as error:
                cap, said = self._smaller(), str(error)
                if self.world.sharding is not None:
                    if not cap:
                        raise
                    raise SmallerPacksError(cap) from error
            # outside the except block, whose traceback holds what the failed pack took
            negative, bad = self.world.most(-cap, bool(done.bad))
            if negative == -self.max_pack_tokens:
                break
            if negative == 0:
                raise torch.OutOfMemoryError(said or "in another process")
            self._halve(number, -negative)
        if bad:
            _raise_bad_loss(pairs, [index for part in self.world.gather(done.bad) for index in part])
        metrics = self._totals(done, check_zero=check_zero)
        grad_norm = self._update(pairs, indices)
        return {**metrics, "grad_norm": grad_norm, "num_pairs": len(indices)}

    def _accumulate(self, pairs: Sequence[TrainRow], indices: Sequence[int]) -> "_Sums":
        settings, device = self.settings, self.world.device
        done = _Sums()
        cap, longest = self.max_pack_tokens, settings.max_pack_length
        for pack, weight in own_packs(
            self.world, pairs, indices, max_pack_tokens=cap, max_pack_length=longest, shared=self.shared
        ):
            self.pack = pack = pack.to(device)
            faults.hit("train.pack")
            rates_2B = None if self.win_rates_2B is None else self.win_rates_2B[:, list(pack.pair_B)].to(device)
            logps = pair_logps(pack, self.module(pack), self.reference, rates_2B)
            losses_B = total_loss(
                logps, names=settings.loss_type, weights=settings.loss_weights, numbers=settings.loss_numbers
            ) * torch.tensor([pairs[i].weight for i in pack.pair_B], device=device)
            if faults.hit("train.loss"):
                losses_B = losses_B * float("nan")
            # over all pairs of the step, wherever they are
            loss = losses_B.sum() / len(indices) * weight
            loss.backward()  # type: ignore[no-untyped-call]
            self.masters.accumulate()
            trim_memory(device)
            for name, value in reward_metrics(logps, settings.beta).items():
                done.metrics[name] = done.metrics.get(name, 0.0) + value / len(indices) * weight
            if weight:
                done.metrics["loss"] += loss.item()
                done.metrics["num_tokens"] += pack.num_tokens
                done.logps.append(logps)
                done.bad += [i for i, ok in zip(pack.pair_B, losses_B.isfinite().tolist(), strict=True) if not ok]
        return done

    def _totals(self, done: "_Sums", *, check_zero: bool) -> dict[str, float]:
        """The metrics over all processes."""
        totals = self.world.total(list(done.metrics.values()))
        metrics = dict(zip(done.metrics, totals, strict=True))
        metrics["num_tokens"] = int(metrics["num_tokens"])
        if check_zero and self.reference is not None and self.reference.zero_tolerance is not None:
            tolerance = self.reference.zero_tolerance
            metrics["audit/zero_logratio"] = check_zero_logratios(done.logps, tolerance=tolerance, world=self.world)
        return metrics

    def _smaller(self) -> int:
        """The cap after the pack at hand ran out of memory; 0 where it is one pair, which is never split."""
        if self.pack is None or len(self.pack.pair_B) == 1:
            return 0
        return min(self.max_pack_tokens, self.pack.num_tokens) // 2

    def _halve(self, step: int, cap: int) -> None:
        self.max_pack_tokens = cap
        self.pack = None
        self.halved.append({"step": step, "max_pack_tokens": cap})
        self.masters.clear_gradients()
        free_memory()
        self.note(
            f"training: out of memory at step {step}; from here on packs hold at most {self.max_pack_tokens} tokens. "
            "The pairs of a step stay the same"
        )

    def _update(self, pairs: Sequence[TrainRow], indices: Sequence[int]) -> float:
        if faults.hit("train.gradient"):
            next(w.grad for w in self.masters.weights if w.grad is not None).mul_(float("nan"))
        self.masters.sum_gradients(self.world)
        norm = self.masters.grad_norm()
        if not norm < float("inf"):
            raise NonFiniteError(
                f"the gradient of this step is {norm}; no update was made. Its prompts: {_ids(pairs, indices)}. Look at "
                "these pairs, lower train.learning_rate, or set train.bf16: false"
            )
        self.masters.scale_gradients(min(1.0, self.settings.max_grad_norm / (norm + 1e-6)))
        faults.hit("train.update")
        self.masters.update(self.optimizer)
        trim_memory(self.world.device)
        self.schedule.step()
        faults.hit("train.updated")
        return norm


@dataclass(slots=True)
class _Sums:
    """What the packs of this process gave: sums of metrics, the logps, and the pairs whose loss is not finite."""

    metrics: dict[str, float] = field(default_factory=lambda: {"loss": 0.0, "num_tokens": 0})
    logps: list[PairLogps] = field(default_factory=list)
    bad: list[int] = field(default_factory=list)


def _raise_bad_loss(pairs: Sequence[TrainRow], bad: Sequence[int]) -> NoReturn:
    raise NonFiniteError(
        f"the loss of pairs with prompts {_ids(pairs, bad)} is not finite; no update was made. Look at these rows of "
        "pairs.jsonl, lower train.learning_rate, or set train.bf16: false"
    )


def _ids(pairs: Sequence[TrainRow], indices: Sequence[int]) -> str:
    return ", ".join(dict.fromkeys(pairs[i].prompt_id for i in indices))
