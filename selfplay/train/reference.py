"""Log-probabilities of pairs under the reference, and the checks at the start of a round.

Shapes: B pairs, S sequences, N completion tokens.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfplay.errors import AuditError, StorageError
from selfplay.losses import PairLogps
from selfplay.store import check_file, write_file
from selfplay.train.logps import TokenLogps
from selfplay.train.pack import Pack, build_packs
from selfplay.train.world import World
from selfplay.types import Demonstration, Group, Message, TrainRow

NUM_AUDITED = 16
# mean |log-ratio| per token, nats: 0 where the packs are the same; a resumed round on another machine may differ by rounding
ZERO_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclass(frozen=True, slots=True)
class ReferenceLogps:
    """Summed logps of every pair, in the order of the pairs file, fp32 on the CPU.

    `zero_tolerance` is what the log-ratios of the first step may at most be, in nats a token, where the reference is the
    policy itself; None where it is another.
    """

    chosen_B: Tensor
    rejected_B: Tensor
    zero_tolerance: float | None = None

    def of(self, pack: Pack) -> tuple[Tensor, Tensor]:
        """(chosen, rejected) of a pack's pairs."""
        index_B = torch.tensor(pack.pair_B)
        device = pack.target_N.device
        return self.chosen_B[index_B].to(device), self.rejected_B[index_B].to(device)

    def save(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Writes the logps with what they are of: digests of the reference's weights, of the pairs, and so on."""
        from safetensors.torch import save_file

        tensors = {"chosen": self.chosen_B, "rejected": self.rejected_B}
        # one key: the order of several is not the same in every process
        metadata = {"identity": json.dumps(identity, sort_keys=True)}
        write_file(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))

    @classmethod
    def load(cls, path: Path, identity: Mapping[str, Any], *, zero_tolerance: float | None = None) -> "ReferenceLogps":
        """StorageError where the file is damaged, or its logps are of other weights, other pairs or another source."""
        from safetensors import safe_open

        check_file(path)
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get("identity", "{}"))
            tensors = {name: file.get_tensor(name) for name in ("chosen", "rejected")}
        changed = [key for key in {**found, **identity} if found.get(key) != identity.get(key)]
        if changed:
            raise StorageError(
                f"{path}: these logps are of another reference or of other pairs than this round's ({', '.join(changed)} "
                f"differ). Delete it, and {path.name}.sha256, to compute them anew"
            )
        return cls(tensors["chosen"], tensors["rejected"], zero_tolerance)


def pair_logps(
    pack: Pack, logps_N: Tensor, reference: ReferenceLogps | None, win_rates_2B: Tensor | None = None
) -> PairLogps:
    """What the losses read, for the pairs of one pack. `win_rates_2B` are those of chosen and rejected."""
    sum_S, length_S = pack.sum_per_sequence(logps_N), pack.lengths_S().float()
    reference_chosen_B, reference_rejected_B = (None, None) if reference is None else reference.of(pack)
    rejected_B = pack.rejected_B
    return PairLogps(
        chosen_B=sum_S[pack.chosen_B],
        rejected_B=None if rejected_B is None else sum_S[rejected_B],
        reference_chosen_B=reference_chosen_B,
        reference_rejected_B=reference_rejected_B,
        chosen_length_B=length_S[pack.chosen_B],
        rejected_length_B=None if rejected_B is None else length_S[rejected_B],
        chosen_win_rate_B=None if win_rates_2B is None else win_rates_2B[0],
        rejected_win_rate_B=None if win_rates_2B is None else win_rates_2B[1],
    )


def check_zero_logratios(logps: Sequence[PairLogps], *, tolerance: float, world: World) -> float:
    """Mean |log-ratio| per token of a step before any update, where policy and reference are the same weights. `logps` are
    those of this process's packs.

    AuditError above `tolerance`: a wrong reference file, or dropout that is active. Where the engine gave the reference's
    logps they differ from the trainer's by the rounding of two programs. A completion's |log-ratio| is then at most the
    sum of its tokens' |differences|, so what passes the audit's bound on the mean difference of a token passes here: the
    bound is the same, max_audit_difference. It is loose, because differences of both signs cancel in a sum.
    """
    total = tokens = 0.0
    for p in logps:
        assert p.rejected_length_B is not None, "a loss that reads a reference reads pairs"
        total += float((p.chosen_logratios_B.abs() + p.rejected_logratios_B.abs()).detach().sum())
        tokens += float((p.chosen_length_B + p.rejected_length_B).sum())
    total, tokens = world.total([total, tokens])
    difference = total / tokens
    if not difference <= tolerance:
        raise AuditError(
            f"policy and reference are the same weights, but their logps differ by {difference:.4f} nats a token on the "
            f"first step (at most {tolerance:g} is rounding). The reference's logps are of another model, the engine's are "
            "wrong, or dropout is active. Delete reference.safetensors of this round and run again"
        )
    return difference


@torch.no_grad()
def audit_engine(module: TokenLogps, groups: Sequence[Group], *, bound: float, world: World) -> dict[str, float] | None:
    """How far the trainer's logps of sampled completions are from the engine's own: mean and largest |difference| per token,
    in nats, over at most 16 completions in plain, unpacked rows. None where the engine gave no logps.

    AuditError where the mean is above `bound`: another template, a missing BOS, a wrong mask or stale weights.
    """
    sampled = [(g, c) for g in groups for c in g.completions[:1] if c.logps][:NUM_AUDITED]
    if not sampled:
        return None
    own: list[list[float]] = []
    for first in range(0, len(sampled), world.size):
        # past the end the last one again: processes with sharded weights run equally often
        group, completion = sampled[min(first + world.rank, len(sampled) - 1)]
        row = as_demonstration(group, completion.token_ids)
        pack = build_packs([row], [0], max_pack_tokens=1 << 30, shared=False)[0].to(world.device)
        logps_N = torch.tensor(completion.logps)
        own.append((module(pack)[: len(logps_N)].cpu() - logps_N).abs().tolist())
    turns = zip(*world.gather(own), strict=True)
    in_order = [differences for turn in turns for differences in turn][: len(sampled)]
    difference_N = torch.tensor([difference for differences in in_order for difference in differences])
    figures = {"audit/mean_difference": difference_N.mean().item(), "audit/max_difference": difference_N.max().item()}
    if not figures["audit/mean_difference"] <= bound:
        raise AuditError(
            f"the engine and the trainer disagree about the same tokens by {figures['audit/mean_difference']:.3f} nats a "
            f"token on average (train.max_audit_difference is {bound}). One of them has other weights, another chat "
            "template or another dtype. Nothing was trained. Look at generator.dtype, train.bf16 and chat.chat_template; where "
            "two dtypes are all that differs, raise train.max_audit_difference"
        )
    return figures


def as_demonstration(group: Group, token_ids: tuple[int, ...]) -> TrainRow:
    """One completion in the form that packs take; its text plays no part."""
    nothing = (Message("assistant", ""),)
    return Demonstration(group.prompt.id, group.prompt.messages, nothing, group.prompt_token_ids, token_ids)
