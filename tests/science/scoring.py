"""Figures that need the weights: log-probabilities of given completions, and the entropy at other temperatures.

Shapes: N completion tokens, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from selfplay.models import computes_bf16
from selfplay.train.kl import DEFAULT_PACK_TOKENS
from selfplay.train.logps import TokenLogps
from selfplay.train.model import can_share_prompts, default_device, load_model
from selfplay.train.optim import cast_parameters
from selfplay.train.pack import build_packs
from selfplay.types import Demonstration, Group


@torch.no_grad()
def logps_of(model: Path, rows: Sequence[Demonstration]) -> list[float]:
    """The summed logps (nats) of each row's completion."""
    device = default_device()
    loaded = load_model(str(model)).to(device)
    shared, _ = can_share_prompts(loaded, device)
    cast_parameters(loaded, torch.bfloat16 if computes_bf16() else torch.float32)
    module, found = TokenLogps(loaded), [0.0] * len(rows)
    for pack in build_packs(rows, range(len(rows)), max_pack_tokens=DEFAULT_PACK_TOKENS, shared=shared):
        pack = pack.to(device)
        sums_B = pack.sum_per_sequence(module(pack))[pack.chosen_B].tolist()
        for place, total in zip(pack.pair_B, sums_B, strict=True):
            found[place] = total
    return found


def logp_per_token(sums: Sequence[float], rows: Sequence[Demonstration]) -> float:
    """Nats per token over all rows."""
    return sum(sums) / sum(len(row.completion_token_ids) for row in rows)


@torch.no_grad()
def entropies(model: Path, groups: Sequence[Group], temperatures: Sequence[float]) -> list[float]:
    """For each temperature T the mean entropy (nats) of softmax(logits / T) where the first completion of each group stands."""
    device = default_device()
    loaded = load_model(str(model)).to(device)
    cast_parameters(loaded, torch.bfloat16 if computes_bf16() else torch.float32)
    sums, count = [0.0] * len(temperatures), 0
    for group in groups:
        prompt, completion = group.prompt_token_ids, group.completions[0].token_ids
        ids = torch.tensor([[*prompt, *completion]], device=device)
        logits_NV = loaded(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        count += len(completion)
        for n, temperature in enumerate(temperatures):
            logp_NV = torch.log_softmax(logits_NV / temperature, -1)
            sums[n] -= float((logp_NV.exp() * logp_NV).sum())
    return [total / count for total in sums]
