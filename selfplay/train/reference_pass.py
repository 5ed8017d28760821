"""The reference of a training job: whose weights, and who computes its logps.

Shapes: C completions of a row (chosen and rejected, or one), B rows.
"""

import hashlib
import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfplay import store
from selfplay.errors import AuditError, DataError
from selfplay.recipe_train import reads
from selfplay.train.deal import own_packs
from selfplay.train.logps import TokenLogps
from selfplay.train.memory import in_smaller_packs, trim_memory
from selfplay.train.model import load_model, save_policy
from selfplay.train.optim import Masters
from selfplay.train.place import place
from selfplay.train.reference import ZERO_TOLERANCE, ReferenceLogps
from selfplay.train.settings import TrainJob, TrainSettings
from selfplay.train.steps import form_steps
from selfplay.train.world import World
from selfplay.types import Demonstration, Group, Message, PreferencePair, TrainRow

Tokens = tuple[int, ...]


def find_reference(
    job: TrainJob,
    rows: Sequence[TrainRow],
    module: TokenLogps,
    masters: Masters,
    *,
    max_pack_tokens: int,
    shared: bool,
    world: World,
    halved: Callable[[int], None],
    progress: Callable[[str, int, int], None],
) -> ReferenceLogps | None:
    """The reference's logps of every row, from disk where they are there and are of these weights and rows; None where no
    loss of the job reads a reference, and then no weights are loaded.

    `module` and `masters` hold the policy before its first step. Where the digests of reference and policy agree that one
    copy of the weights serves both; else the reference is loaded, scored and released before the optimizer takes memory.
    Where memory runs out the packs are made smaller, and `halved` gets their new cap. AuditError, DataError or StorageError
    where the logps can't be trusted.
    """
    settings = job.settings
    if "reference" not in reads(settings.loss_type):
        return None
    folder = reference_folder(job, masters, world)
    # large files: one process reads them for all
    weights = world.first(lambda: store.weights_digest(folder))
    is_policy = job.reference is None or weights == world.first(lambda: store.weights_digest(Path(job.policy)))
    by_engine = settings.reference_logps == "engine"
    if by_engine and not is_policy:
        raise AuditError(
            "train.reference_logps is engine, but the reference is not the policy that sampled: its logps are unknown to "
            "the engine. Say reference_logps: trainer"
        )
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    tolerance = (settings.max_audit_difference if by_engine else ZERO_TOLERANCE[dtype]) if is_policy else None
    identity = _identity(job, rows, weights)
    path = Path(job.out) / "reference.safetensors"
    if world.first(path.exists):
        return ReferenceLogps.load(path, identity, zero_tolerance=tolerance)
    steps = form_steps(rows, batch_size=settings.batch_size, seed=job.seed, epoch=0, shuffle=settings.shuffle)

    def score(frozen: TokenLogps, scored: Sequence[TrainRow], cut: Sequence[Sequence[int]], shared: bool) -> Tensor:
        def in_packs(cap: int) -> Tensor:
            return score_rows(
                frozen,
                scored,
                cut,
                max_pack_tokens=cap,
                max_pack_length=settings.max_pack_length,
                shared=shared,
                world=world,
                progress=lambda done: progress("reference", done, len(scored)),
            )

        own_CB = in_smaller_packs(in_packs, max_pack_tokens, halved=halved, world=world).to(world.device)
        world.add([own_CB])  # the others have 0 where one has a sum
        return own_CB.cpu()

    if by_engine:
        sums_CB = _engine_sums(job, rows, lambda missing: score(module, missing, [range(len(missing))], shared))
    elif is_policy:
        sums_CB = score(module, rows, steps, shared)
    else:
        other, shares = _load_other(folder, module, settings, world)
        sums_CB = score(other, rows, steps, shares)
    reference = ReferenceLogps(sums_CB[0], sums_CB[1], tolerance)
    if world.is_first:
        reference.save(path, identity)
    return reference


def reference_folder(job: TrainJob, masters: Masters, world: World) -> Path:
    """Where the reference's weights lie. An ema is mixed and saved as `reference` in the job's folder where it isn't there:
    alpha * policy + (1 - alpha) * reference of the round before (TR-DPO's soft update, arXiv:2404.09656, once a round), in
    fp32 whatever save_dtype is, since small steps would be lost in bf16.
    """
    if job.reference is None:
        return Path(job.policy)
    if job.ref_model_mixup_alpha is None:
        return Path(job.reference)
    folder = Path(job.out) / "reference"
    if not world.first(folder.exists):
        policy = dict(masters.whole())
        if world.is_first:
            _save_mixed(job, policy, folder)
        world.wait()
    return folder


def _save_mixed(job: TrainJob, policy: Mapping[str, Tensor], folder: Path) -> None:
    assert job.reference is not None
    assert job.ref_model_mixup_alpha is not None
    mixed = load_model(job.reference)
    with torch.no_grad():
        for name, param in mixed.named_parameters():
            # lerp gives the very same values where both are the same
            param.lerp_(policy[name].to(param.device), job.ref_model_mixup_alpha)
    kept = Masters(mixed, compute_dtype=torch.float32)
    save_policy(mixed, kept, job.policy, folder, dtype="float32", chat_template=job.chat_template)


def _load_other(folder: Path, module: TokenLogps, settings: TrainSettings, world: World) -> tuple[TokenLogps, bool]:
    """Another model than the policy, in the policy's dtype, and whether it takes shared prompts."""
    load = partial(load_model, str(folder), load_in_4bit=settings.load_in_4bit)
    found = place(load, world, bf16=settings.bf16, check=True)
    other = found.module.model
    sizes = [m.config.get_text_config().vocab_size for m in (module.model, other)]
    if sizes[0] != sizes[1]:
        raise DataError(
            f"train.reference: {folder} has {sizes[1]} tokens and the policy {sizes[0]}: the ids of one mean other text to "
            "the other. Take a reference of the policy's own family"
        )
    assert found.shared is not None
    return found.module, found.shared


def _identity(job: TrainJob, rows: Sequence[TrainRow], weights: str) -> dict[str, Any]:
    """What the logps on disk depend on."""
    by_engine = job.settings.reference_logps == "engine"
    return {
        "weights": weights,
        "pairs": rows_digest(rows),
        "reference_logps": job.settings.reference_logps,
        "bf16": job.settings.bf16,
        "groups": [store.file_digest(Path(path)) for path in job.groups] if by_engine else None,
    }


def rows_digest(rows: Sequence[TrainRow]) -> str:
    """SHA-256 of the token ids of some rows, in order."""
    digest = hashlib.sha256()
    for row in rows:
        for tokens in (row.prompt_token_ids, *row.completions):
            digest.update(len(tokens).to_bytes(8, "little") + array("q", tokens).tobytes())
    return digest.hexdigest()


@torch.no_grad()
def score_rows(
    module: TokenLogps,
    rows: Sequence[TrainRow],
    steps: Sequence[Sequence[int]],
    *,
    max_pack_tokens: int,
    max_pack_length: int | None = None,
    shared: bool,
    world: World,
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Summed logps of every row's completions under the module's weights, shape (C, B), fp32 on the CPU, and 0 for the rows
    of other processes. `progress` gets the rows done.

    `steps` are the first epoch's: its packs are the very ones that training forwards first, so where policy and reference
    are the same weights the first log-ratios are 0 to the last bit, in bf16 as well; on CUDA all but the order of a sum.
    """
    sums_CB = torch.zeros(len(rows[0].completions), len(rows))
    assert sum(map(len, steps)) == len(rows), "every row is in one step"
    finished = 0
    for step in steps:
        done = finished
        for pack, weight in own_packs(
            world, rows, step, max_pack_tokens=max_pack_tokens, max_pack_length=max_pack_length, shared=shared
        ):
            pack = pack.to(world.device)
            sum_S = pack.sum_per_sequence(module(pack)).cpu()
            if not weight:  # it is another process's
                continue
            index_B = torch.tensor(pack.pair_B)
            sums_CB[0, index_B] = sum_S[pack.chosen_B.cpu()]
            if pack.rejected_B is not None:
                sums_CB[1, index_B] = sum_S[pack.rejected_B.cpu()]
            done += len(pack.pair_B)
            progress(done)
        finished += len(step)
        progress(finished)
    trim_memory(world.device)
    return sums_CB


def _engine_sums(job: TrainJob, rows: Sequence[TrainRow], score: Callable[[Sequence[TrainRow]], Tensor]) -> Tensor:
    """Summed logps of every row's completions as the engine gave them while it sampled, shape (C, B). Completions that it
    did not sample in this round (gold answers, pairs of earlier rounds) go through `score`.

    AuditError where the engine gave no logps: then nothing was audited either.
    """
    sums: dict[tuple[Tokens, Tokens], float] = {}
    for path in job.groups:
        for group in store.read_records(Path(path), Group):
            for completion in group.completions:
                if len(completion.logps) == len(completion.token_ids):
                    sums.setdefault((group.prompt_token_ids, completion.token_ids), math.fsum(completion.logps))
    if not sums:
        raise AuditError(
            "train.reference_logps is engine, but there are no logps of an engine in the groups. Say "
            "reference_logps: trainer, or sample with an engine that gives logps"
        )
    wanted = dict.fromkeys((row.prompt_token_ids, tokens) for row in rows for tokens in row.completions)
    missing = [key for key in wanted if key not in sums]
    if missing:
        nothing = (Message("assistant", ""),)
        scored_B = score([Demonstration("", nothing, nothing, *key) for key in missing])[0]
        sums |= dict(zip(missing, scored_B.tolist(), strict=True))
    return torch.tensor(
        [[sums[row.prompt_token_ids, tokens] for tokens in row.completions] for row in rows]
    ).T.contiguous()


def win_rates(rows: Sequence[TrainRow]) -> Tensor:
    """Win rates of chosen and rejected, shape (2, B). DataError names the first row that has none."""
    rates_2: tuple[array[float], array[float]] = (array("f"), array("f"))
    for row in rows:
        if not isinstance(row, PreferencePair) or row.chosen_win_rate is None or row.rejected_win_rate is None:
            raise DataError(
                f"the pair of prompt {row.prompt_id} has no win rates, which loss_type sppo reads. Make pairs with "
                "pairs.kind: win_rates, or say loss_type: sppo_hard"
            )
        rates_2[0].append(row.chosen_win_rate)
        rates_2[1].append(row.rejected_win_rate)
    return torch.stack([torch.tensor(rates) for rates in rates_2])
