"""The stages of a round. Each reads the records to its left and writes the records to its right; where its files are
already there it reads them, so going on after a stop is no feature of its own.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from selfplay import store
from selfplay.errors import GeneratorError, StorageError
from selfplay.generators.generator import EngineGenerator
from selfplay.judges.against import Against
from selfplay.judges.combine import Combine, Combined
from selfplay.judges.contract import judge_checked
from selfplay.judges.journal import USAGE
from selfplay.judges.llm import LLMJudge
from selfplay.judges.reward_model import RewardModelJudge
from selfplay.progress import Advance, Reporter
from selfplay.protocols import (
    CountingJudge,
    Generator,
    Judge,
    JudgeContext,
    StagedJudge,
)
from selfplay.recipe import GeneratorRecipe
from selfplay.recipe_values import at_round
from selfplay.records import Records
from selfplay.types import Group, Judgement, Prompt, Sampling

SHARD_PROMPTS = 256
R = TypeVar("R")


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


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> None:
    """The prompts of a round; on a resumed run they must be those already there."""
    if not path.exists():
        store.write_records(path, prompts, Prompt)
    elif any(a is None or b is None or a.id != b.id for a, b in zip_longest(store.each_record(path, Prompt), prompts)):
        raise StorageError(f"{path}: holds other prompts than the recipe deals now; take a new --out folder")


def sample_groups(
    generator: Generator, prompts: Sequence[Prompt], sampling: Sampling, folder: Path, report: Reporter, name: str
) -> Sequence[Group]:
    """One group per prompt, in the prompts' order, in shards of a fixed composition. As many shards are drawn together as the
    generator has replicas, each of which then has a batch of its own; where one of those is missing, all are drawn again.
    """
    groups, count = Records(Group), sampling.num_completions
    together = SHARD_PROMPTS * _replicas(generator)
    with contextlib.ExitStack() as stack:
        advance = None
        for first in range(0, len(prompts), together):
            chunk = tuple(prompts[first : first + together])
            parts = {n: shard_path(folder, (first + n) // SHARD_PROMPTS) for n in range(0, len(chunk), SHARD_PROMPTS)}
            missing = [n for n, path in parts.items() if not path.exists()]
            if missing:
                advance = advance or stack.enter_context(
                    report.stage(name, len(prompts) * count, "completions", done=first * count)
                )
                found = _generate(generator, chunk, sampling, advance, first)
                for n in missing:
                    store.write_records(parts[n], found[n : n + SHARD_PROMPTS], Group)
            for n, path in parts.items():
                groups.add(path)
                if [g.prompt.id for g in groups[first + n :]] != [p.id for p in chunk[n : n + SHARD_PROMPTS]]:
                    raise StorageError(f"{path}: holds the groups of other prompts; delete it to sample them anew")
    return groups


def _replicas(generator: Generator) -> int:
    return generator.settings.data_parallel_size if isinstance(generator, EngineGenerator) else 1


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.jsonl"


def shards(folder: Path) -> list[Path]:
    """The finished shards of a folder, in order; drops.jsonl, which may lie beside them, is none."""
    return sorted(folder.glob("[0-9]*.jsonl"))


def read_shards(folder: Path, kind: type[R]) -> Sequence[R]:
    """The records of all shards of a folder."""
    return Records(kind, shards(folder))


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
) -> Sequence[Judgement]:
    """One checked judgement per group, in shards like the groups'."""
    judgements = Records(Judgement)
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
            judgements.add(path)
            if [j.prompt_id for j in judgements[number:]] != [g.prompt.id for g in chunk]:
                raise StorageError(f"{path}: holds the judgements of other prompts; delete it to judge anew")
    return judgements


def _verdicts_of(judge: Judge, groups: Sequence[Group]) -> int | None:
    return judge.count_verdicts(groups) if isinstance(judge, CountingJudge) else None


def _counted_from(advance: Advance, before: int) -> Advance:
    return lambda done: advance(before + done)


@dataclass(frozen=True, slots=True)
class Judging:
    """Groups that a judge is asked about, the folder of its judgements, what to call that, and what to do with them while a
    judge with a model of its own still has it. `against` are groups whose completions theirs are compared with, where it is a
    judge that compares.
    """

    judge: Judge
    groups: Sequence[Group]
    folder: Path
    name: str
    then: Callable[[Sequence[Judgement]], None] | None = None
    against: Sequence[Group] | None = None


def judge_each(
    asked: Sequence[Judging], context: JudgeContext, report: Reporter, *, seconds: tuple[Path, str] | None = None
) -> list[Sequence[Judgement]]:
    """The judgements of each. The members of a combination judge like others, in folders of their own. A judge that is asked
    several times is opened once; those with a model of their own come last, one after the other. `seconds` names the folder
    and the stage that the time counts for.
    """
    single = [part for one in asked for part in _parts(one)]
    found: dict[Path, Sequence[Judgement]] = {}

    def judged(judge: Judge, one: Judging) -> None:
        with timed(*seconds) if seconds is not None else contextlib.nullcontext():
            asked = judge if one.against is None or isinstance(judge, Combined) else Against(judge, one.against)
            found[one.folder] = judge_groups(asked, one.groups, context, one.folder, report, one.name)

    for judge in sorted({id(one.judge): one.judge for one in single}.values(), key=has_own_model):
        mine = [one for one in single if one.judge is judge]
        with room_for_judge(judge, context.generator):
            for one in mine:
                judged(judge, one)
            for one in mine:
                if one.then is not None:
                    one.then(found[one.folder])
    for one in asked:
        if isinstance(one.judge, Combine):
            judged(Combined(one.judge, [found[part.folder] for part in _parts(one)]), one)
            if one.then is not None:
                one.then(found[one.folder])
    return [found[one.folder] for one in asked]


def judge_beside(asked: Judging, context: JudgeContext, report: Reporter) -> Sequence[Judgement]:
    """The judgements of groups that a judge is asked about while it has the room for a stage's real ones."""
    if isinstance(asked.judge, Combine):
        (judged,) = judge_each([asked], context, report)
        return judged
    return judge_groups(asked.judge, asked.groups, context, asked.folder, report, asked.name)


def _parts(one: Judging) -> list[Judging]:
    if not isinstance(one.judge, Combine):
        return [one]
    return [
        Judging(
            member.judge, one.groups, member_folder(one.folder, n), f"{one.name}, {member.name}", against=one.against
        )
        for n, member in enumerate(one.judge.members)
    ]


def member_folder(folder: Path, number: int) -> Path:
    """Where the judgements of one of several judges lie, beside their combination in `folder`."""
    return folder / f"member-{number}"  # no source is named with a hyphen


def usage_of(*judgements: Path) -> dict[str, Any] | None:
    """What the judging of these folders together, those of sources and of several judges inside them, has asked of
    endpoints: calls, tokens, cost. None where none was asked; the cost is None where one of them has none.
    """
    found = [store.read_json(path) for folder in judgements for path in sorted(folder.rglob(USAGE))]
    if not found:
        return None
    counts = {key: [usage.get(key) for usage in found] for key in found[0]}  # an older version counted less
    return {key: None if None in values else sum(values) for key, values in counts.items()}


def panel_judgements(folder: Path, source: str = "") -> list[Path]:
    """Where the judgements of the panel of a round, or of the initial policy, lie; each source has a folder of its name."""
    return sorted((folder / "heldout" / source).rglob("*-judgements"))


def has_own_model(judge: Judge) -> bool:
    """Whether the judge loads a model of its own, for which the policy's engine must make room."""
    return isinstance(judge, RewardModelJudge) or (isinstance(judge, LLMJudge) and judge.model != "policy")


@contextlib.contextmanager
def room_for_judge(judge: Judge, generator: Generator | None) -> Iterator[None]:
    """Where the judge has a model of its own, gives it the machine: the policy's engine is freed before, the judge's after."""
    if has_own_model(judge):
        assert isinstance(judge, LLMJudge | RewardModelJudge)
        if isinstance(generator, EngineGenerator):
            generator.close()
        with judge:
            yield
    else:
        yield


def greedy(sampling: Sampling) -> Sampling:
    """One completion of the highest probability at every token."""
    return replace(sampling, num_completions=1, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
