"""The stages of a round one by one, over files: what a cluster user runs as separate jobs.

With the same recipe, round and model each writes the same bytes as `iterate` does. A folder that holds the work of other
inputs is refused, never reused.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.chat import Chat
from selfplay.errors import DataError, RecipeError, StorageError
from selfplay.filters import load_programs, make_filters
from selfplay.judges import make_judge
from selfplay.models import load_chat, local_model, open_generator, prompt_room, resolve_auto
from selfplay.pairs import Selection, make_selector
from selfplay.progress import Reporter
from selfplay.prompts import load_pool
from selfplay.protocols import FilterContext, Judge, JudgeContext
from selfplay.recipe import Recipe
from selfplay.recipe_judges import JudgeRecipe, LLMJudgeRecipe
from selfplay.run import note_drops, report_swept
from selfplay.stages import judge_groups, make_pairs, room_for_judge, sample_groups, sampling_at, shards
from selfplay.train.four_bit import playable
from selfplay.trust import require_trust
from selfplay.types import Group, Judgement, PreferencePair, derive_seed

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
        raise DataError(f"{folder}: no .jsonl shards in this folder; give one that `selfplay generate` or a run wrote")
    return found


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
    pool = load_pool(recipe.prompts, seed=recipe.seed, chat=chat, room=prompt_room(recipe, folder))
    prompts = pool.deal(recipe.prompts, round)
    sampling = sampling_at(recipe.generator, round, seed=derive_seed(recipe.seed, round, "sample"))
    identity = {
        "stage": "generate",
        "round": round,
        "model": store.weights_digest(folder),
        "chat": text_digest(chat.template_digest_text),
        "prompts": text_digest([[p.id, p.gold, p.checks] for p in prompts]),
        "sampling": asdict(sampling),
        "generator": _engine(recipe),
        "gold": recipe.pairs.needs_gold,
    }
    if recipe.train.lora is not None and recipe.train.lora.load_in_4bit:
        identity["load_in_4bit"] = True
    seed, gold = derive_seed(recipe.seed, round, "engine"), recipe.pairs.needs_gold
    with claimed(out, identity, report):
        note_drops(pool, report)
        pool.record(out)
        start = playable(folder, out, recipe.train)
        with open_generator(recipe.generator, start, chat, seed=seed, encode_gold=gold) as generator:
            return sample_groups(generator, prompts, sampling, out, report, f"round {round}, sampling")


def _engine(recipe: Recipe) -> dict[str, Any]:
    """What of the generator decides which completions are drawn, beside the sampling."""
    return recipe.generator.model_dump(mode="json", include={"kind", "dtype", "max_model_len", "engine_args"})


def text_digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def judge(
    recipe: Recipe, groups: Path, out: Path, *, model: str | None, round: int, allow_code: bool, report: Reporter
) -> list[Judgement]:
    """The judge's scores of the groups in a folder, as shards in `out`. `model` is the policy, for a judge that is one."""
    found, digests = read_groups(groups), [store.file_digest(path) for path in read_shards(groups)]
    inputs = {"stage": "judge", "round": round, "groups": digests}
    return judge_here(recipe, found, out, inputs, model=model, round=round, allow_code=allow_code, report=report)


def judge_here(
    recipe: Recipe,
    groups: Sequence[Group],
    out: Path,
    inputs: dict[str, Any],
    *,
    model: str | None,
    round: int,
    allow_code: bool,
    report: Reporter,
    trusted: bool = False,
) -> list[Judgement]:
    """The judge's scores of groups, as shards in `out`; `inputs` says whose work that folder holds. A reward model that isn't
    shown to beat a coin is refused, unless it is `trusted`.
    """
    if recipe.judge is None:
        raise RecipeError("judge: the recipe has none")
    asked = open_judge(recipe, recipe.judge, allow_code=allow_code)
    own = isinstance(recipe.judge, LLMJudgeRecipe) and recipe.judge.model == "policy"
    if own and model is None:
        raise RecipeError("judge.model is the policy itself: name it with --model")
    identity = inputs | {"judge": asked.identity, "model": None}
    seed = derive_seed(recipe.seed, round, "judge")
    if not own or model is None:
        with claimed(out, identity, report):
            if not trusted:
                require_trust("judge", recipe, asked, out, report)
            with room_for_judge(asked, None):
                return judge_groups(asked, groups, JudgeContext(round, seed), out, report, f"round {round}, judging")
    recipe, folder = resolve_auto(recipe), local_model(model)
    identity["model"] = store.weights_digest(folder)
    chat, engine_seed = load_chat(str(folder), recipe.chat), derive_seed(recipe.seed, round, "engine")
    with claimed(out, identity, report), open_generator(recipe.generator, folder, chat, seed=engine_seed) as generator:
        context = JudgeContext(round, seed, generator)
        return judge_groups(asked, groups, context, out, report, f"round {round}, judging")


def open_judge(recipe: Recipe, asked: JudgeRecipe, *, allow_code: bool) -> Judge:
    """The judge that a recipe names; one with a model of its own opens it on the recipe's kind of engine."""

    def open_model(model: str) -> Any:
        folder, resolved = local_model(model), resolve_auto(recipe)
        return open_generator(resolved.generator, folder, Chat.load(str(folder)), seed=recipe.seed)

    return make_judge(asked, allow_code=allow_code, open_model=open_model)


@dataclass(frozen=True, slots=True)
class PairInputs:
    """What pairs are made of. `previous` are the pairs.jsonl of earlier rounds, for the filter mix_previous."""

    groups: Path
    judgements: Path | None = None
    previous: Sequence[Path] = ()
    round: int = 0


def pairs(recipe: Recipe, inputs: PairInputs, out: Path, *, allow_code: bool) -> Selection:
    """The pairs of judged groups, in the file `out`; it is left alone where it holds other pairs."""
    if recipe.pairs.reads_scores and inputs.judgements is None:
        raise RecipeError(f"pairs.kind {recipe.pairs.kind} reads scores: name their folder with --judgements")
    found = read_groups(inputs.groups)
    judged = inputs.judgements if recipe.pairs.reads_scores else None
    scores = None if judged is None else read_judgements(judged)
    if scores is not None and [j.prompt_id for j in scores] != [g.prompt.id for g in found]:
        raise DataError(f"{judged}: these are the judgements of other prompts than those in {inputs.groups}")
    seed = derive_seed(recipe.seed, inputs.round, "pair")
    programs = load_programs(recipe.pairs, allow_code=allow_code)
    with tempfile.TemporaryDirectory() as folder:
        selection = make_pairs(
            make_selector(recipe.pairs, inputs.round, seed),
            found,
            scores,
            Path(folder),
            filters=make_filters(recipe.pairs, inputs.round, programs),
            context=FilterContext(inputs.round, seed, lambda index: _previous(inputs.previous, index)),
            judge="" if judged is None else _judge_of(judged),
            max_unparsed=recipe.pairs.unparsed_bound,
        )
        made = store.read_bytes(Path(folder) / "pairs.jsonl")
    if out.exists() and store.read_bytes(out) != made:
        raise StorageError(f"{out}: holds other pairs; remove it or take another --out")
    if not out.exists():
        store.write_bytes(out, made)
    return selection


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


def _judge_of(judgements: Path) -> str:
    """The identity of the judge that wrote a folder of judgements: of a single stage, or of a run's round."""
    single, run = judgements / IDENTITY, judgements.resolve().parent.parent / "run.json"
    path = single if single.exists() else run
    return str(store.read_json(path)["judge"] or "") if path.exists() else ""


def evaluate(recipe: Recipe, model: str, out: Path, *, allow_code: bool, report: Reporter) -> dict[str, Any]:
    """The held-out panel of a model, as in eval.json; its KL is to the recipe's own model."""
    from selfplay.panel import Panel

    recipe = resolve_auto(recipe)
    folder, initial = local_model(model), local_model(recipe.model)
    chat = load_chat(str(folder), recipe.chat)
    pool = load_pool(recipe.prompts, seed=recipe.seed, chat=chat, room=prompt_room(recipe, folder))
    prompts = pool.heldout[: recipe.evaluate.num_prompts]
    if not prompts:
        raise RecipeError("prompts.heldout: the recipe holds no prompts out, so there is nothing to evaluate on")
    asked = recipe.heldout_judge
    panel_judge = open_judge(recipe, asked, allow_code=allow_code) if asked is not None else None
    panel = Panel(recipe, prompts, panel_judge, report)
    digests = store.weights_digest(folder), store.weights_digest(initial)
    identity: dict[str, Any] = {
        "stage": "evaluate",
        "model": digests[0],
        "initial": digests[1],
        "chat": text_digest(chat.template_digest_text),
        "prompts": text_digest([[p.id, p.gold, p.checks] for p in prompts]),
        "judge": panel_judge.identity if panel_judge is not None else None,
        "sampling": asdict(panel.sampling(between=False)),
        "generator": _engine(recipe),
        "greedy": recipe.evaluate.greedy,
        "kl": recipe.evaluate.kl,
    }
    is_initial = digests[0] == digests[1]
    if recipe.train.lora is not None and recipe.train.lora.load_in_4bit:
        identity["load_in_4bit"] = True
    with claimed(out, identity, report):
        note_drops(pool, report)
        pool.record(out)
        folder, initial = (playable(one, out, recipe.train) for one in (folder, initial))
        with open_generator(recipe.generator, folder, chat, seed=derive_seed(recipe.seed, 0, "engine")) as generator:
            index = -1 if is_initial else recipe.rounds - 1
            panel.sample(generator, out, round=index, between=False)
            with room_for_judge(panel_judge, generator):
                panel.judge_all(generator, out, round=index, between=False)
        figures = panel.finish(out, initial=initial, is_initial=is_initial)
    assert figures is not None
    return figures
