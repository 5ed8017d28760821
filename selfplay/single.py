"""The stages of a round one by one, over files: what a cluster user runs as separate jobs.

With the same recipe, round and model each writes the same bytes as `iterate` does. A folder that holds the work of other
inputs is refused, never reused.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.chat import Chat
from selfplay.errors import DataError, RecipeError, StorageError
from selfplay.filters import load_programs, make_filters
from selfplay.judges import make_judge
from selfplay.lazy_prompts import json_list
from selfplay.models import load_chat, local_model, open_generator, prompt_room, resolve_auto
from selfplay.pairing import Pairing, make_pairs
from selfplay.pairs import Selection, make_selector
from selfplay.parts import note_drops
from selfplay.progress import Reporter
from selfplay.protocols import FilterContext, Judge, JudgeContext
from selfplay.recipe import Recipe, SourceView
from selfplay.recipe_filters import MixPreviousRecipe, PythonFilterRecipe
from selfplay.recipe_judges import JudgeRecipe, LLMJudgeRecipe, asks_policy, judges_in
from selfplay.recipe_values import optional_at_round
from selfplay.run import report_swept
from selfplay.sources import load_pools, plain, record_pools
from selfplay.stages import Judging, judge_each, sample_groups, sampling_at, shards
from selfplay.train.four_bit import playable
from selfplay.trust import require_trust
from selfplay.types import Group, Judgement, PreferencePair, Prompt, derive_seed

IDENTITY = "stage.json"


def read_groups(folder: str | Path) -> list[Group]:
    """The groups of a folder of shards, such as runs/NAME/round-000/groups."""
    return [group for path in read_shards(folder) for group in store.read_records(path, Group)]


def read_judgements(folder: str | Path) -> list[Judgement]:
    """The judgements of a folder of shards, such as runs/NAME/round-000/judgements, or of one file."""
    paths = [Path(folder)] if Path(folder).is_file() else read_shards(folder)
    return [judgement for path in paths for judgement in store.read_records(path, Judgement)]


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
    with store.locked(out):
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


def generate(recipe: Recipe, model: str, out: Path, *, round: int, report: Reporter) -> list[Group]:
    """The completions of a round's prompts under a model, as shards in `out`."""
    recipe, folder = resolve_auto(recipe), local_model(model)
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
        "prompts": _prompts_digest(prompts),
        "sampling": asdict(sampling),
        "generator": _engine(recipe),
        "gold": gold,
    }
    if recipe.train.lora is not None and recipe.train.lora.load_in_4bit:
        identity["load_in_4bit"] = True
    seed = derive_seed(recipe.seed, round, "engine")
    groups: list[Group] = []
    with claimed(out, identity, report):
        note_drops(pools, report)
        record_pools(pools, out)
        start = playable(folder, out, recipe.train)
        with open_generator(recipe.generator, start, chat, seed=seed, encode_gold=gold) as generator:
            for name, dealt in prompts.items():
                label = f"round {round}{name and f', {name}'}, sampling"
                groups += sample_groups(generator, dealt, sampling, out / name, report, label)
    return groups


def _prompts_digest(prompts: Mapping[str, Sequence[Prompt]]) -> Any:
    found = {}
    for name, own in prompts.items():
        digest = hashlib.sha256()  # of what json.dumps of all of them would give
        for piece in json_list([p.id, p.gold, p.checks] for p in own):
            digest.update(piece)
        found[name] = digest.hexdigest()
    return plain(found)


def _engine(recipe: Recipe) -> dict[str, Any]:
    """What of the generator decides which completions, or verdicts, are drawn, beside the sampling."""
    return recipe.generator.model_dump(mode="json", include={"kind", "dtype", "max_model_len", "engine_args"})


def text_digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def judge(
    recipe: Recipe, groups: Path, out: Path, *, model: str | None, round: int, allow_code: bool, report: Reporter
) -> list[Judgement]:
    """The judge's scores of the groups in a folder, as shards in `out`; of several sources each judge's, by source. `model` is
    the policy, for a judge that is one.
    """
    sources = recipe.by_source
    judged = {n: paths for n, paths in source_shards(recipe, groups, round).items() if sources[n].judge is not None}
    digests = {name: [store.file_digest(path) for path in paths] for name, paths in judged.items()}
    inputs = {"stage": "judge", "round": round, "groups": plain(digests)}
    found = {name: [g for path in paths for g in store.read_records(path, Group)] for name, paths in judged.items()}
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
) -> list[Judgement]:
    """The judges' scores of the groups of each source, as shards in `out`; `inputs` says whose work that folder holds. A reward
    model that isn't shown to beat a coin is refused, unless it is `trusted`.
    """
    asked = {name: view.judge for name, view in recipe.by_source.items() if view.judge is not None}
    if not asked:
        raise RecipeError("judge: the recipe has none")
    made: dict[str, Judge] = {}
    judges = {name: open_judge(recipe, one, allow_code=allow_code, made=made) for name, one in asked.items()}
    own = any(asks_policy(one) for one in asked.values())
    if own and model is None:
        raise RecipeError("judge.model is the policy itself: name it with --model")
    if not own and model is not None:
        raise RecipeError("--model names the policy, and this recipe's judge is not the policy: leave it out")
    identity = inputs | {"judge": plain({name: one.identity for name, one in judges.items()}), "model": None}
    if any(isinstance(one, LLMJudgeRecipe) for judge in asked.values() for one in judges_in(judge)):
        recipe = resolve_auto(recipe)
        identity["generator"] = _engine(recipe)
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
            found = judge_each(parts, JudgeContext(round, seed), report)
            return [judgement for judgements in found for judgement in judgements]
    folder = local_model(model)
    chat, engine_seed = load_chat(str(folder), recipe.chat), derive_seed(recipe.seed, round, "engine")
    identity |= {"model": store.weights_digest(folder), "chat": text_digest(chat.template_digest_text)}
    with claimed(out, identity, report), open_generator(recipe.generator, folder, chat, seed=engine_seed) as generator:
        trust()
        found = judge_each(parts, JudgeContext(round, seed, generator), report)
        return [judgement for judgements in found for judgement in judgements]


def open_judge(recipe: Recipe, asked: JudgeRecipe, *, allow_code: bool, made: dict[str, Judge] | None = None) -> Judge:
    """The judge that a recipe names; one with a model of its own opens it on the recipe's kind of engine. `made` keeps those
    that were made with it: equal ones are one.
    """

    def open_model(model: str) -> Any:
        folder, resolved = local_model(model), resolve_auto(recipe)
        return open_generator(resolved.generator, folder, Chat.load(str(folder)), seed=recipe.seed)

    return make_judge(asked, allow_code=allow_code, open_model=open_model, made=made)


@dataclass(frozen=True, slots=True)
class PairInputs:
    """What pairs are made of. `previous` are the pairs.jsonl of earlier rounds, for the filter mix_previous."""

    groups: Path
    judgements: Path | None = None
    previous: Sequence[Path] = ()
    round: int = 0


def pairs(recipe: Recipe, inputs: PairInputs, out: Path, *, allow_code: bool) -> dict[str, Selection]:
    """The pairs of judged groups, by source, in the file `out`; it is left alone where it holds other pairs."""
    _require_read(recipe, inputs)
    with tempfile.TemporaryDirectory() as folder:
        groups = source_shards(recipe, inputs.groups, inputs.round)
        pairings = {
            name: _pairing(name, view, groups[name], inputs, allow_code=allow_code)
            for name, view in recipe.by_source.items()
        }
        selections = {
            name: replace(one, pairs=tuple(one.pairs), drops=tuple(one.drops))  # their files go with the folder
            for name, one in make_pairs(pairings, Path(folder)).items()
        }
        made = store.read_bytes(Path(folder) / "pairs.jsonl")
    if out.exists() and store.read_bytes(out) != made:
        raise StorageError(f"{out}: holds other pairs; remove it or take another --out")
    if not out.exists():
        store.write_bytes(out, made)
    return selections


def _require_read(recipe: Recipe, inputs: PairInputs) -> None:
    views = recipe.by_source.values()
    if inputs.judgements is not None and not any(view.pairs.reads_scores for view in views):
        raise RecipeError("--judgements is given, but no pairs.kind of this recipe reads scores: leave it out")
    mixing = (MixPreviousRecipe, PythonFilterRecipe)
    if inputs.previous and not any(isinstance(one, mixing) for view in views for one in view.pairs.filters):
        raise RecipeError("--previous is given, but no filter of this recipe reads earlier rounds: leave it out")


def _pairing(
    source: str, recipe: SourceView, sampled: Sequence[Path], inputs: PairInputs, *, allow_code: bool
) -> Pairing:
    """What the pairs of a source are made of, from its folders."""
    if recipe.pairs.reads_scores and inputs.judgements is None:
        raise RecipeError(f"pairs.kind {recipe.pairs.kind} reads scores: name their folder with --judgements")
    groups = [group for path in sampled for group in store.read_records(path, Group)]
    judged = inputs.judgements if recipe.pairs.reads_scores else None
    scores = None if judged is None else read_judgements(judged / source) if groups else []
    if scores is not None and [j.prompt_id for j in scores] != [g.prompt.id for g in groups]:
        raise DataError(f"{judged}: these are the judgements of other prompts than those in {inputs.groups / source}")
    seed = derive_seed(recipe.seed, inputs.round, "pair")

    def previous(index: int) -> list[PreferencePair]:
        return [pair for pair in _previous(inputs.previous, index) if pair.source == source]

    return Pairing(
        make_selector(recipe.pairs, inputs.round, seed),
        groups,
        scores,
        filters=make_filters(recipe.pairs, inputs.round, load_programs(recipe.pairs, allow_code=allow_code)),
        context=FilterContext(inputs.round, seed, previous),
        judge="" if judged is None else _judge_of(judged, source),
        max_unparsed=recipe.pairs.unparsed_bound,
    )


def _previous(files: Sequence[Path], round: int) -> list[PreferencePair]:
    """The pairs that an earlier round made itself. RecipeError where no file is that round's."""
    for path in files:
        found = store.read_records(path, PreferencePair)
        # a file's newest pairs are its round's own; older ones were mixed in, with the weights of that mix
        if found and max(pair.origin_round for pair in found) == round:
            return [pair for pair in found if pair.origin_round == round]
    raise RecipeError(
        f"pairs.filters asks for the pairs of round {round}: name its pairs.jsonl with --previous, once for each earlier round"
    )


def _judge_of(judgements: Path, source: str) -> str:
    """The identity of the judge that wrote a folder of judgements: of a single stage, or of a run's round."""
    single, run = judgements / IDENTITY, judgements.resolve().parent.parent / "run.json"
    path = single if single.exists() else run
    found = store.read_json(path)["judge"] if path.exists() else None
    return str((found.get(source) if isinstance(found, dict) else found) or "")


def evaluate(recipe: Recipe, model: str, out: Path, *, allow_code: bool, report: Reporter) -> dict[str, Any]:
    """The held-out panel of a model, as in eval.json; its KL is to the recipe's own model."""
    from selfplay.panel import HeldOut, Panel

    recipe = resolve_auto(recipe)
    folder, initial = local_model(model), local_model(recipe.model)
    chat = load_chat(str(folder), recipe.chat)
    pools = load_pools(recipe, chat=chat, room=prompt_room(recipe, folder))
    made: dict[str, Judge] = {}
    heldout = []
    for name, view in recipe.by_source.items():
        prompts, asked = pools[name].heldout[: recipe.evaluate.num_prompts], view.heldout_judge
        judge = open_judge(recipe, asked, allow_code=allow_code, made=made) if asked is not None else None
        heldout += [HeldOut(name, prompts, judge)] if prompts else []
    if not heldout:
        raise RecipeError("prompts.heldout: the recipe holds no prompts out, so there is nothing to evaluate on")
    judges = {one.name: one.judge for one in heldout}
    panel = Panel(recipe, tuple(heldout), report)
    digests = store.weights_digest(folder), store.weights_digest(initial)
    identity: dict[str, Any] = {
        "stage": "evaluate",
        "model": digests[0],
        "initial": digests[1],
        "chat": text_digest(chat.template_digest_text),
        "prompts": _prompts_digest({one.name: one.prompts for one in heldout}),
        "judge": plain({name: one.identity if one is not None else None for name, one in judges.items()}),
        "sampling": asdict(panel.sampling(between=False)),
        "generator": _engine(recipe),
        "greedy": recipe.evaluate.greedy,
        "kl": recipe.evaluate.kl,
    }
    is_initial = digests[0] == digests[1]
    if recipe.train.lora is not None and recipe.train.lora.load_in_4bit:
        identity["load_in_4bit"] = True
    with claimed(out, identity, report):
        note_drops(pools, report)
        record_pools(pools, out)
        recipe.for_each(lambda name, view: _trust_panel(view, judges.get(name), out, report))
        folder, initial = (playable(one, out, recipe.train) for one in (folder, initial))
        with open_generator(recipe.generator, folder, chat, seed=derive_seed(recipe.seed, 0, "engine")) as generator:
            index = -1 if is_initial else recipe.rounds - 1
            panel.sample(generator, out, round=index, between=False)
            panel.judge_all(generator, out, round=index, between=False)
        figures = panel.finish(out, initial=initial, is_initial=is_initial)
    assert figures is not None
    return figures


def _trust_panel(view: SourceView, judge: Judge | None, out: Path, report: Reporter) -> None:
    """RecipeError where a reward model that scores the panel isn't shown to beat a coin."""
    require_trust("judge" if view.evaluate.judge is None else "evaluate.judge", view, judge, out, report)
