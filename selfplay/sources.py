"""The prompts of every source of a recipe. A prompt belongs to one source, and what one holds out no other trains on."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from selfplay import store
from selfplay.chat import Chat
from selfplay.errors import DataError
from selfplay.lazy_prompts import Index, Prompts
from selfplay.prompts import PromptPool, load_pool
from selfplay.recipe import Recipe, SourceView
from selfplay.types import Drop


def plain(by_source: Mapping[str, object]) -> Any:
    """What a JSON file says of every source: by name, or, where a recipe has the one without a name, its value alone."""
    return by_source[""] if list(by_source) == [""] else dict(by_source)


def load_pools(recipe: Recipe, *, chat: Chat | None = None, room: int | None = None) -> dict[str, PromptPool]:
    """The pool of each source, by name (see `load_pool`); "" is the one source of a recipe without `sources`.

    A prompt that several sources have stays with the first that the recipe lists, held-out prompts before those for training;
    the others drop it, with the reason. The `source` of every prompt then starts with the name of its source and a colon.
    """
    pools: dict[str, PromptPool] = {}

    def load(name: str, view: SourceView) -> None:
        pools[name] = load_pool(view.prompts, seed=recipe.seed, chat=chat, room=room)

    recipe.for_each(load)
    if recipe.sources is None:
        return pools
    owners: list[tuple[str, Index]] = []
    heldout = {name: _own(pool.heldout, f"held out in source {name}", owners) for name, pool in pools.items()}
    train = {name: _own(pool.train, f"also in source {name}", owners) for name, pool in pools.items()}
    found = {}
    for name, pool in pools.items():
        (kept, lost), (apart, lost_apart) = train[name], heldout[name]
        if not kept:
            raise DataError(f"sources.{name}: no prompt is left for training: other sources have them all")
        drops = (*pool.drops, *lost, *lost_apart)
        found[name] = PromptPool(kept.named(name), apart.named(name), drops, pool.form, name)
    return found


def record_pools(pools: Mapping[str, PromptPool], folder: Path) -> None:
    """drops.jsonl, every dropped row with its reason, and prompts.json, the counts; left alone where they are there."""
    if (folder / "prompts.json").exists():
        return
    drops = tuple(drop for pool in pools.values() for drop in pool.drops)
    store.write_records(folder / "drops.jsonl", drops, Drop)
    own = {name: pool.counts for name, pool in pools.items()}
    counts: dict[str, Any] = {
        key: sum(one[key] for one in own.values()) for key in ("num_rows", "num_train", "num_heldout")
    }
    counts["dropped"] = dict(Counter(drop.reason for drop in drops))
    store.write_json(folder / "prompts.json", counts if list(pools) == [""] else counts | {"sources": own})


def _own(prompts: Prompts, what: str, owners: list[tuple[str, Index]]) -> tuple[Prompts, list[Drop]]:
    """The prompts that no source had before, and a drop for each of the others; `owners` learns whose they are."""
    whose = np.full(len(prompts), -1)
    for number, (_, ids) in enumerate(owners):
        whose[(whose < 0) & np.isin(prompts.ids, ids)] = number
    reasons = [owners[number][0] for number in whose[whose >= 0]]
    owners.append((what, prompts.ids))
    lost = prompts.only(whose >= 0).drops(lambda _: "")
    return prompts.only(whose < 0), [replace(drop, reason=why) for drop, why in zip(lost, reasons, strict=True)]
