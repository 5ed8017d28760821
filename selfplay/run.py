"""A run directory: opening it, continuing it, and where the files of each round lie."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.adapters import check_lora
from selfplay.changes import continued, read_recipe
from selfplay.chat import Chat
from selfplay.errors import RecipeError
from selfplay.judges.lift import function_identity
from selfplay.models import import_trainer, load_chat, local_model, named_model, prompt_room, resolve_auto
from selfplay.panel import HeldOut, Panel
from selfplay.parts import OwnParts, Source, note_drops, open_sources, require_parts
from selfplay.pool_checks import check_calibration, check_pool
from selfplay.progress import Reporter
from selfplay.protocols import Judge
from selfplay.recipe import Recipe, SourceView
from selfplay.recipe_file import differences, dump_recipe
from selfplay.sources import load_pools, plain, record_pools
from selfplay.train.devices import Devices, require_machines, require_possible
from selfplay.train.four_bit import playable
from selfplay.train.settings import require_packages
from selfplay.types import PreferencePair, derive_seed


@dataclass(frozen=True, slots=True)
class Run:
    """What all rounds of a run share."""

    folder: Path
    recipe: Recipe  # with every auto resolved
    initial: Path
    reference: Path | None  # the model that train.reference names, where it names one
    chat: Chat
    sources: tuple[Source, ...]
    panel: Panel
    report: Reporter
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

    def label(self, source: str) -> str:
        """What to call the part of a source in this round."""
        return f"round {self.index}, {source}" if source else f"round {self.index}"

    def seed(self, stage: str) -> int:
        return derive_seed(self.run.recipe.seed, self.index, stage)


def start_run(
    recipe: Recipe,
    folder: Path,
    *,
    own: Mapping[str, OwnParts],
    allow_code: bool,
    report: Reporter,
    devices: Devices | None = None,
) -> Run:
    """Opens or continues a run directory. RecipeError where it holds a run of another recipe, model, data or judge."""
    recipe.for_each(lambda name, view: require_parts(view, own[name]))  # before anything is loaded
    require_packages(recipe.train)
    require_possible(recipe.train, devices)
    require_machines(devices)
    old = read_recipe(folder) if (folder / "recipe.yaml").exists() else None
    recipe = resolve_auto(recipe) if old is None else continued(recipe, old, folder)
    initial = local_model(recipe.model, recipe.model_revision)
    check_lora(initial, recipe.train.lora)
    named = recipe.train.reference_path
    reference = named_model(recipe, named) if named is not None else None
    chat = load_chat(str(initial), recipe.chat)
    pools = load_pools(recipe, chat=chat, room=prompt_room(recipe, initial))
    note_drops(pools, report)

    def check(name: str, view: SourceView) -> None:
        given = own[name]
        check_pool(view, pools[name], judge_given=given.judge is not None, selector_given=given.selector is not None)
        check_calibration(view, judge_given=given.judge is not None)

    recipe.for_each(check)
    # before anything is written that would bind the folder to these judges
    sources, heldout = open_sources(recipe, pools, own, folder, allow_code=allow_code, report=report)
    _same_identity(_identity(initial, reference, chat, sources, heldout), folder)
    record_pools(pools, folder)
    initial = playable(initial, folder, recipe.train)
    if old != recipe:
        for change in differences(old, recipe) if old is not None else ():
            report.note(f"recipe: changed on this run: {change}")
        store.rewrite(folder / "recipe.yaml", dump_recipe(recipe).encode())
    if old is None and recipe.generator.kind == "vllm":
        import_trainer()
    panel = Panel(recipe, tuple(one for one in heldout if one.prompts), report, folder / "initial")
    return Run(folder, recipe, initial, reference, chat, sources, panel, report, devices)


def _identity(
    initial: Path, reference: Path | None, chat: Chat, sources: Sequence[Source], heldout: Sequence[HeldOut]
) -> dict[str, Any]:
    """What a run is of, beside its recipe."""
    filters = {
        one.name: [f.name for f in one.filters or ()] + [f.identity for f in one.programs.values()] or None
        for one in sources
    }
    selectors = {
        one.name: None if one.selector is None else function_identity("selector", one.selector) for one in sources
    }
    identity = {
        "model": store.weights_digest(initial),
        "chat": hashlib.sha256(chat.template_digest_text.encode()).hexdigest(),
        "prompts": plain({one.name: one.pool.digest for one in sources}),
        "judge": plain({one.name: _of(one.judge) for one in sources}),
        "heldout_judge": plain({one.name: one.judge_identity for one in heldout}),
        "selector": plain(selectors),
        "filters": plain(filters),
    }
    return identity | ({"reference": store.weights_digest(reference)} if reference is not None else {})


def _of(judge: Judge | None) -> str | None:
    return None if judge is None else judge.identity


def report_swept(folder: Path, report: Reporter) -> None:
    """Removes what a killed process left half written in a folder, and says so."""
    for path in store.sweep(folder):
        report.note(f"{path.relative_to(folder)}: left unfinished when it was stopped; removed, and made anew")


def _same_identity(identity: dict[str, Any], folder: Path) -> None:
    path = folder / "run.json"
    if not path.exists():
        store.write_json(path, identity)
        return
    old = store.read_json(path)
    # a filter reads pairs, so while there are none it may be another one
    free = () if any(folder.glob("round-*/pairs.jsonl")) else ("filters",)
    changed = [
        f"{key}: {old.get(key)} -> {value}"
        for key, value in identity.items()
        if old.get(key) != value and key not in free
    ]
    if changed:
        raise RecipeError(
            f"{folder} was started with another {', '.join(changed)}. Take a new --out, or bring back the old"
        )
    if old.get("filters") != identity["filters"]:
        store.write_json(path, old | {"filters": identity["filters"]})
