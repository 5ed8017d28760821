"""The losses against their formulas, on plain numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from selfplay.losses import LOSSES, PairLogps, reward_metrics, sft, sigmoid, total_loss

LOGP = st.floats(-500, 0)
BETA = st.floats(0.01, 5)


def logps_of(chosen: float, rejected: float, reference_chosen: float, reference_rejected: float) -> PairLogps:
    values = [torch.tensor([x], dtype=torch.float64) for x in (chosen, rejected, reference_chosen, reference_rejected)]
    return PairLogps(*values, torch.tensor([4.0]), torch.tensor([5.0]))


def swapped(logps: PairLogps) -> PairLogps:
    return PairLogps(
        logps.rejected_B,
        logps.chosen_B,
        logps.reference_rejected_B,
        logps.reference_chosen_B,
        logps.rejected_length_B,
        logps.chosen_length_B,
    )


@given(LOGP, LOGP, LOGP, LOGP, BETA)
def test_sigmoid_is_its_formula_and_swapping_flips_the_margin(
    a: float, b: float, c: float, d: float, beta: float
) -> None:
    logps = logps_of(a, b, c, d)
    margin = beta * ((a - c) - (b - d))
    # -log sigmoid(x) = log(1 + exp(-x)), written so that it does not overflow
    wanted = max(-margin, 0) + math.log1p(math.exp(-abs(margin)))
    assert sigmoid(logps, beta).item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert sigmoid(swapped(logps), beta).item() == pytest.approx(wanted + margin, rel=1e-6, abs=1e-6)
    assert reward_metrics(swapped(logps), beta)["rewards/margins"] == pytest.approx(-margin, rel=1e-9, abs=1e-9)


@given(LOGP, LOGP, BETA)
def test_sigmoid_is_ln_2_where_policy_is_reference(a: float, b: float, beta: float) -> None:
    assert sigmoid(logps_of(a, b, a, b), beta).item() == pytest.approx(math.log(2), rel=1e-12)


def test_sigmoid_falls_with_the_chosen_log_ratio_and_rises_with_the_rejected_one() -> None:
    chosen, rejected = (torch.tensor([x], requires_grad=True) for x in (-3.0, -4.0))
    constant = torch.tensor([-3.5])
    sigmoid(PairLogps(chosen, rejected, constant, constant, constant, constant), 0.5).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() < 0 < rejected.grad.item()
    assert chosen.grad.item() == pytest.approx(-rejected.grad.item())


def test_sft_is_the_mean_over_the_tokens_of_the_chosen_completion() -> None:
    assert sft(logps_of(-8.0, -1.0, -2.0, -3.0), 0.1).tolist() == [2.0]


def test_the_total_is_the_weighted_sum_per_pair() -> None:
    columns: list[Tensor] = [torch.tensor([-2.0, -9.0, -30.0]) * n for n in (1.0, 1.5, 1.1, 1.4)]
    logps = PairLogps(*columns, torch.tensor([2.0, 3.0, 10.0]), torch.tensor([1.0, 2.0, 3.0]))
    total = total_loss(logps, names=["sigmoid", "sft"], weights=[2.0, 0.5], beta=0.3)
    assert total.shape == (3,)
    assert torch.allclose(total, 2 * sigmoid(logps, 0.3) + 0.5 * sft(logps, 0.3))
    assert torch.equal(total_loss(logps, names=["sft"], weights=[1.0], beta=0.3), sft(logps, 0.3))
    with pytest.raises(ValueError, match="shorter"):
        total_loss(logps, names=["sigmoid", "sft"], weights=[1.0], beta=0.3)


def test_metrics_are_sums_under_the_names_of_hugging_face() -> None:
    logps = PairLogps(
        torch.tensor([-1.0, -6.0]),
        torch.tensor([-3.0, -4.0]),
        torch.tensor([-2.0, -4.0]),
        torch.tensor([-2.0, -4.0]),
        torch.tensor([1.0, 1.0]),
        torch.tensor([1.0, 1.0]),
    )
    assert reward_metrics(logps, 0.5) == {
        "rewards/chosen": -0.5,
        "rewards/rejected": -0.5,
        "rewards/accuracies": 1.0,
        "rewards/margins": 0.0,
        "logps/chosen": -7.0,
        "logps/rejected": -7.0,
    }


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_is_one_finite_value_a_pair_even_far_out(name: str) -> None:
    far = torch.tensor([-1e4, -1.0, -1e4])
    lengths = torch.tensor([100.0, 1.0, 7.0])
    losses = LOSSES[name](PairLogps(far, far.flip(0), far.roll(1), far, lengths, lengths), 0.1)
    assert losses.shape == (3,)
    assert losses.isfinite().all()


def test_log_ratios_are_policy_minus_reference() -> None:
    one, two, three, four, lengths = (torch.tensor([x]) for x in (-3.0, -5.0, -4.0, -4.5, 2.0))
    logps = PairLogps(one, two, three, four, lengths, lengths)
    assert logps.chosen_logratios_B.tolist() == [1.0]
    assert logps.rejected_logratios_B.tolist() == [-0.5]
