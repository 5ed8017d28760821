"""The prompts of a data set: which are dropped, which held out, and which a round is dealt.

Which round gets a prompt depends on the seed and the prompt alone, never on the number of rounds.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selfplay.chat import Chat
from selfplay.data_rows import FILE_SUFFIXES
from selfplay.errors import DataError, RecipeError
from selfplay.lazy_prompts import CHECKS, GOLD, INDEX, NO_ROOM, TOO_LONG, Index, Prompts, json_list
from selfplay.prompt_rows import PromptRows
from selfplay.recipe import Recipe
from selfplay.recipe_prompts import HeldoutRecipe, PromptsRecipe
from selfplay.recipe_values import at_round
from selfplay.types import Drop, Prompt

DUPLICATE = "duplicate"
CONTRADICTION = "duplicate with another gold answer or checks"
LONG = "longer than max_prompt_length"
FILLS = "leaves no room for max_tokens in the model's length"
DROPS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class PromptPool:
    """All prompts of a data set: `train` in dealing order, `heldout` apart, and what was dropped, with reasons. `name` is that
    of the source, where a recipe has several.
    """

    train: Prompts
    heldout: Prompts
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
        digest = hashlib.sha256()  # of the JSON text of both lists in a list, which may be too long to hold
        for before, part in ((b"[", self.train), (b", ", self.heldout)):
            digest.update(before)
            for piece in json_list(part.facts, sort_keys=True):
                digest.update(piece)
        digest.update(b"]")
        return digest.hexdigest()

    def deal(self, recipe: PromptsRecipe, round: int) -> Prompts:
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
    rows = held_rows = PromptRows(recipe, source)
    num_rows = len(rows)
    drops: list[Drop] = []

    def length_mark(prompt: Prompt) -> int:
        length = 0 if chat is None else len(chat.encode_prompt(prompt))
        return TOO_LONG if length > recipe.max_prompt_length else NO_ROOM * (room is not None and length > room)

    train = _unique(rows, drops, length_mark)
    heldout = train[:0]
    if recipe.heldout is not None and not isinstance(recipe.heldout, float):
        held_rows = PromptRows(*_heldout_of(recipe, recipe.heldout))
        num_rows += len(held_rows)
        heldout = _unique(held_rows, drops, length_mark)
        both = np.isin(train["id"], heldout["id"])
        drops += Prompts(rows, train[both]).drops(lambda _: "also held out")
        train = train[~both]
    train = train[_order(seed, train)]
    if isinstance(recipe.heldout, float):
        count = max(1, round(recipe.heldout * len(train)))
        train, heldout = train[:-count], train[-count:]
    kept, apart = (_short_enough(Prompts(*part), drops) for part in ((rows, train), (held_rows, heldout)))
    pool = PromptPool(kept, apart, tuple(drops), rows.form)
    if not pool.train:
        raise DataError(f"{source}: no prompt is left for training ({pool.dropped or 'the data set is empty'})")
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


def check_gold(recipe: Recipe, prompts: Prompts) -> None:
    """DataError where the pairs need gold answers and a prompt has none."""
    missing = prompts.without_gold
    if missing and recipe.pairs.needs_gold:
        raise DataError(
            f"pairs.kind {recipe.pairs.kind} needs a gold answer for every prompt, but {len(missing)} of {len(prompts)} have "
            f"none (the first: {missing[0].id} of {missing[0].source}). Name their column in prompts.gold_column"
        )


def _order(seed: int, index: Index) -> Index:
    """The dealing order: that of a hash of seed and id. Of its 32 bytes 16 are kept, for no two prompts agree in those."""
    places = (hashlib.sha256(f"deal {seed} {int(id):016x}".encode()).digest()[:16] for id in index["id"])
    return np.argsort(np.fromiter(places, "S16", len(index)), kind="stable")


def _unique(rows: PromptRows, drops: list[Drop], length_mark: Callable[[Prompt], int]) -> Index:
    """The prompts of some rows, the first of each id, in the rows' order. The drops are of this order as well."""
    index, count = np.empty(len(rows), INDEX), 0
    dropped: list[tuple[int, Drop]] = []
    for number, prompt in enumerate(rows):
        if isinstance(prompt, Drop):
            dropped.append((number, prompt))
        else:
            marks = GOLD * (prompt.gold is not None) | CHECKS * bool(prompt.checks) | length_mark(prompt)
            index[count] = (int(prompt.id, 16), number, marks)
            count += 1
    index = index[:count]
    order = np.argsort(index["id"], kind="stable")
    ids = index["id"][order]
    again = np.flatnonzero(ids[1:] == ids[:-1]) + 1
    for place, first in zip(order[again], order[np.searchsorted(ids, ids[again])], strict=True):
        number = int(index["row"][place])
        prompt, kept = rows[number], rows[int(index["row"][first])]
        assert isinstance(prompt, Prompt)
        assert isinstance(kept, Prompt)
        same = (kept.gold, kept.checks) == (prompt.gold, prompt.checks)
        dropped.append((number, Drop(prompt.id, DUPLICATE if same else CONTRADICTION, prompt.source)))
    drops += (drop for _, drop in sorted(dropped, key=lambda one: one[0]))
    return np.delete(index, order[again])


def _short_enough(prompts: Prompts, drops: list[Drop]) -> Prompts:
    """Those without a mark of their length, and a drop for each of the others in their order."""
    wrong = prompts.marks & (TOO_LONG | NO_ROOM) != 0
    drops += prompts.only(wrong).drops(lambda marks: LONG if marks & TOO_LONG else FILLS)
    return prompts.only(~wrong)
