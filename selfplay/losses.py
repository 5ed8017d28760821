"""The losses: pure functions of log-probabilities, one value per pair. A recipe names them in `train.loss_type`.

Log-probabilities are in nats, summed over the tokens of a completion, its end token among them.
Shapes: B pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PairLogps:
    """What a loss may read: summed logps of the policy and the reference, and the lengths in tokens."""

    chosen_B: Tensor
    rejected_B: Tensor
    reference_chosen_B: Tensor
    reference_rejected_B: Tensor
    chosen_length_B: Tensor
    rejected_length_B: Tensor

    @property
    def chosen_logratios_B(self) -> Tensor:
        return self.chosen_B - self.reference_chosen_B

    @property
    def rejected_logratios_B(self) -> Tensor:
        return self.rejected_B - self.reference_rejected_B


def sigmoid(logps: PairLogps, beta: float) -> Tensor:
    """DPO, -log sigmoid(beta * (log-ratio of chosen - log-ratio of rejected)), logps summed (eq. 7, arXiv:2305.18290).
    Where policy = reference it is ln 2.
    """
    return -F.logsigmoid(beta * (logps.chosen_logratios_B - logps.rejected_logratios_B))


def sft(logps: PairLogps, beta: float) -> Tensor:
    """Negative log-likelihood of the chosen completion, averaged over its tokens: the NLL term of Iterative RPO
    (eq. 2, arXiv:2404.19733). beta plays no part.
    """
    return -logps.chosen_B / logps.chosen_length_B


LOSSES: dict[str, Callable[[PairLogps, float], Tensor]] = {"sigmoid": sigmoid, "sft": sft}


def total_loss(logps: PairLogps, *, names: Sequence[str], weights: Sequence[float], beta: float) -> Tensor:
    """The weighted sum of the named losses per pair, shape (B,)."""
    parts = [weight * LOSSES[name](logps, beta) for name, weight in zip(names, weights, strict=True)]
    return torch.stack(parts).sum(0)


def reward_metrics(logps: PairLogps, beta: float) -> dict[str, float]:
    """Sums over the pairs of TRL's metrics; a reward is beta * log-ratio (section 4, arXiv:2305.18290)."""
    chosen_B = beta * logps.chosen_logratios_B.detach()
    rejected_B = beta * logps.rejected_logratios_B.detach()
    return {
        "rewards/chosen": chosen_B.sum().item(),
        "rewards/rejected": rejected_B.sum().item(),
        "rewards/accuracies": (chosen_B > rejected_B).float().sum().item(),
        "rewards/margins": (chosen_B - rejected_B).sum().item(),
        "logps/chosen": logps.chosen_B.detach().sum().item(),
        "logps/rejected": logps.rejected_B.detach().sum().item(),
    }
