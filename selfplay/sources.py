"""The prompts of every source of a recipe. A prompt belongs to one source, and what one holds out no other trains on."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.chat import Chat
from selfplay.errors import DataError
from selfplay.prompts import PromptPool, load_pool
from selfplay.recipe import Recipe
from selfplay.types import Drop, Prompt


def plain(by_source: Mapping[str, object]) -> Any:
    """What a JSON file says of every source: by name, or, where a recipe has the one without a name, its value alone."""
    return by_source[""] if list(by_source) == [""] else dict(by_source)


def load_pools(recipe: Recipe, *, chat: Chat | None = None, room: int | None = None) -> dict[str, PromptPool]:
    """The pool of each source, by name (see `load_pool`); "" is the one source of a recipe without `sources`.

    A prompt that several sources have stays with the first that the recipe lists, held-out prompts before those for training;
    the others drop it, with the reason. The `source` of every prompt then starts with the name of its source and a colon.
    """
    pools = {
        name: load_pool(view.prompts, seed=recipe.seed, chat=chat, room=room) for name, view in recipe.by_source.items()
    }
    if recipe.sources is None:
        return pools
    owner: dict[str, tuple[str, str]] = {}
    heldout = {name: _own(pool.heldout, name, "held out", owner) for name, pool in pools.items()}
    train = {name: _own(pool.train, name, "also", owner) for name, pool in pools.items()}
    found = {}
    for name, pool in pools.items():
        kept = [tuple(_named(p, name) for p in part if isinstance(p, Prompt)) for part in (train[name], heldout[name])]
        lost = [p for part in (train[name], heldout[name]) for p in part if isinstance(p, Drop)]
        if not kept[0]:
            raise DataError(f"sources.{name}: no prompt is left for training: other sources have them all")
        found[name] = PromptPool(kept[0], kept[1], (*pool.drops, *lost), pool.form, name)
    return found


def record_pools(pools: Mapping[str, PromptPool], folder: Path) -> None:
    """drops.jsonl, every dropped row with its reason, and prompts.json, the counts; left alone where they are there."""
    if (folder / "prompts.json").exists():
        return
    drops = tuple(drop for pool in pools.values() for drop in pool.drops)
    store.write_records(folder / "drops.jsonl", drops, Drop)
    train = tuple(prompt for pool in pools.values() for prompt in pool.train)
    heldout = tuple(prompt for pool in pools.values() for prompt in pool.heldout)
    counts = PromptPool(train, heldout, drops, "").counts
    own = {name: pool.counts for name, pool in pools.items()}
    store.write_json(folder / "prompts.json", counts if list(pools) == [""] else counts | {"sources": own})


def _own(prompts: tuple[Prompt, ...], name: str, how: str, owner: dict[str, tuple[str, str]]) -> list[Prompt | Drop]:
    """The prompts that no source had before, and a drop for each of the others; `owner` learns whose they are."""
    found: list[Prompt | Drop] = []
    for prompt in prompts:
        whose, as_what = owner.setdefault(prompt.id, (name, how))
        found.append(
            prompt
            if (whose, as_what) == (name, how)
            else Drop(prompt.id, f"{as_what} in source {whose}", prompt.source)
        )
    return found


def _named(prompt: Prompt, name: str) -> Prompt:
    return replace(prompt, source=f"{name}:{prompt.source}")
