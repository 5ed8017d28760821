"""How far a policy has moved: KL to the initial policy, per token."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selfplay import store
from selfplay.errors import RecipeError
from selfplay.train.logps import TokenLogps
from selfplay.train.model import can_share_prompts, default_device, load_model
from selfplay.train.optim import cast_parameters
from selfplay.train.pack import build_packs
from selfplay.train.place import moved
from selfplay.train.progress import Progress
from selfplay.train.reference import as_demonstration
from selfplay.types import Completion, Group

DEFAULT_PACK_TOKENS = 2048  # without gradients any device has room for these


@dataclass(frozen=True, slots=True)
class KLJob:
    """The initial policy, and groups that a later policy sampled at temperature 1."""

    initial: str
    groups: tuple[str, ...]
    bf16: bool
    max_pack_tokens: int | None  # None: DEFAULT_PACK_TOKENS


@torch.no_grad()
def run_kl(job: KLJob, progress: Progress) -> dict[str, Any]:
    """{"kl": nats per token}: the mean over sampled tokens of log(policy / initial), an unbiased estimate of
    KL(policy || initial) (k1 of Schulman, "Approximating KL divergence", 2020). The policy's logps are the engine's, and
    one completion of every prompt is scored. None where the engine gave no logps. RecipeError where one device is too small.
    """
    groups = [g for path in job.groups for g in store.read_records(Path(path), Group)]
    sampled = [(g, g.completions[0]) for g in groups if g.completions[0].logps]
    if not sampled:
        return {"kl": None}
    try:
        return {"kl": _estimate(job, sampled, progress)}
    except torch.OutOfMemoryError as error:
        raise RecipeError(
            f"evaluate.kl: one device has too little memory for the initial policy, {job.initial} ({error}). Say "
            "evaluate.kl: false"
        ) from error


def _estimate(job: KLJob, sampled: Sequence[tuple[Group, Completion]], progress: Progress) -> float:
    device = default_device()
    model = load_model(job.initial).requires_grad_(False)
    shared, _ = moved(model, device, bf16=job.bf16, look=lambda at: can_share_prompts(model, at))
    cast_parameters(model, torch.bfloat16 if job.bf16 else torch.float32)
    module = TokenLogps(model)
    rows = [as_demonstration(g, c.token_ids) for g, c in sampled]
    initial, done = 0.0, 0
    cap = job.max_pack_tokens or DEFAULT_PACK_TOKENS
    for pack in build_packs(rows, range(len(rows)), max_pack_tokens=cap, shared=shared):
        initial += float(module(pack.to(device)).double().sum())
        done += len(pack.pair_B)
        progress("kl", done, len(rows))
    policy = sum(sum(c.logps) for _, c in sampled)
    return (policy - initial) / sum(len(c.logps) for _, c in sampled)
