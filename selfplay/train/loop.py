"""The training of one round: reference pass, checks, optimizer steps, the new policy.

One copy of the weights serves twice: before its first step the policy is the reference, so its logps come from a pass
without gradients over packs, and from disk ever after. A job that was stopped goes on from its last checkpoint.
"""

import collections
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from selfplay import faults, store
from selfplay.errors import RecipeError, Stopped, TrainerError
from selfplay.recipe_train import reads
from selfplay.train.budget import pack_tokens, with_pack_length
from selfplay.train.checkpoint import Checkpoints, Due, Found, processes_line
from selfplay.train.determinism import full_determinism
from selfplay.train.memory import SmallerPacksError
from selfplay.train.model import default_device, load_model, save_policy
from selfplay.train.optim import carry_optimizer, make_optimizer, make_schedule, save_optimizer
from selfplay.train.place import place
from selfplay.train.progress import SILENT, Progress
from selfplay.train.reference import audit_engine
from selfplay.train.reference_pass import find_reference, win_rates
from selfplay.train.rows import read_rows
from selfplay.train.settings import TrainJob, TrainSettings
from selfplay.train.smaller import leave_cap, left_cap
from selfplay.train.steps import Plan, schedule_steps
from selfplay.train.stop import stopping
from selfplay.train.trainer import Trainer
from selfplay.train.world import World
from selfplay.types import Group, TrainRow


def run_training(job: TrainJob, progress: Progress = SILENT, world: World | None = None) -> dict[str, Any]:
    """Trains `job.policy` on its pairs and writes, under `job.out`: reference.safetensors (and reference/, where it is an
    ema) if a loss reads a reference, train/steps.jsonl, train/result.json and policy/. Returns the result.

    While it trains it keeps checkpoints in train/checkpoints/, and goes on from the last one that it finds. Raises
    NoPairsError, NonFiniteError and AuditError before a policy is written; Stopped at the step boundary after a request.
    `world` are the processes that do this together: each calls this with the same job. None where this one is alone.
    """
    try:
        with full_determinism(job.settings.full_determinism):
            return _train(job, progress, world or World(default_device()))
    except torch.OutOfMemoryError as error:
        raise RecipeError(
            f"the device has too little memory for one pair, or for the optimizer ({error}). Set "
            "train.gradient_checkpointing: true, lower train.max_length, or take train.optim: adamw_bnb_8bit"
        ) from error
    except SmallerPacksError as error:
        rank, cap = world.rank if world is not None else 0, error.max_pack_tokens
        leave_cap(Path(job.out), rank, cap)
        raise TrainerError(
            f"process {rank} of those that train ran out of memory, and packs hold at most {cap} tokens from here on; the same "
            "command goes on from the last checkpoint"
        ) from error


def _train(job: TrainJob, progress: Progress, world: World) -> dict[str, Any]:
    settings, out = job.settings, Path(job.out)
    pairs, num_too_long = read_rows(job)
    checkpoints = Checkpoints(out / "train" / "checkpoints", job, note=progress.note, world=world)
    found = checkpoints.newest()
    torch.manual_seed(job.seed)
    steps = Plan(pairs, settings, seed=job.seed)
    result: dict[str, Any] = found.result if found is not None else {"num_too_long": num_too_long, "out_of_memory": []}
    model, trainer = _prepare(job, pairs, schedule_steps(pairs, job, steps), found, result, progress, world)
    rows = found.rows if found is not None else []
    _run_steps(job, trainer, pairs, steps, rows, result, checkpoints, progress)
    result |= _summary(rows, len(pairs), settings) | {"processes": processes_line(world)}
    masters, template = trainer.masters, job.chat_template
    if job.keep_optimizer_state:
        path = out / "train" / "optimizer.safetensors"
        save_optimizer(trainer.optimizer, masters, path, settings.optim, world=world)
    if world.is_first:
        store.write_json(out / "train" / "result.json", result)
        save_policy(model, masters, job.policy, out / "policy", dtype=settings.save_dtype, chat_template=template)
        store.remove_folder(checkpoints.folder)
    else:
        collections.deque(masters.whole(), maxlen=0)  # its part in what the first one saves
    world.wait()
    return result


def _prepare(
    job: TrainJob,
    pairs: Sequence[TrainRow],
    schedule_length: int,
    found: Found | None,
    result: dict[str, Any],
    progress: Progress,
    world: World,
) -> tuple[Any, Trainer]:
    """(model, trainer), at the step of the checkpoint that was found. Fills `result` with what is measured at the start.
    `schedule_length` is in steps.
    """
    settings = job.settings
    load = partial(
        load_model,
        job.policy,
        lora=settings.lora,
        load_in_4bit=settings.load_in_4bit,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    placed = place(load, world, bf16=settings.bf16, check=found is None)
    module, masters = placed.module, placed.masters
    if found is None:
        result["shared_prompts"], result["probe_difference"] = placed.shared, placed.difference
        result |= audit_engine(module, _groups(job), bound=settings.max_audit_difference, world=world) or {}
    shared: bool = result["shared_prompts"]
    # what the recipe leaves to the model and the machine
    settings = with_pack_length(settings, module.model)
    job = replace(job, settings=settings)
    if found is None:
        budget = Path(job.pack_budget or Path(job.out) / "pack_budget.json")
        cap = pack_tokens(budget, module, masters, settings, shared=shared, world=world)
        result["max_pack_tokens"] = cap
    else:
        cap = found.max_pack_tokens
    left = world.first(lambda: left_cap(Path(job.out)))
    if left is not None and left < cap:
        cap = left
        result["out_of_memory"].append({"step": found.step if found is not None else 0, "max_pack_tokens": cap})

    def halved(smaller: int) -> None:
        nonlocal cap
        cap = smaller
        result["out_of_memory"].append({"step": 0, "max_pack_tokens": cap})
        progress.note(f"training: out of memory before the first step; from here on packs hold at most {cap} tokens")

    # before a checkpoint is loaded: the weights may themselves be the reference
    reference = find_reference(
        job, pairs, module, masters, max_pack_tokens=cap, shared=shared, world=world, halved=halved, progress=progress
    )
    optimizer = make_optimizer(masters, settings)
    if job.optimizer_state is not None and found is None:
        carry_optimizer(optimizer, masters, Path(job.optimizer_state), settings.optim)
    if found is not None:
        found.restore(masters, optimizer)
    schedule = make_schedule(optimizer, job, schedule_length, done=found.step if found is not None else 0)
    trainer = Trainer(
        module,
        masters,
        optimizer,
        schedule,
        world,
        reference,
        win_rates(pairs) if "win_rates" in reads(settings.loss_type) else None,
        settings,
        shared,
        cap,
        result["out_of_memory"],
        progress.note,
    )
    return module.model, trainer


def _run_steps(
    job: TrainJob,
    trainer: Trainer,
    pairs: Sequence[TrainRow],
    steps: Sequence[tuple[float, list[int]]],
    rows: list[dict[str, Any]],
    result: dict[str, Any],
    checkpoints: Checkpoints,
    progress: Progress,
) -> None:
    """The steps after those in `rows`, which it adds to, in train/steps.jsonl as well. Stopped where the user asked."""
    path, world = Path(job.out) / "train" / "steps.jsonl", trainer.world
    if world.is_first:
        store.rewrite(path, store.json_lines(rows))
    due = Due(job.settings.save_steps)
    with stopping() as stop:
        for number in range(len(rows) + 1, len(steps) + 1):
            epoch, indices = steps[number - 1]
            rate = trainer.schedule.get_last_lr()[0]
            figures = trainer.step(pairs, indices, number=number, check_zero=number == 1)
            rows.append({"step": number, "epoch": epoch, "learning_rate": rate, **figures})
            if world.is_first:
                store.append_json_line(path, rows[-1])
            progress("train", number, len(steps))
            faults.hit("train.boundary")
            # one look, since a signal may come between two; whoever is asked, all stop, and the first one's clock counts
            asked, wanted = world.most(stop.asked, world.is_first and number < len(steps) and due.after(number))
            if asked or wanted:
                started = time.monotonic()
                cap = trainer.max_pack_tokens
                folder = checkpoints.save(
                    trainer.masters, trainer.optimizer, max_pack_tokens=cap, result=result, rows=rows
                )
                due.written(started)
            if asked:
                raise Stopped(
                    f"stopped after training step {number} of {len(steps)}; what is done is in {folder}. "
                    "The same command goes on from there"
                )
    if world.most(stop.asked)[0]:  # in the moment after the last look
        raise Stopped("stopped after the last training step. The same command goes on from the last checkpoint")


def _groups(job: TrainJob) -> list[Group]:
    return [g for path in job.groups[:1] for g in store.read_records(Path(path), Group)]


def _summary(rows: list[dict[str, Any]], num_pairs: int, settings: TrainSettings) -> dict[str, Any]:
    last = rows[-1]
    final = [row for row in rows if row["epoch"] > last["epoch"] - 1]  # the last epoch
    in_final = sum(row["num_pairs"] for row in final)
    return {
        "num_pairs": num_pairs,
        "num_steps": len(rows),
        "num_tokens": sum(row["num_tokens"] for row in rows),
        "loss_first": rows[0]["loss"],
        "loss_last": last["loss"],
        # no rewards where the loss is sft alone
        **{
            key: sum(r[key] * r["num_pairs"] for r in final) / in_final if key in last else None
            for key in ("rewards/accuracies", "rewards/margins")
        },
        "audit/zero_logratio": rows[0].get("audit/zero_logratio"),
        "settings": asdict(settings),
    }
