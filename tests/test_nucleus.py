"""top_p without a sort of the whole vocabulary."""

import pytest
import torch

from selfplay.generators.sampling import NUCLEUS, nucleus_floor

VOCABULARY = 20 * NUCLEUS
# how far logits spread: a trained model's few likely ids, a middling row, one that is nearly flat
SPREADS = {"peaked": 8.0, "middling": 2.0, "flat": 0.01}


def rows(spread: float) -> torch.Tensor:
    return (spread * torch.randn(16, VOCABULARY, generator=torch.Generator().manual_seed(0))).softmax(-1)


def looked_at(probs_SV: torch.Tensor, top_p: float) -> list[str]:
    """The names of the operations that one call takes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        nucleus_floor(probs_SV, torch.full((len(probs_SV),), top_p))
    return [event.name for event in profile.events()]


@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS)
@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999])
def test_the_nucleus_is_that_of_the_whole_row_in_order(spread: float, top_p: float) -> None:
    probs_SV = rows(spread)
    sorted_SV = probs_SV.sort(dim=-1, descending=True).values
    inside_SV = sorted_SV.cumsum(-1) - sorted_SV < top_p * probs_SV.sum(-1, keepdim=True)
    expected_S = torch.where(inside_SV, sorted_SV, torch.inf).amin(-1)
    assert nucleus_floor(probs_SV, torch.full((len(probs_SV),), top_p)).tolist() == expected_S.tolist()


def test_a_row_without_top_p_keeps_everything_beside_one_with_it() -> None:
    probs_SV = rows(8.0)[:2]
    floor_S = nucleus_floor(probs_SV, torch.tensor([1.0, 0.5]))
    assert floor_S[0] == 0
    assert floor_S[1] > 0


def test_ids_as_probable_as_the_last_one_kept_are_kept_too() -> None:
    probs_SV = torch.tensor([[0.3, 0.2, 0.2, 0.2, 0.1]])
    assert nucleus_floor(probs_SV, torch.tensor([0.4])).tolist() == pytest.approx([0.2])


def test_likely_ids_are_found_without_sorting_the_vocabulary_and_flat_rows_are_looked_at_again() -> None:
    peaked, flat = looked_at(rows(8.0), 0.9), looked_at(rows(0.01), 0.9)
    assert "aten::sort" not in peaked
    assert peaked.count("aten::topk") == 1
    assert flat.count("aten::topk") > 1
