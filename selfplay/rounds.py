"""Rounds. READ THIS FIRST.

    prompts ──> groups ──> judgements ──> pairs ──> policy ──┐
      ^        generator     judge       selector    train   │
      └──────────────── next round starts from it <──────────┘

`play_round` reads like the picture. Every stage writes files and reads them where they exist, so `iterate` on a run directory
goes on where it stopped.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from selfplay import metrics, store
from selfplay.accounting import all_counts, source_figures
from selfplay.auditing import asked_folders, audit_judge, read_evidence, read_members
from selfplay.changes import ADVICE
from selfplay.errors import GateError, Stopped
from selfplay.filters import make_filters
from selfplay.lock import locked
from selfplay.models import engine_ahead, open_generator
from selfplay.pairing import Pairing, make_pairs, read_selections
from selfplay.pairs import Selection, make_selector
from selfplay.parts import Source, own_parts
from selfplay.progress import SILENT, Reporter
from selfplay.protocols import FilterContext, Generator, Judge, JudgeContext, PairFilter, PairSelector
from selfplay.recipe import Recipe
from selfplay.recipe_file import load_recipe
from selfplay.records import Records
from selfplay.run import Round, Run, report_swept, start_run
from selfplay.sources import plain
from selfplay.stages import (
    Judging,
    judge_each,
    panel_judgements,
    read_shards,
    sample_groups,
    sampling_at,
    shards,
    timed,
    usage_of,
    write_prompts,
)
from selfplay.train.devices import Devices
from selfplay.train.settings import TrainJob, schedule_span, settings_at
from selfplay.types import Group, Judgement, PreferencePair, Prompt
from selfplay.versions import versions


def play_round(round: Round) -> Path:
    """The policy of one round; reads whatever an earlier, stopped call left finished."""
    run, start = round.run, round.start
    gold = any(source.selector is not None or source.recipe.pairs.needs_gold for source in run.sources)
    if round.index:
        store.check_folder(start)  # a damaged policy would sample and train as if nothing were wrong
    with open_generator(
        run.recipe.generator, start, run.chat, seed=round.seed("engine"), encode_gold=gold
    ) as generator:
        sample_panel(round, generator)
        prompts = draw_prompts(round)
        groups = draw_groups(round, generator, prompts)
        judge_panel(round, generator)
        judgements = judge(round, generator, groups)
    finish_panel(round)
    selections = pair(round, groups, judgements)
    return train_dpo(round, selections)


def sample_panel(round: Round, generator: Generator) -> None:
    """The held-out completions of the policy that the round starts from."""
    between = 0 < round.index < round.run.recipe.rounds
    round.run.panel.sample(generator, round.panel_folder, round=round.index - 1, between=between)


def judge_panel(round: Round, generator: Generator) -> None:
    """Their scores."""
    between = 0 < round.index < round.run.recipe.rounds
    round.run.panel.judge_all(generator, round.panel_folder, round=round.index - 1, between=between)


def draw_prompts(round: Round) -> Mapping[str, Sequence[Prompt]]:
    """The prompts that this round is dealt, by source: one, of no name, where the recipe has no `sources`."""
    prompts = {source.name: source.pool.deal(source.recipe.prompts, round.index) for source in round.run.sources}
    write_prompts(round.folder / "prompts.jsonl", chain.from_iterable(prompts.values()))
    return prompts


def draw_groups(
    round: Round, generator: Generator, prompts: Mapping[str, Sequence[Prompt]]
) -> dict[str, Sequence[Group]]:
    """The completions of the round's prompts under the policy that it starts from; each source has its own folder."""
    sampling = sampling_at(round.run.recipe.generator, round.index, seed=round.seed("sample"))
    groups = {}
    with timed(round.folder, "sample"):
        for name, dealt in prompts.items():
            said = f"{round.label(name)}, sampling {sampling.num_completions} completions each"
            folder = round.folder / "groups" / name
            groups[name] = sample_groups(generator, dealt, sampling, folder, round.run.report, said)
    return groups


def judge(round: Round, generator: Generator, groups: Mapping[str, Sequence[Group]]) -> dict[str, Sequence[Judgement]]:
    """The scores that each source's judge gives; a source without a judge is not among them."""
    context = JudgeContext(round.index, round.seed("judge"), generator)
    asked = {
        source.name: Judging(
            source.judge,
            groups[source.name],
            round.folder / "judgements" / source.name,
            f"{round.label(source.name)}, judging",
            partial(audit_judge, round, source, groups[source.name], context),
        )
        for source in round.run.sources
        if source.judge is not None
    }
    found = judge_each(list(asked.values()), context, round.run.report, seconds=(round.folder, "judge"))
    return dict(zip(asked, found, strict=True))


def pair(
    round: Round, groups: Mapping[str, Sequence[Group]], judgements: Mapping[str, Sequence[Judgement]]
) -> dict[str, Selection]:
    """The round's preference pairs, each source's by its own selector and filters."""
    pairings = {
        source.name: pairing(round, source, groups[source.name], judgements.get(source.name))
        for source in round.run.sources
    }
    selections, sources = make_pairs(pairings, round.folder), {source.name: source for source in round.run.sources}
    for name, selection in selections.items():
        evidence = read_evidence(round, sources[name])
        figures = source_figures(name, groups[name], judgements.get(name), selection, evidence, round=round.index)
        for alarm in figures["audit"]["alarms"]:
            round.run.report.note(f"{round.label(name)}: ALARM: {alarm}")
    return selections


def pairing(round: Round, source: Source, groups: Sequence[Group], judgements: Sequence[Judgement] | None) -> Pairing:
    """What the pairs of one source are made of."""
    run, recipe, seed = round.run, source.recipe.pairs, round.seed("pair")

    def previous(index: int) -> list[PreferencePair]:
        return [pair for pair in run.round(index).own_pairs if pair.source == source.name]

    filters = source.filters if source.filters is not None else make_filters(recipe, round.index, source.programs)
    return Pairing(
        source.selector or make_selector(recipe, round.index, seed),
        groups,
        judgements,
        filters=filters,
        context=FilterContext(round.index, seed, previous),
        judge=source.judge.identity if source.judge is not None else "",
        max_unparsed=recipe.unparsed_bound,
        members=read_members(round, source),
    )


def train_dpo(round: Round, selections: Mapping[str, Selection]) -> Path:
    """The policy after DPO on the round's pairs, the reference being what the recipe says."""
    if round.policy.exists():
        store.remove_folder(round.folder / "train" / "checkpoints")  # a kill may have come between the two
        return round.policy
    from selfplay.train.launch import launch

    for name, selection in selections.items():
        count = len(selection.pairs)
        round.run.report.note(f"{round.label(name)}: {count} pairs from {selection.num_prompts} prompts")
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
        groups=tuple(
            str(path) for source in round.run.sources for path in shards(round.folder / "groups" / source.name)
        ),
        optimizer_state=str(before.folder / "train" / "optimizer.safetensors") if carried and round.index else None,
        keep_optimizer_state=carried,
        pack_budget=str(round.run.folder / "pack_budget.json"),
        first_step=first_step,
        total_steps=total_steps,
        schedule_epochs=recipe.schedule_epochs,
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
    run, folder = round.run, round.folder
    training, sources = store.read_json(folder / "train" / "result.json"), figures_by_source(round)
    counts = all_counts({name: figures["counts"] for name, figures in sources.items()})
    assert len(Records(Prompt, [folder / "prompts.jsonl"])) == counts["num_prompts"]
    several = "" not in sources
    store.write_json(
        path,
        {
            "round": round.index,
            "init": store.weights_digest(round.start),
            "reference": training_reference(round),
            "policy": store.weights_digest(round.policy),
            "judge": plain({one.name: one.judge.identity if one.judge is not None else None for one in run.sources}),
            "counts": {**counts, "num_pairs_too_long": training["num_too_long"]},
            "audit": None if several else sources[""]["audit"],  # each judge has its own
            "judge_usage": usage_of(*asked_folders(round), *panel_judgements(folder)),
            **({"sources": sources} if several else {}),
            "train": training,
            "seconds": store.read_json(folder / "seconds.json"),
            "versions": versions(),
        },
    )
    metrics.write_metrics(run.folder)


def figures_by_source(round: Round) -> dict[str, dict[str, Any]]:
    """Where the rows of each source went, from the round's files."""
    folder, run = round.folder, round.run
    groups = {source.name: read_shards(folder / "groups" / source.name, Group) for source in run.sources}
    selections = read_selections(folder, groups)
    found = {}
    for source in run.sources:
        name, judged = source.name, read_shards(folder / "judgements" / source.name, Judgement)
        judgements = judged if source.judge is not None else None
        evidence = read_evidence(round, source)
        figures = source_figures(name, groups[name], judgements, selections[name], evidence, round=round.index)
        figures["audit"] |= {"calibration": list(source.calibration) or None}
        usage = usage_of(*asked_folders(round, name), *panel_judgements(folder, name))
        found[name] = figures | {"judge_usage": usage}
    return found


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
    judge: Judge | Mapping[str, Judge] | None = None,
    selector: PairSelector | Mapping[str, PairSelector] | None = None,
    filters: Sequence[PairFilter] | Mapping[str, Sequence[PairFilter]] | None = None,
    allow_code: bool = False,
    devices: Devices | None = None,
    report: Reporter = SILENT,
) -> dict[str, Any]:
    """Plays all rounds of a recipe in the run directory `out`, or what is left of them, and returns `status(out)`.

    `judge` stands in for the recipe's judge, `selector` for its pairing, `filters` for its `pairs.filters`. Where the recipe
    has `sources`, each is a mapping that names whose it stands in for: judge={"open": my_judge}. `devices` are
    those that train together, as `selfplay.train.devices.read_devices` gives them; None for one. Raises SelfplayError's
    subclasses; Stopped on Ctrl-C.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    folder = Path(out)
    with locked(folder):
        try:
            report_swept(folder, report)
            own = own_parts(loaded, judge, selector, filters)
            # a run that is continued may have sampled already
            with engine_ahead(loaded.generator, wanted=not (folder / "recipe.yaml").exists()):
                run = start_run(loaded, folder, own=own, allow_code=allow_code, devices=devices, report=report)
                for index in range(run.recipe.rounds):
                    if not (run.round(index).folder / "round.json").exists():
                        play_round(run.round(index))
                play_last_panel(run)
        except GateError as error:
            raise type(error)(f"{error}\n{ADVICE.format(folder=folder)}") from error
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
