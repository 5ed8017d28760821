"""The stages of a round. Each reads the records to its left and writes the records to its right; where its files are
already there it reads them, so going on after a stop is no feature of its own.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.canaries import Canary, CanaryVerdict, verdicts_on
from selfplay.errors import GeneratorError, NoPairsError, StorageError
from selfplay.filters import FilterCounts, NamedFilter, apply_filters
from selfplay.generators.generator import EngineGenerator
from selfplay.judges.contract import check_unparsed, judge_checked
from selfplay.judges.journal import USAGE
from selfplay.judges.llm import LLMJudge
from selfplay.judges.reward_model import RewardModelJudge
from selfplay.pairs import Selection, select_pairs
from selfplay.progress import Advance, Reporter
from selfplay.protocols import (
    CountingJudge,
    FilterContext,
    Generator,
    Judge,
    JudgeContext,
    PairSelector,
    StagedJudge,
)
from selfplay.recipe import GeneratorRecipe
from selfplay.recipe_values import at_round
from selfplay.types import Drop, Group, Judgement, PreferencePair, Prompt, Sampling

SHARD_PROMPTS = 256
CANARIES = "verdicts.jsonl"


@contextlib.contextmanager
def timed(folder: Path, stage: str) -> Iterator[None]:
    """Adds the seconds of a stage to the folder's seconds.json; a stage that was stopped and continued counts both."""
    started = time.monotonic()
    try:
        yield
    finally:
        path = folder / "seconds.json"
        seconds = store.read_json(path) if path.exists() else {}
        seconds[stage] = round(seconds.get(stage, 0.0) + time.monotonic() - started, 2)
        store.rewrite(path, json.dumps(seconds, indent=2).encode())


def sampling_at(recipe: GeneratorRecipe, round: int, *, seed: int) -> Sampling:
    """How a round's completions are drawn."""
    return Sampling(
        num_completions=at_round(recipe.num_completions, round),
        temperature=at_round(recipe.temperature, round),
        top_p=at_round(recipe.top_p, round),
        top_k=at_round(recipe.top_k, round),
        min_p=at_round(recipe.min_p, round),
        max_tokens=at_round(recipe.max_tokens, round),
        stop=tuple(recipe.stop),
        seed=seed,
    )


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """The prompts of a round; on a resumed run they must be those already there."""
    if not path.exists():
        store.write_records(path, prompts, Prompt)
    elif [p.id for p in store.read_records(path, Prompt)] != [p.id for p in prompts]:
        raise StorageError(f"{path}: holds other prompts than the recipe deals now; take a new --out folder")


def sample_groups(
    generator: Generator, prompts: Sequence[Prompt], sampling: Sampling, folder: Path, report: Reporter, name: str
) -> list[Group]:
    """One group per prompt, in the prompts' order, in shards of a fixed composition."""
    groups: list[Group] = []
    with contextlib.ExitStack() as stack:
        advance = None
        for number in range(0, len(prompts), SHARD_PROMPTS):
            chunk = prompts[number : number + SHARD_PROMPTS]
            path = shard_path(folder, number // SHARD_PROMPTS)
            if not path.exists():
                count = sampling.num_completions
                advance = advance or stack.enter_context(
                    report.stage(name, len(prompts) * count, "completions", done=len(groups) * count)
                )
                store.write_records(path, _generate(generator, chunk, sampling, advance, len(groups)), Group)
            found = store.read_records(path, Group)
            if [g.prompt.id for g in found] != [p.id for p in chunk]:
                raise StorageError(f"{path}: holds the groups of other prompts; delete it to sample them anew")
            groups += found
    return groups


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.jsonl"


def shards(folder: Path) -> list[Path]:
    """The finished shards of a folder, in order; drops.jsonl, which may lie beside them, is none."""
    return sorted(folder.glob("[0-9]*.jsonl"))


def _generate(
    generator: Generator, prompts: Sequence[Prompt], sampling: Sampling, advance: Advance, before: int
) -> list[Group]:
    found: dict[str, Group] = {}
    wanted = {p.id for p in prompts}
    done = before * sampling.num_completions
    for group in generator.generate(prompts, sampling, progress=lambda completions, _: advance(done + completions)):
        id, count = group.prompt.id, len(group.completions)
        if id not in wanted or id in found:
            raise GeneratorError(f"the generator returned prompt {id} {'twice' if id in found else 'unasked'}")
        if count != sampling.num_completions:
            raise GeneratorError(f"prompt {id}: {count} completions instead of {sampling.num_completions}")
        found[id] = group
    missing = [p.id for p in prompts if p.id not in found]
    if missing:
        raise GeneratorError(f"the generator returned nothing for {len(missing)} prompts: {', '.join(missing[:5])}")
    advance(done + len(prompts) * sampling.num_completions)
    return [found[p.id] for p in prompts]


def judge_groups(
    judge: Judge, groups: Sequence[Group], context: JudgeContext, folder: Path, report: Reporter, name: str
) -> list[Judgement]:
    """One checked judgement per group, in shards like the groups'."""
    judgements: list[Judgement] = []
    unit, done = "prompts" if _verdicts_of(judge, groups) is None else "verdicts", 0
    with contextlib.ExitStack() as stack:
        advance = None
        for number in range(0, len(groups), SHARD_PROMPTS):
            chunk = groups[number : number + SHARD_PROMPTS]
            path = shard_path(folder, number // SHARD_PROMPTS)
            count = _verdicts_of(judge, chunk)
            if not path.exists():
                if advance is None:
                    total = _verdicts_of(judge, groups)
                    advance = stack.enter_context(
                        report.stage(name, len(groups) if total is None else total, unit, done=done)
                    )
                    if isinstance(judge, StagedJudge):
                        stack.enter_context(judge.stage(folder, report.note))
                told = replace(context, progress=_counted_from(advance, done))
                store.write_records(path, judge_checked(judge, chunk, told), Judgement)
                advance(done + (len(chunk) if count is None else count))
            done += len(chunk) if count is None else count
            found = store.read_records(path, Judgement)
            if [j.prompt_id for j in found] != [g.prompt.id for g in chunk]:
                raise StorageError(f"{path}: holds the judgements of other prompts; delete it to judge anew")
            judgements += found
    return judgements


def judge_canaries(
    judge: Judge, canaries: Sequence[Canary], context: JudgeContext, folder: Path, report: Reporter, name: str
) -> None:
    """The judge's verdicts on canaries, in verdicts.jsonl of `folder`; see canaries.py. Nothing where there are none."""
    path = folder / CANARIES
    if canaries and not path.exists():
        judged = judge_groups(judge, [one.group for one in canaries], context, folder / "judgements", report, name)
        store.write_json_lines(path, [asdict(verdict) for verdict in verdicts_on(canaries, judged)])


def read_canaries(folder: Path) -> list[CanaryVerdict]:
    """What `judge_canaries` left in a folder; rounds without canaries have none."""
    path = folder / CANARIES
    return [CanaryVerdict(**row) for row in store.read_json_lines(path)] if path.exists() else []


def _verdicts_of(judge: Judge, groups: Sequence[Group]) -> int | None:
    return judge.count_verdicts(groups) if isinstance(judge, CountingJudge) else None


def _counted_from(advance: Advance, before: int) -> Advance:
    return lambda done: advance(before + done)


def usage_of(*judgements: Path) -> dict[str, Any] | None:
    """What the judging of these folders together has asked of an endpoint: calls, tokens, cost. None where none was asked;
    the cost is None where one of them has none.
    """
    found = [store.read_json(folder / USAGE) for folder in judgements if (folder / USAGE).exists()]
    if not found:
        return None
    counts = {key: [usage[key] for usage in found] for key in found[0]}
    return {key: None if None in values else sum(values) for key, values in counts.items()}


def panel_judgements(folder: Path) -> list[Path]:
    """Where the judgements of the panel of a round, or of the initial policy, lie."""
    return sorted((folder / "heldout").glob("*-judgements"))


@contextlib.contextmanager
def room_for_judge(judge: Judge | None, generator: Generator | None) -> Iterator[None]:
    """Where the judge has a model of its own, gives it the machine: the policy's engine is freed before, the judge's after."""
    if isinstance(judge, RewardModelJudge) or (isinstance(judge, LLMJudge) and judge.model != "policy"):
        if isinstance(generator, EngineGenerator):
            generator.close()
        with judge:
            yield
    else:
        yield


def make_pairs(
    selector: PairSelector,
    groups: Sequence[Group],
    judgements: Sequence[Judgement] | None,
    folder: Path,
    *,
    filters: Sequence[NamedFilter],
    context: FilterContext,
    judge: str,
    max_unparsed: float,
) -> Selection:
    """The pairs that a round trains on, in pairs.jsonl; drops.jsonl says why prompts gave none, unusable.json counts
    completions, filters.json what each filter took in and let go.

    UnparsedGateError and NoPairsError stop the round before training.
    """
    if (folder / "pairs.jsonl").exists():
        return read_selection(folder)
    if judgements is not None:
        check_unparsed(judgements, max_unparsed, judge_identity=judge)
    selected = select_pairs(selector, groups, judgements, round=context.round, judge=judge)
    _require_pairs(selected, len(groups), context.round)
    pairs, lost, counts = apply_filters(filters, selected.pairs, context)
    selection = Selection(tuple(pairs), (*selected.drops, *lost), selected.unusable, tuple(counts))
    own = selection.own_prompts(context.round)
    assert len(own) + len(selection.drops) == len(groups), "every group gives pairs or a reason"
    _require_pairs(selection, len(groups), context.round)
    store.write_records(folder / "drops.jsonl", selection.drops, Drop)
    store.write_json(folder / "unusable.json", selection.unusable)
    store.write_json(folder / "filters.json", [asdict(count) for count in selection.filters])
    store.write_records(folder / "pairs.jsonl", selection.pairs, PreferencePair)
    return selection


def read_selection(folder: Path) -> Selection:
    """What `make_pairs` left in the folder of a round."""
    pairs = store.read_records(folder / "pairs.jsonl", PreferencePair)
    drops = store.read_records(folder / "drops.jsonl", Drop)
    path = folder / "filters.json"
    found = store.read_json(path) if path.exists() else []  # rounds from before there were filters have none
    counts = [FilterCounts(**count) for count in found]
    return Selection(tuple(pairs), tuple(drops), store.read_json(folder / "unusable.json"), tuple(counts))


def _require_pairs(selection: Selection, num_prompts: int, round: int) -> None:
    """NoPairsError where no pair of the round itself is left: training on earlier rounds' alone is not what was asked."""
    if selection.own_prompts(round):
        return
    reasons = sorted({drop.reason for drop in selection.drops})
    raise NoPairsError(
        f"round {round}: none of {num_prompts} prompts gave a pair ({'; '.join(reasons)}). The policy is unchanged. "
        "Sample more completions, raise temperature or max_tokens, or look at the judge's scores and at pairs.filters"
    )


def greedy(sampling: Sampling) -> Sampling:
    """One completion of the highest probability at every token."""
    return replace(sampling, num_completions=1, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
