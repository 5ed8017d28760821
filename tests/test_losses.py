"""The losses against their formulas, on plain numbers."""

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from selfplay.losses import LOSSES, PairLogps, reward_metrics, sft, sigmoid, sppo, sppo_hard, total_loss
from selfplay.recipe_train import NUMBERS, READS

LOGP = st.floats(-500, 0)
BETA = st.floats(0.01, 5)
NUMBERS_OF_ALL = {"beta": 0.1, "label_smoothing": 0.2, "simpo_gamma": 0.3}


def logps_of(chosen: float, rejected: float, reference_chosen: float, reference_rejected: float) -> PairLogps:
    """One pair; the chosen completion has 4 tokens, the rejected one 5."""
    values = [torch.tensor([x], dtype=torch.float64) for x in (chosen, rejected, reference_chosen, reference_rejected)]
    return PairLogps(*values, torch.tensor([4.0]), torch.tensor([5.0]))


def with_rates(logps: PairLogps, chosen: float, rejected: float) -> PairLogps:
    rates = (torch.tensor([rate], dtype=torch.float64) for rate in (chosen, rejected))
    return PairLogps(*(getattr(logps, name) for name in PairLogps.__slots__[:6]), *rates)


def swapped(logps: PairLogps) -> PairLogps:
    assert logps.rejected_B is not None
    assert logps.rejected_length_B is not None
    return PairLogps(
        logps.rejected_B,
        logps.chosen_B,
        logps.reference_rejected_B,
        logps.reference_chosen_B,
        logps.rejected_length_B,
        logps.chosen_length_B,
    )


def softplus(x: float) -> float:
    """-log sigmoid(-x), written so that it does not overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


# chosen: policy -6, reference -8, so a log-ratio of 2, of 4 tokens 0.5 each; rejected: -15 and -10, -5, of 5 tokens -1 each
PAIR = (-6.0, -15.0, -8.0, -10.0)
BY_HAND: dict[str, tuple[str, dict[str, float], float]] = {
    "DPO": ("sigmoid", {"beta": 0.1}, softplus(-0.7)),
    "cDPO": ("sigmoid", {"beta": 0.1, "label_smoothing": 0.2}, 0.8 * softplus(-0.7) + 0.2 * softplus(0.7)),
    "hinge": ("hinge", {"beta": 0.1}, 0.3),
    "hinge beyond its margin": ("hinge", {"beta": 0.2}, 0.0),
    "ipo": ("ipo", {"beta": 0.1}, 12.25),  # (0.5 + 1 - 5)^2
    "sppo_hard": ("sppo_hard", {"beta": 0.1}, 9.0),  # (2 - 5)^2 + (-5 + 5)^2
    "sppo": ("sppo", {"beta": 0.1}, 2.0),  # win rates 0.8 and 0.1: (2 - 3)^2 + (-5 + 4)^2
    "sigmoid_norm": ("sigmoid_norm", {"beta": 2.0}, softplus(-3.0)),  # 2 * (0.5 + 1)
    "simpo": ("simpo", {"beta": 2.0, "simpo_gamma": 0.5}, softplus(-2.5)),  # 2 * (-1.5 + 3) - 0.5
    "simpo, smoothed": (
        "simpo",
        {"beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": 0.1},
        0.9 * softplus(-2.5) + 0.1 * softplus(2.5),
    ),
    "sft": ("sft", {}, 1.5),  # 6 nats over 4 tokens
}


@pytest.mark.parametrize("case", sorted(BY_HAND))
def test_every_loss_is_what_its_formula_gives_by_hand(case: str) -> None:
    name, numbers, wanted = BY_HAND[case]
    logps = with_rates(logps_of(*PAIR), 0.8, 0.1)
    assert LOSSES[name](logps, **numbers).tolist() == pytest.approx([wanted], rel=1e-12, abs=1e-12)


def test_every_loss_has_a_case_worked_by_hand() -> None:
    assert {name for name, _, _ in BY_HAND.values()} == set(LOSSES)


WHERE_POLICY_IS_REFERENCE = {
    "sigmoid": math.log(2),
    "hinge": 1.0,
    "ipo": 25.0,  # 1 / (4 * 0.1^2)
    "sppo_hard": 50.0,  # 1 / (2 * 0.1^2)
    "sppo": 0.0,  # at win rates of a half
    "sigmoid_norm": math.log(2),
}


@pytest.mark.parametrize("name", sorted(WHERE_POLICY_IS_REFERENCE))
def test_a_loss_of_log_ratios_starts_where_its_docstring_says(name: str) -> None:
    logps = with_rates(logps_of(-6.0, -15.0, -6.0, -15.0), 0.5, 0.5)
    assert LOSSES[name](logps, beta=0.1).tolist() == pytest.approx([WHERE_POLICY_IS_REFERENCE[name]])


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_loss_reads_what_the_recipe_believes_that_it_reads(name: str) -> None:
    """A change of what is read changes the loss, and what is not read may be missing."""
    tensors: dict[str, Tensor | None] = {
        "chosen_B": torch.tensor([-6.0]),
        "rejected_B": torch.tensor([-15.0]),
        "reference_chosen_B": torch.tensor([-8.0]),
        "reference_rejected_B": torch.tensor([-10.0]),
        "chosen_length_B": torch.tensor([4.0]),
        "rejected_length_B": torch.tensor([5.0]),
        "chosen_win_rate_B": torch.tensor([0.8]),
        "rejected_win_rate_B": torch.tensor([0.1]),
    }
    parts = {
        "rejected": ("rejected_B", "rejected_length_B"),
        "reference": ("reference_chosen_B", "reference_rejected_B"),
        "win_rates": ("chosen_win_rate_B", "rejected_win_rate_B"),
    }
    numbers = {number: NUMBERS_OF_ALL[number] for number in NUMBERS if number in READS[name]}
    assert set(inspect.signature(LOSSES[name]).parameters) - {"logps"} == set(numbers)

    def loss(numbers: dict[str, float], **changes: Tensor | None) -> float:
        return LOSSES[name](PairLogps(**{**tensors, **changes}), **numbers).item()

    before = loss(numbers)
    for part, (one, other) in parts.items():
        if part not in READS[name]:
            assert loss(numbers, **{one: None, other: None}) == before
        else:
            assert loss(numbers, **{one: tensors[one] + 0.25}) != before
    for number in numbers:
        assert loss({**numbers, number: numbers[number] + 0.1}) != before


@given(LOGP, LOGP, LOGP, LOGP, BETA)
def test_sigmoid_is_its_formula_and_swapping_flips_the_margin(
    a: float, b: float, c: float, d: float, beta: float
) -> None:
    logps = logps_of(a, b, c, d)
    margin = beta * ((a - c) - (b - d))
    wanted = softplus(-margin)
    assert sigmoid(logps, beta=beta).item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert sigmoid(swapped(logps), beta=beta).item() == pytest.approx(wanted + margin, rel=1e-6, abs=1e-6)
    assert reward_metrics(swapped(logps), beta)["rewards/margins"] == pytest.approx(-margin, rel=1e-9, abs=1e-9)


@given(LOGP, LOGP, LOGP, LOGP, BETA, st.floats(0, 0.49))
def test_label_smoothing_mixes_the_pair_with_its_swap(
    a: float, b: float, c: float, d: float, beta: float, smoothing: float
) -> None:
    logps = logps_of(a, b, c, d)
    forth, back = sigmoid(logps, beta=beta).item(), sigmoid(swapped(logps), beta=beta).item()
    found = sigmoid(logps, beta=beta, label_smoothing=smoothing).item()
    assert found == pytest.approx((1 - smoothing) * forth + smoothing * back, rel=1e-6, abs=1e-6)


@given(LOGP, LOGP, LOGP, LOGP, BETA)
def test_sppo_with_certain_win_rates_is_sppo_hard(a: float, b: float, c: float, d: float, beta: float) -> None:
    logps = logps_of(a, b, c, d)
    assert sppo(with_rates(logps, 1.0, 0.0), beta=beta).item() == sppo_hard(logps, beta=beta).item()


def test_sigmoid_falls_with_the_chosen_log_ratio_and_rises_with_the_rejected_one() -> None:
    chosen, rejected = (torch.tensor([x], requires_grad=True) for x in (-3.0, -4.0))
    constant = torch.tensor([-3.5])
    sigmoid(PairLogps(chosen, rejected, constant, constant, constant, constant), beta=0.5).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() < 0 < rejected.grad.item()
    assert chosen.grad.item() == pytest.approx(-rejected.grad.item())


def test_the_total_is_the_weighted_sum_per_pair() -> None:
    columns: list[Tensor] = [torch.tensor([-2.0, -9.0, -30.0]) * n for n in (1.0, 1.5, 1.1, 1.4)]
    logps = PairLogps(*columns, torch.tensor([2.0, 3.0, 10.0]), torch.tensor([1.0, 2.0, 3.0]))
    numbers = {"beta": 0.3, "label_smoothing": 0.1}
    total = total_loss(logps, names=["sigmoid", "sft"], weights=[2.0, 0.5], numbers=numbers)
    assert total.shape == (3,)
    assert torch.allclose(total, 2 * sigmoid(logps, **numbers) + 0.5 * sft(logps))
    assert torch.equal(total_loss(logps, names=["sft"], weights=[1.0], numbers=numbers), sft(logps))
    with pytest.raises(ValueError, match="shorter"):
        total_loss(logps, names=["sigmoid", "sft"], weights=[1.0], numbers=numbers)


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


def test_rewards_without_a_reference_are_per_token_and_without_a_beta_there_are_none() -> None:
    free = PairLogps(*(torch.tensor([x]) for x in (-6.0, -15.0)), None, None, torch.tensor([4.0]), torch.tensor([5.0]))
    assert reward_metrics(free, 2.0) == {
        "rewards/chosen": -3.0,
        "rewards/rejected": -6.0,
        "rewards/accuracies": 1.0,
        "rewards/margins": 3.0,
        "logps/chosen": -6.0,
        "logps/rejected": -15.0,
    }
    single = PairLogps(torch.tensor([-6.0]), None, None, None, torch.tensor([4.0]), None)
    assert reward_metrics(single, None) == {"logps/chosen": -6.0}


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_is_one_finite_value_a_pair_even_far_out(name: str) -> None:
    far = torch.tensor([-1e4, -1.0, -1e4])
    lengths, rates = torch.tensor([100.0, 1.0, 7.0]), torch.tensor([0.0, 0.5, 1.0])
    logps = PairLogps(far, far.flip(0), far.roll(1), far, lengths, lengths, rates, rates)
    losses = total_loss(logps, names=[name], weights=[1.0], numbers=NUMBERS_OF_ALL)
    assert losses.shape == (3,)
    assert losses.isfinite().all()


def test_log_ratios_are_policy_minus_reference() -> None:
    one, two, three, four, lengths = (torch.tensor([x]) for x in (-3.0, -5.0, -4.0, -4.5, 2.0))
    logps = PairLogps(one, two, three, four, lengths, lengths)
    assert logps.chosen_logratios_B.tolist() == [1.0]
    assert logps.rejected_logratios_B.tolist() == [-0.5]
