"""A run directory: opening it, continuing it, and where the files of each round lie."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.adapters import check_lora
from selfplay.chat import Chat
from selfplay.errors import RecipeError
from selfplay.filters import NamedFilter, Programs, load_programs
from selfplay.judges import make_judge
from selfplay.judges.lift import function_identity
from selfplay.judges.python import own_judge
from selfplay.judges.verifier import check_verifiable
from selfplay.models import load_chat, local_model, open_generator, prompt_room, resolve_auto
from selfplay.panel import Panel
from selfplay.progress import Reporter
from selfplay.prompts import PromptPool, check_gold, load_pool
from selfplay.protocols import Judge, PairFilter, PairSelector
from selfplay.recipe import Recipe
from selfplay.recipe_file import check_recipe, differences, dump_recipe, parse_yaml
from selfplay.recipe_filters import PythonFilterRecipe
from selfplay.recipe_judges import API_CONDUCT, JUDGE_PLACES
from selfplay.recipe_reward import REWARD_CONDUCT
from selfplay.train.devices import Devices, require_possible
from selfplay.train.four_bit import playable
from selfplay.train.settings import require_bitsandbytes
from selfplay.trust import require_trust
from selfplay.types import PreferencePair, derive_seed

MACHINE_S_CHOICE = ("bf16", "max_pack_tokens")  # fields of `train` whose auto a run answers once


@dataclass(frozen=True, slots=True)
class Run:
    """What all rounds of a run share."""

    folder: Path
    recipe: Recipe  # with every auto resolved
    initial: Path
    reference: Path | None  # the model that train.reference names, where it names one
    chat: Chat
    pool: PromptPool
    judge: Judge | None
    selector: PairSelector | None  # the user's own; else the recipe's
    filters: tuple[NamedFilter, ...] | None  # the user's own; else the recipe's
    programs: Programs  # what the recipe's filters name as programs of the user
    panel: Panel
    report: Reporter
    num_canaries: int = 0  # prompts of a round that the judge sees canaries of
    calibration: dict[str, Any] | None = None  # the judge on its calibration file, where the recipe names one
    devices: Devices | None = None  # those that train together; None for one

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

    @property
    def own_pairs(self) -> list[PreferencePair]:
        """The pairs that this round made itself and kept, without those that it mixed in."""
        pairs = store.read_records(self.folder / "pairs.jsonl", PreferencePair)
        return [pair for pair in pairs if pair.origin_round == self.index]

    @property
    def reference(self) -> Path | None:
        """Whose weights are the round's reference; None where no loss reads one. An ema lies in the round's own folder from
        its training on; before the first step of round 0 the initial policy is every kind.
        """
        kind = self.run.recipe.train.reference
        if kind is None or self.run.reference is not None:
            return self.run.reference
        if kind == "prior":
            return self.start
        return self.folder / "reference" if kind == "ema" and self.index else self.run.initial

    def seed(self, stage: str) -> int:
        return derive_seed(self.run.recipe.seed, self.index, stage)


@dataclass(frozen=True, slots=True)
class OwnParts:
    """What the user passed as objects; each stands in for what the recipe says."""

    judge: Judge | None = None
    selector: PairSelector | None = None
    filters: Sequence[PairFilter] | None = None

    def named_filters(self) -> tuple[NamedFilter, ...] | None:
        """The filters under names that change when their source does."""
        if self.filters is None:
            return None
        return tuple(NamedFilter(function_identity("function", one), one) for one in self.filters)


def start_run(
    recipe: Recipe,
    folder: Path,
    *,
    own: OwnParts,
    allow_code: bool,
    report: Reporter,
    devices: Devices | None = None,
) -> Run:
    """Opens or continues a run directory. RecipeError where it holds a run of another recipe, model, data or judge."""
    _ = recipe.prompts.needed_source  # before anything is loaded
    judge = own_judge(own.judge) if own.judge is not None else None
    selector, filters = own.selector, own.named_filters()
    if judge is None and selector is None:
        recipe.check_judged()
    require_bitsandbytes(recipe.train)
    require_possible(recipe.train, devices)
    if selector is None:
        recipe.check_win_rates()
    recipe = _same_recipe(recipe, folder)
    initial = local_model(recipe.model)
    check_lora(initial, recipe.train.lora)
    named = recipe.train.reference_path
    reference = local_model(named) if named is not None else None
    chat = load_chat(str(initial), recipe.chat)
    pool = load_pool(recipe.prompts, seed=recipe.seed, chat=chat, room=prompt_room(recipe, initial))
    note_drops(pool, report)
    for index in range(recipe.rounds):  # a pool that would run out says so now, not hours from now
        dealt = pool.deal(recipe.prompts, index)
        if selector is None:
            check_gold(recipe, dealt)
    check_verifiable(recipe, pool, judge_given=judge is not None)
    programs = load_programs(recipe.pairs, allow_code=allow_code) if filters is None else {}
    report.note(f"prompts: {len(pool.train)} for training, {len(pool.heldout)} held out (form: {pool.form})")
    if judge is None and recipe.judge is not None:
        judge = make_judge(
            recipe.judge, allow_code=allow_code, open_model=lambda model: open_judge_model(recipe, model)
        )
    panel_judge = judge
    if own.judge is None or recipe.evaluate.judge is not None:
        held = recipe.heldout_judge
        panel_judge = (
            make_judge(held, allow_code=allow_code, open_model=lambda model: open_judge_model(recipe, model))
            if held is not None
            else None
        )
        if held is None and recipe.judge is not None:
            report.note(
                "panel: no scores, for each policy would mark its own work; name another judge in evaluate.judge"
            )
    # before anything is written that would bind the folder to this judge
    calibration = None if own.judge is not None else require_trust("judge", recipe, judge, folder, report)
    require_trust("evaluate.judge", recipe, panel_judge, folder, report)
    identity = {
        "model": store.weights_digest(initial),
        "chat": hashlib.sha256(chat.template_digest_text.encode()).hexdigest(),
        "prompts": pool.digest,
        "judge": judge.identity if judge is not None else None,
        "heldout_judge": panel_judge.identity if panel_judge is not None else None,
        "selector": function_identity("selector", selector) if selector is not None else None,
        "filters": [one.name for one in filters or ()] + [one.identity for one in programs.values()] or None,
    }
    if reference is not None:
        identity["reference"] = store.weights_digest(reference)
    _same_identity(identity, folder)
    pool.record(folder)
    initial = playable(initial, folder, recipe.train)
    old = _read_recipe(folder) if (folder / "recipe.yaml").exists() else None
    if old != recipe:
        for change in differences(old, recipe) if old is not None else ():
            report.note(f"recipe: changed on this run: {change}")
        store.rewrite(folder / "recipe.yaml", dump_recipe(recipe).encode())
    heldout = pool.heldout[: recipe.evaluate.num_prompts]
    panel = Panel(recipe, heldout, panel_judge, report)
    # what a judge of the user's own would make of canaries nobody knows, so it sees those alone that are asked for
    count = recipe.num_canaries if own.judge is None else recipe.audit.canaries or 0
    parts = (judge, selector, filters, programs, panel, report)
    return Run(folder, recipe, initial, reference, chat, pool, *parts, count, calibration, devices)


def note_drops(pool: PromptPool, report: Reporter) -> None:
    """Says what was dropped when the prompts were read; the rows themselves are in drops.jsonl."""
    for line in pool.drop_lines:
        report.note(f"prompts: {line}")


def report_swept(folder: Path, report: Reporter) -> None:
    """Removes what a killed process left half written in a folder, and says so."""
    for path in store.sweep(folder):
        report.note(f"{path.relative_to(folder)}: left unfinished when it was stopped; removed, and made anew")


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
    kept = {name: getattr(old.train, name) for name in MACHINE_S_CHOICE if getattr(recipe.train, name) == "auto"}
    new = recipe.model_copy(
        update={
            "generator": recipe.generator.model_copy(update={"kind": old.generator.kind})
            if recipe.generator.kind == "auto"
            else recipe.generator,
            "train": recipe.train.model_copy(update=kept),
        }
    )
    # run.json tells a moved model or data set from another one; the rest changes no result
    free = ["description", "model", "prompts.source", "prompts.heldout", "prompts.heldout.source", "chat.chat_template"]
    free += ["train.save_steps", "audit.canaries", "pairs.max_unparsed"]
    conduct = (*API_CONDUCT, *REWARD_CONDUCT, *JUDGE_PLACES)
    free += [f"{section}.{key}" for section in ("judge", "evaluate.judge") for key in conduct]
    if old.train.reference_path is not None and new.train.reference_path is not None:
        free.append("train.reference")
    changed = [d for d in differences(_without_targets(old), _without_targets(new)) if d.partition(":")[0] not in free]
    if [d for d in changed if not d.startswith("rounds:")] or new.rounds < old.rounds:
        raise RecipeError(
            f"{folder} holds a run of another recipe; only more `rounds` may be asked of it. Take a new --out, or undo:\n  "
            + "\n  ".join(changed)
        )
    if changed and recipe.train.schedule_scope == "run":
        raise RecipeError(f"{folder}: with schedule_scope: run the schedule spans all rounds, so `rounds` can't change")
    return new


def _without_targets(recipe: Recipe) -> Recipe:
    """The recipe without the places of its filters' programs, whose sources are in run.json."""
    filters = [
        one.model_copy(update={"target": ""}) if isinstance(one, PythonFilterRecipe) else one
        for one in recipe.pairs.filters
    ]
    return recipe.model_copy(update={"pairs": recipe.pairs.model_copy(update={"filters": filters})})


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
