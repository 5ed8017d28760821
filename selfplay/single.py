"""The stages of a round one by one, over files: what a cluster user runs as separate jobs.

With the same recipe, round and model each writes the same bytes as `iterate` does, and holds as little: records are read from
their shards when they are asked for. A folder that holds the work of other inputs is refused, never reused.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.chat import Chat
from selfplay.errors import DataError, RecipeError
from selfplay.judges import make_judge
from selfplay.lazy_prompts import json_list
from selfplay.lock import locked
from selfplay.models import load_chat, named_model, open_generator, prompt_room, resolve_auto
from selfplay.parts import note_drops, open_judge_model
from selfplay.progress import Reporter
from selfplay.protocols import Judge, JudgeContext
from selfplay.recipe import Recipe, SourceView
from selfplay.recipe_judges import JudgeRecipe, LLMJudgeRecipe, asks_policy, judges_in
from selfplay.recipe_values import optional_at_round
from selfplay.records import Records
from selfplay.run import report_swept
from selfplay.sources import load_pools, plain, record_pools
from selfplay.stages import Judging, judge_each, sample_groups, sampling_at, shards
from selfplay.train.four_bit import playable
from selfplay.trust import require_trust
from selfplay.types import Group, Judgement, Prompt, derive_seed

IDENTITY = "stage.json"


def read_groups(folder: str | Path) -> list[Group]:
    """The groups of a folder of shards, such as runs/NAME/round-000/groups."""
    return [group for path in read_shards(folder) for group in store.read_records(path, Group)]


def read_judgements(folder: str | Path) -> list[Judgement]:
    """The judgements of a folder of shards, such as runs/NAME/round-000/judgements, or of one file."""
    return [judgement for path in judgement_files(folder) for judgement in store.read_records(path, Judgement)]


def judgement_files(folder: str | Path) -> list[Path]:
    """The files that these are read from."""
    return [Path(folder)] if Path(folder).is_file() else read_shards(folder)


def read_shards(folder: str | Path) -> list[Path]:
    """The finished shards of a folder, in order. DataError where there is none."""
    found = shards(Path(folder))
    if not found:
        raise DataError(f"{folder}: no .jsonl shards in this folder; give one that generate, judge or a run wrote")
    return found


def source_shards(recipe: Recipe, folder: Path, round: int) -> dict[str, list[Path]]:
    """The finished shards of each source, by its name, which is that of their folder; none of a source that this round deals
    no prompt. DataError where any other has none.
    """
    return {
        name: [] if optional_at_round(view.prompts.num_prompts, round) == 0 else read_shards(folder / name)
        for name, view in recipe.by_source.items()
    }


@contextmanager
def claimed(out: Path, identity: dict[str, Any], report: Reporter) -> Iterator[None]:
    """Holds `out` for one stage with these inputs. RecipeError where it holds the work of others."""
    identity = json.loads(json.dumps(identity))
    with locked(out):
        path = out / IDENTITY
        old = store.read_json(path) if path.exists() else identity
        keys = [key for key in {**old, **identity} if old.get(key) != identity.get(key)]
        if keys:
            changed = [f"{key}: {old.get(key)} -> {identity.get(key)}" for key in keys]
            raise RecipeError(
                f"{out} holds the work of other inputs; take a new --out. They differ in:\n  " + "\n  ".join(changed)
            )
        if not path.exists():
            store.write_json(path, identity)
        report_swept(out, report)
        yield


def generate(recipe: Recipe, model: str, out: Path, *, round: int, report: Reporter) -> dict[str, Sequence[Group]]:
    """The completions of a round's prompts under a model, by source, as shards in `out`."""
    recipe, folder = resolve_auto(recipe), named_model(recipe, model)
    chat = load_chat(str(folder), recipe.chat)
    pools, sources = load_pools(recipe, chat=chat, room=prompt_room(recipe, folder)), recipe.by_source
    prompts = {name: pools[name].deal(view.prompts, round) for name, view in sources.items()}
    sampling = sampling_at(recipe.generator, round, seed=derive_seed(recipe.seed, round, "sample"))
    gold = any(view.pairs.needs_gold for view in sources.values())
    identity = {
        "stage": "generate",
        "round": round,
        "model": store.weights_digest(folder),
        "chat": text_digest(chat.template_digest_text),
        "prompts": prompts_digest(prompts),
        "sampling": asdict(sampling),
        "generator": engine_identity(recipe),
        "gold": gold,
    }
    if recipe.train.lora is not None and recipe.train.lora.load_in_4bit:
        identity["load_in_4bit"] = True
    seed = derive_seed(recipe.seed, round, "engine")
    groups: dict[str, Sequence[Group]] = {}
    with claimed(out, identity, report):
        note_drops(pools, report)
        record_pools(pools, out)
        start = playable(folder, out, recipe.train)
        with open_generator(recipe.generator, start, chat, seed=seed, encode_gold=gold) as generator:
            for name, dealt in prompts.items():
                label = f"round {round}{name and f', {name}'}, sampling"
                groups[name] = sample_groups(generator, dealt, sampling, out / name, report, label)
    return groups


def prompts_digest(prompts: Mapping[str, Sequence[Prompt]]) -> Any:
    """SHA-256 of the ids, gold answers and checks of each source's prompts."""
    found = {}
    for name, own in prompts.items():
        digest = hashlib.sha256()  # of what json.dumps of all of them would give
        for piece in json_list([p.id, p.gold, p.checks] for p in own):
            digest.update(piece)
        found[name] = digest.hexdigest()
    return plain(found)


def engine_identity(recipe: Recipe) -> dict[str, Any]:
    """What of the generator decides which completions, or verdicts, are drawn, beside the sampling."""
    return recipe.generator.model_dump(mode="json", include={"kind", "dtype", "max_model_len", "engine_args"})


def text_digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def judge(
    recipe: Recipe, groups: Path, out: Path, *, model: str | None, round: int, allow_code: bool, report: Reporter
) -> dict[str, Sequence[Judgement]]:
    """The judge's scores of the groups in a folder, by source, as shards in `out`. `model` is the policy,
    for a judge that is one.
    """
    sources = recipe.by_source
    judged = {n: paths for n, paths in source_shards(recipe, groups, round).items() if sources[n].judge is not None}
    digests = {name: [store.file_digest(path) for path in paths] for name, paths in judged.items()}
    inputs = {"stage": "judge", "round": round, "groups": plain(digests)}
    found = {name: Records(Group, paths) for name, paths in judged.items()}
    return judge_here(recipe, found, out, inputs, model=model, round=round, allow_code=allow_code, report=report)


def judge_here(
    recipe: Recipe,
    groups: Mapping[str, Sequence[Group]],
    out: Path,
    inputs: dict[str, Any],
    *,
    model: str | None,
    round: int,
    allow_code: bool,
    report: Reporter,
    trusted: bool = False,
) -> dict[str, Sequence[Judgement]]:
    """The judges' scores of the groups of each source, as shards in `out`; `inputs` says whose work that folder holds. A reward
    model that isn't shown to beat a coin is refused, unless it is `trusted`.
    """
    asked = {name: view.judge for name, view in recipe.by_source.items() if view.judge is not None}
    if not asked:
        raise RecipeError("judge: the recipe has none")
    made: dict[str, Judge] = {}
    judges: dict[str, Judge] = {}

    def open_source(name: str, view: SourceView) -> None:
        if view.judge is not None:
            judges[name] = open_judge(recipe, view.judge, allow_code=allow_code, made=made)

    recipe.for_each(open_source)
    own = any(asks_policy(one) for one in asked.values())
    if own and model is None:
        raise RecipeError("judge.model is the policy itself: name it with --model")
    if not own and model is not None:
        raise RecipeError("--model names the policy, and this recipe's judge is not the policy: leave it out")
    identity = inputs | {"judge": plain({name: one.identity for name, one in judges.items()}), "model": None}
    if any(isinstance(one, LLMJudgeRecipe) for judge in asked.values() for one in judges_in(judge)):
        recipe = resolve_auto(recipe)
        identity["generator"] = engine_identity(recipe)
    seed = derive_seed(recipe.seed, round, "judge")
    parts = [
        Judging(one, groups[name], out / name, f"round {round}{name and f', {name}'}, judging")
        for name, one in judges.items()
    ]

    def trust() -> None:
        if not trusted:
            recipe.for_each(lambda name, view: require_trust("judge", view, judges.get(name), out, report))

    if not own or model is None:
        with claimed(out, identity, report):
            trust()
            return dict(zip(judges, judge_each(parts, JudgeContext(round, seed), report), strict=True))
    folder = named_model(recipe, model)
    chat, engine_seed = load_chat(str(folder), recipe.chat), derive_seed(recipe.seed, round, "engine")
    identity |= {"model": store.weights_digest(folder), "chat": text_digest(chat.template_digest_text)}
    with claimed(out, identity, report), open_generator(recipe.generator, folder, chat, seed=engine_seed) as generator:
        trust()
        return dict(zip(judges, judge_each(parts, JudgeContext(round, seed, generator), report), strict=True))


def open_judge(recipe: Recipe, asked: JudgeRecipe, *, allow_code: bool, made: dict[str, Judge] | None = None) -> Judge:
    """The judge that a recipe names; one with a model of its own opens it on the recipe's kind of engine. `made` keeps those
    that were made with it: equal ones are one.
    """

    def open_model(folder: Path, chat: Chat) -> Any:
        return open_judge_model(resolve_auto(recipe), folder, chat)

    return make_judge(asked, allow_code=allow_code, open_model=open_model, made=made)
