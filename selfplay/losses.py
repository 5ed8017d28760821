"""The losses: pure functions of log-probabilities, one value per pair. A recipe names them in `train.loss_type`; which
fields of a recipe each reads stands in recipe_train.READS.

Log-probabilities are in nats, summed over the tokens of a completion, its end token among them. A log-ratio is a policy's
logps minus the reference's. Names and definitions are TRL's where TRL has the loss; a docstring says where ours differs.
Shapes: B pairs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from selfplay.recipe_train import NUMBERS, READS


@dataclass(frozen=True, slots=True)
class PairLogps:
    """What a loss may read: summed logps of the policy and the reference, lengths in tokens, win rates in [0, 1].

    What no loss of the job reads is None: `rejected_B` where rows are demonstrations, the reference's logps in a
    reference-free job, win rates everywhere but for sppo.
    """

    chosen_B: Tensor
    rejected_B: Tensor | None
    reference_chosen_B: Tensor | None
    reference_rejected_B: Tensor | None
    chosen_length_B: Tensor
    rejected_length_B: Tensor | None
    chosen_win_rate_B: Tensor | None = None
    rejected_win_rate_B: Tensor | None = None

    @property
    def chosen_logratios_B(self) -> Tensor:
        return self.chosen_B - _read(self.reference_chosen_B)

    @property
    def rejected_logratios_B(self) -> Tensor:
        return _read(self.rejected_B) - _read(self.reference_rejected_B)

    @property
    def chosen_mean_B(self) -> Tensor:
        """Logps averaged over the tokens."""
        return self.chosen_B / self.chosen_length_B

    @property
    def rejected_mean_B(self) -> Tensor:
        """Logps averaged over the tokens."""
        return _read(self.rejected_B) / _read(self.rejected_length_B)


def _read(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "a loss reads what READS doesn't say it reads"
    return tensor


def sigmoid(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO: -log sigmoid(beta * d), d = log-ratio of chosen - log-ratio of rejected, logps summed (eq. 7, arXiv:2305.18290).

    With label_smoothing e it is conservative DPO: -(1 - e) log sigmoid(beta * d) - e log sigmoid(-beta * d), e being the
    probability that a label is wrong (Mitchell, "A note on DPO with noisy preferences", 2023). TRL's DPO trainer leaves
    label_smoothing out of this loss; its CPO trainer has it, in the same form. Where policy = reference it is ln 2.
    """
    margin_B = beta * (logps.chosen_logratios_B - logps.rejected_logratios_B)
    return _smoothed(margin_B, label_smoothing)


def _smoothed(margin_B: Tensor, label_smoothing: float) -> Tensor:
    loss_B = -F.logsigmoid(margin_B)
    # logsigmoid(-x) = logsigmoid(x) - x
    return loss_B if label_smoothing == 0 else loss_B + label_smoothing * margin_B


def hinge(logps: PairLogps, *, beta: float) -> Tensor:
    """max(0, 1 - beta * d), d as in `sigmoid`, logps summed: SLiC's calibration loss (arXiv:2305.10425) on log-ratios, as
    RSO has it (arXiv:2309.06657). 1 / beta is the margin in nats. Where policy = reference it is 1; beyond the margin it is
    0 and so is its gradient.
    """
    return torch.relu(1 - beta * (logps.chosen_logratios_B - logps.rejected_logratios_B))


def ipo(logps: PairLogps, *, beta: float) -> Tensor:
    """(d - 1 / (2 beta))^2, d = log-ratio of chosen per token - log-ratio of rejected per token (eq. 17,
    arXiv:2310.12036, beta being its tau). The paper writes sums; its authors averaged over tokens, and so do TRL and we.
    Where policy = reference it is 1 / (4 beta^2), and so is its scale: another beta wants another learning rate.
    """
    return (_mean_logratios_B(logps) - 1 / (2 * beta)) ** 2


def _mean_logratios_B(logps: PairLogps) -> Tensor:
    chosen_B = logps.chosen_logratios_B / logps.chosen_length_B
    return chosen_B - logps.rejected_logratios_B / _read(logps.rejected_length_B)


def sppo_hard(logps: PairLogps, *, beta: float) -> Tensor:
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2, c and r the log-ratios of chosen and rejected, logps summed: SPPO with
    win rates of 1 and 0 (eq. 4.7, arXiv:2405.00675, 1 / beta being its eta; the paper's eta of 1000 is beta 0.001).
    Where policy = reference it is 1 / (2 beta^2).
    """
    return (logps.chosen_logratios_B - 0.5 / beta) ** 2 + (logps.rejected_logratios_B + 0.5 / beta) ** 2


def sppo(logps: PairLogps, *, beta: float) -> Tensor:
    """(c - (p - 1/2) / beta)^2 + (r - (q - 1/2) / beta)^2, c and r as in `sppo_hard` (logps summed), p and q the win rates of
    chosen and rejected against the policy, which the selector gave their pair (eq. 4.7, arXiv:2405.00675). TRL has sppo_hard
    alone, which this is for p = 1, q = 0. With p = q = 1/2 and policy = reference both value and gradient are 0.
    """
    chosen_B = logps.chosen_logratios_B - (_read(logps.chosen_win_rate_B) - 0.5) / beta
    return chosen_B**2 + (logps.rejected_logratios_B - (_read(logps.rejected_win_rate_B) - 0.5) / beta) ** 2


def sigmoid_norm(logps: PairLogps, *, beta: float) -> Tensor:
    """Length-normalised DPO: -log sigmoid(beta * d), d as in `ipo`, so logps are averaged over tokens (Tulu 3,
    arXiv:2411.15124). Log-ratios per token are small: its authors take a beta of 5. Where policy = reference it is ln 2.
    """
    return -F.logsigmoid(beta * _mean_logratios_B(logps))


def simpo(logps: PairLogps, *, beta: float, simpo_gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta * (logps of chosen - logps of rejected) - gamma), logps averaged over tokens, no reference (eq. 6,
    arXiv:2405.14734, where gamma / beta is tuned: 0.3 to 0.5 at beta 10 is a simpo_gamma of 3 to 5). label_smoothing as in
    `sigmoid`. TRL has it in its CPO trainer. Equal logps per token give log(1 + exp(gamma)).
    """
    return _smoothed(beta * (logps.chosen_mean_B - logps.rejected_mean_B) - simpo_gamma, label_smoothing)


def sft(logps: PairLogps) -> Tensor:
    """Negative log-likelihood of the chosen completion, divided by its length in tokens. Alone it is rejection-sampling
    fine-tuning; `loss_type: [sigmoid, sft]` with `loss_weights: [1.0, alpha]` is Iterative RPO with its alpha
    (arXiv:2404.19733, which divides by the length of reasoning and answer: the completion).

    A step's loss is the mean of this over rows, so each row counts the same. TRL averages over the tokens of a batch
    (its SFT trainer over those of a whole step), so there long completions count more; the two agree where lengths are
    equal, or one row is a step. It is 0 only where every token is certain.
    """
    return -logps.chosen_mean_B


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "sppo_hard": sppo_hard,
    "sppo": sppo,
    "sigmoid_norm": sigmoid_norm,
    "simpo": simpo,
    "sft": sft,
}


def total_loss(
    logps: PairLogps, *, names: Sequence[str], weights: Sequence[float], numbers: Mapping[str, float | None]
) -> Tensor:
    """The weighted sum of the named losses per pair, shape (B,). Each gets those of `numbers` that it reads."""
    parts = [
        weight * LOSSES[name](logps, **{number: numbers[number] for number in NUMBERS if number in READS[name]})
        for name, weight in zip(names, weights, strict=True)
    ]
    return torch.stack(parts).sum(0)


def reward_metrics(logps: PairLogps, beta: float | None) -> dict[str, float]:
    """Sums over the pairs of TRL's metrics. A reward is beta * log-ratio (section 4, arXiv:2305.18290); in a
    reference-free job it is beta * logps per token, as TRL's CPO trainer says for SimPO; without a beta (sft alone) there
    is none. logps/* are sums over tokens whatever the loss.
    """
    found = {"logps/chosen": logps.chosen_B.detach().sum().item()}
    if logps.rejected_B is None or beta is None:
        return found
    found["logps/rejected"] = logps.rejected_B.detach().sum().item()
    free = logps.reference_chosen_B is None
    chosen_B = beta * (logps.chosen_mean_B if free else logps.chosen_logratios_B).detach()
    rejected_B = beta * (logps.rejected_mean_B if free else logps.rejected_logratios_B).detach()
    return {
        "rewards/chosen": chosen_B.sum().item(),
        "rewards/rejected": rejected_B.sum().item(),
        "rewards/accuracies": (chosen_B > rejected_B).float().sum().item(),
        "rewards/margins": (chosen_B - rejected_B).sum().item(),
        **found,
    }
