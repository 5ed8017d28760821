"""The prompts of a data set: which are dropped, which held out, and which a round is dealt.

Which round gets a prompt depends on the seed and the prompt alone, never on the number of rounds.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfplay.chat import Chat
from selfplay.errors import DataError, RecipeError
from selfplay.prompt_rows import FILE_SUFFIXES, read_prompts
from selfplay.recipe import Recipe
from selfplay.recipe_prompts import HeldoutRecipe, PromptsRecipe
from selfplay.recipe_values import at_round
from selfplay.types import Drop, Prompt

DUPLICATE = "duplicate"
CONTRADICTION = "duplicate with another gold answer or checks"
DROPS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class PromptPool:
    """All prompts of a data set: `train` in dealing order, `heldout` apart, and what was dropped, with reasons. `name` is that
    of the source, where a recipe has several.
    """

    train: tuple[Prompt, ...]
    heldout: tuple[Prompt, ...]
    drops: tuple[Drop, ...]
    form: str
    name: str = ""

    @property
    def num_rows(self) -> int:
        """The rows that were read: each is a prompt or a drop."""
        return len(self.train) + len(self.heldout) + len(self.drops)

    @property
    def dropped(self) -> dict[str, int]:
        """How many rows were dropped, by reason."""
        return dict(Counter(drop.reason for drop in self.drops))

    @property
    def drop_lines(self) -> list[str]:
        """A line for each reason. Rows that contradict each other are a fault of the data set, so the first are named."""
        lines = []
        for reason, count in self.dropped.items():
            places = [drop.source or drop.id for drop in self.drops if drop.reason == reason][:DROPS_SHOWN]
            named = f" (the first row of each is kept; dropped: {', '.join(places)}{', ...' * (count > len(places))})"
            lines.append(f"{count} dropped: {reason}" + named * (reason == CONTRADICTION))
        return lines

    @property
    def counts(self) -> dict[str, Any]:
        """Where the rows went."""
        counts = {"num_rows": self.num_rows, "num_train": len(self.train), "num_heldout": len(self.heldout)}
        return counts | {"dropped": self.dropped}

    @property
    def digest(self) -> str:
        """Changes when any prompt, gold answer or check does, and when a prompt becomes a held-out one."""
        rows = [[[p.id, p.gold, list(p.checks)] for p in part] for part in (self.train, self.heldout)]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()

    def deal(self, recipe: PromptsRecipe, round: int) -> tuple[Prompt, ...]:
        """The prompts of a round (0-based). RecipeError where a disjoint pool has run out."""
        if recipe.num_prompts is None:
            return self.train
        count = at_round(recipe.num_prompts, round)
        start = sum(at_round(recipe.num_prompts, r) for r in range(round)) if recipe.deal == "disjoint" else 0
        if start + count > len(self.train):
            where, lower = "prompts", "prompts.num_prompts"
            if self.name:
                where, lower = f"sources.{self.name}.prompts", "num_prompts, the source's weight"
            raise RecipeError(
                f"{where}: round {round} needs prompts {start + 1} to {start + count}, but {recipe.needed_source} has "
                f"{len(self.train)} for training. Lower {lower} or rounds, or say deal: same"
            )
        return self.train[start : start + count]


def load_pool(recipe: PromptsRecipe, *, seed: int, chat: Chat | None = None, room: int | None = None) -> PromptPool:
    """The prompts of a recipe. With a chat, prompts of more than max_prompt_length tokens, or of more than the `room` that
    max_tokens leave them, are dropped (never cut).

    A prompt that stands in the data with two gold answers, or with other checks, keeps those of its first row, and the
    other rows are dropped under a reason of their own. That is no error: instruction data of the size of Alpaca's always
    has such rows, and a user of SPIN wants to train on the others, where one gold answer is as good as the other. But they
    are named and not just counted, for in data that somebody wrote by hand they are a mistake.
    """
    source = recipe.needed_source
    rows, form = read_prompts(recipe, source)
    num_rows = len(rows)
    drops: list[Drop] = []
    train = _unique(rows, drops)
    heldout: list[Prompt] = []
    if recipe.heldout is not None and not isinstance(recipe.heldout, float):
        held_rows, _ = read_prompts(*_heldout_of(recipe, recipe.heldout))
        num_rows += len(held_rows)
        heldout = _unique(held_rows, drops)
        seen = {p.id for p in heldout}
        drops += [Drop(p.id, "also held out", p.source) for p in train if p.id in seen]
        train = [p for p in train if p.id not in seen]
    train.sort(key=lambda p: _place(seed, p.id))
    if isinstance(recipe.heldout, float):
        count = max(1, round(recipe.heldout * len(train)))
        train, heldout = train[:-count], train[-count:]
    if chat is not None:
        train, heldout = (_short_enough(part, recipe, chat, room, drops) for part in (train, heldout))
    if not train:
        reasons = Counter(d.reason for d in drops)
        raise DataError(f"{source}: no prompt is left for training ({dict(reasons) or 'the data set is empty'})")
    pool = PromptPool(tuple(train), tuple(heldout), tuple(drops), form)
    assert pool.num_rows == num_rows, "every row is a prompt or a drop"
    return pool


def _heldout_of(recipe: PromptsRecipe, held: str | HeldoutRecipe) -> tuple[PromptsRecipe, str]:
    """The held-out data set, and how it is read: its columns are those of the training prompts."""
    if isinstance(held, HeldoutRecipe):
        source = held.source or recipe.needed_source
        name = held.name or (recipe.name if held.source in (None, recipe.source) else None)
        return recipe.model_copy(update={"name": name, "split": held.split}), source
    if Path(held).suffix in FILE_SUFFIXES:  # a file has no splits, whatever the training prompts are a split of
        return recipe.model_copy(update={"name": None, "split": "train"}), held
    return recipe, held


def check_gold(recipe: Recipe, prompts: Sequence[Prompt]) -> None:
    """DataError where the pairs need gold answers and a prompt has none."""
    missing = [p for p in prompts if p.gold is None]
    if missing and recipe.pairs.needs_gold:
        raise DataError(
            f"pairs.kind {recipe.pairs.kind} needs a gold answer for every prompt, but {len(missing)} of {len(prompts)} have "
            f"none (the first: {missing[0].id} of {missing[0].source}). Name their column in prompts.gold_column"
        )


def _place(seed: int, id: str) -> str:
    return hashlib.sha256(f"deal {seed} {id}".encode()).hexdigest()


def _unique(rows: Iterable[Prompt | Drop], drops: list[Drop]) -> list[Prompt]:
    kept: dict[str, Prompt] = {}
    for row in rows:
        if isinstance(row, Drop):
            drops.append(row)
        elif (first := kept.setdefault(row.id, row)) is not row:
            same = (first.gold, first.checks) == (row.gold, row.checks)
            drops.append(Drop(row.id, DUPLICATE if same else CONTRADICTION, row.source))
    return list(kept.values())


def _short_enough(
    prompts: list[Prompt], recipe: PromptsRecipe, chat: Chat, room: int | None, drops: list[Drop]
) -> list[Prompt]:
    kept = []
    for prompt in prompts:
        length = len(chat.encode_prompt(prompt))
        if length > recipe.max_prompt_length:
            drops.append(Drop(prompt.id, "longer than max_prompt_length", prompt.source))
        elif room is not None and length > room:
            drops.append(Drop(prompt.id, "leaves no room for max_tokens in the model's length", prompt.source))
        else:
            kept.append(prompt)
    return kept
