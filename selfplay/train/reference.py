"""Log-probabilities of pairs under the reference, and the checks at the start of a round.

Shapes: B pairs, N completion tokens, S sequences.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from selfplay.errors import AuditError
from selfplay.losses import PairLogps
from selfplay.store import check_file, write_file
from selfplay.train.logps import TokenLogps
from selfplay.train.pack import Pack, build_packs
from selfplay.types import Group, Message, PreferencePair

NUM_AUDITED = 16
# mean |log-ratio| per token, nats: 0 where the packs are the same; a resumed round on another machine may differ by rounding
ZERO_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclass(frozen=True, slots=True)
class ReferenceLogps:
    """Summed logps of every pair, in the order of the pairs file."""

    chosen_B: Tensor
    rejected_B: Tensor

    def of(self, pack: Pack) -> tuple[Tensor, Tensor]:
        """(chosen, rejected) of a pack's pairs."""
        index_B = torch.tensor(pack.pair_B)
        device = pack.target_N.device
        return self.chosen_B[index_B].to(device), self.rejected_B[index_B].to(device)

    def save(self, path: Path) -> None:
        from safetensors.torch import save_file

        write_file(path, lambda temporary: save_file({"chosen": self.chosen_B, "rejected": self.rejected_B}, temporary))

    @classmethod
    def load(cls, path: Path) -> "ReferenceLogps":
        from safetensors.torch import load_file

        check_file(path)
        tensors = load_file(path)
        return cls(tensors["chosen"], tensors["rejected"])


@torch.no_grad()
def score_pairs(
    module: TokenLogps,
    pairs: Sequence[PreferencePair],
    steps: Sequence[Sequence[int]],
    *,
    max_pack_tokens: int,
    shared: bool,
    device: torch.device,
    progress: Callable[[int], None] = lambda done: None,
) -> ReferenceLogps:
    """Summed logps of every pair under the module's weights, fp32 on the CPU. `progress` gets the pairs done.

    `steps` are the first epoch's: its packs are the very ones that training forwards first, so where policy and reference
    are the same weights the first log-ratios are 0 to the last bit, in bf16 as well.
    """
    chosen_B, rejected_B = torch.zeros(len(pairs)), torch.zeros(len(pairs))
    assert sorted(i for step in steps for i in step) == list(range(len(pairs)))
    done = 0
    for step in steps:
        for pack in build_packs(pairs, step, max_pack_tokens=max_pack_tokens, shared=shared):
            pack = pack.to(device)
            sum_S = pack.sum_per_sequence(module(pack)).cpu()
            index_B = torch.tensor(pack.pair_B)
            chosen_B[index_B] = sum_S[pack.chosen_B.cpu()]
            rejected_B[index_B] = sum_S[pack.rejected_B.cpu()]
            done += len(pack.pair_B)
            progress(done)
    return ReferenceLogps(chosen_B, rejected_B)


def pair_logps(pack: Pack, logps_N: Tensor, reference: ReferenceLogps) -> PairLogps:
    """What the losses read, for the pairs of one pack."""
    sum_S, length_S = pack.sum_per_sequence(logps_N), pack.lengths_S().float()
    reference_chosen_B, reference_rejected_B = reference.of(pack)
    return PairLogps(
        sum_S[pack.chosen_B],
        sum_S[pack.rejected_B],
        reference_chosen_B,
        reference_rejected_B,
        length_S[pack.chosen_B],
        length_S[pack.rejected_B],
    )


def check_zero_logratios(logps: Sequence[PairLogps], *, compute_dtype: torch.dtype) -> float:
    """Mean |log-ratio| per token of a step before any update, where policy and reference are the same weights.

    AuditError above the dtype's tolerance: a wrong reference file, or dropout that is active.
    """
    total = sum(float((p.chosen_logratios_B.abs() + p.rejected_logratios_B.abs()).detach().sum()) for p in logps)
    tokens = sum(float((p.chosen_length_B + p.rejected_length_B).sum()) for p in logps)
    difference = total / tokens
    if not difference <= ZERO_TOLERANCE[compute_dtype]:
        raise AuditError(
            f"policy and reference are the same weights, but their logps differ by {difference:.4f} nats a token on the "
            f"first step (at most {ZERO_TOLERANCE[compute_dtype]} is rounding). The reference file is of another model, or "
            "dropout is active. Delete reference.safetensors of this round and run again"
        )
    return difference


@torch.no_grad()
def audit_engine(
    module: TokenLogps, groups: Sequence[Group], *, bound: float, device: torch.device
) -> dict[str, float] | None:
    """How far the trainer's logps of sampled completions are from the engine's own: mean and largest |difference| per token,
    in nats, over at most 16 completions in plain, unpacked rows. None where the engine gave no logps.

    AuditError where the mean is above `bound`: another template, a missing BOS, a wrong mask or stale weights.
    """
    sampled = [(g, c) for g in groups for c in g.completions[:1] if c.logps][:NUM_AUDITED]
    if not sampled:
        return None
    differences = []
    for group, completion in sampled:
        pair = as_pair(group, completion.token_ids)
        pack = build_packs([pair], [0], max_pack_tokens=1 << 30, shared=False)[0].to(device)
        differences.append((module(pack)[: len(completion.logps)].cpu() - torch.tensor(completion.logps)).abs())
    difference_N = torch.cat(differences)
    figures = {"audit/mean_difference": difference_N.mean().item(), "audit/max_difference": difference_N.max().item()}
    if not figures["audit/mean_difference"] <= bound:
        raise AuditError(
            f"the engine and the trainer disagree about the same tokens by {figures['audit/mean_difference']:.3f} nats a "
            f"token on average (train.max_audit_difference is {bound}). One of them has other weights, another chat "
            "template or another dtype. Nothing was trained"
        )
    return figures


def as_pair(group: Group, token_ids: tuple[int, ...]) -> PreferencePair:
    """One completion in the form that packs take: chosen and rejected are the same sequence."""
    nothing = (Message("assistant", ""),)
    return PreferencePair(
        group.prompt.id, group.prompt.messages, nothing, nothing, group.prompt_token_ids, token_ids, token_ids
    )
