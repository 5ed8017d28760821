"""Read a data set as prompts, give them ids, deal them to rounds.

Which round gets a prompt depends on the seed and the prompt alone, never on the number of rounds.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from selfplay import store
from selfplay.chat import Chat
from selfplay.errors import DataError, RecipeError
from selfplay.recipe import HeldoutRecipe, PromptsRecipe, Recipe
from selfplay.recipe_values import at_round
from selfplay.types import Drop, Message, Prompt, prompt_id

DUPLICATE = "duplicate"
CONTRADICTION = "duplicate with another gold answer or checks"
DROPS_SHOWN = 3
FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
Turns = Literal["first", "last"]
IFEVAL = ("instruction_id_list", "kwargs")


@dataclass(frozen=True, slots=True)
class PromptPool:
    """All prompts of a data set: `train` in dealing order, `heldout` apart, and what was dropped, with reasons."""

    train: tuple[Prompt, ...]
    heldout: tuple[Prompt, ...]
    drops: tuple[Drop, ...]
    form: str

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

    def record(self, folder: Path) -> None:
        """drops.jsonl, every dropped row with its reason, and prompts.json, the counts; left alone where they are there."""
        if not (folder / "prompts.json").exists():
            store.write_records(folder / "drops.jsonl", self.drops, Drop)
            counts = {"num_rows": self.num_rows, "num_train": len(self.train), "num_heldout": len(self.heldout)}
            store.write_json(folder / "prompts.json", counts | {"dropped": self.dropped})

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
            raise RecipeError(
                f"prompts: round {round} needs prompts {start + 1} to {start + count}, but {recipe.needed_source} has "
                f"{len(self.train)} for training. Lower prompts.num_prompts or rounds, or say deal: same"
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


def read_prompts(recipe: PromptsRecipe, source: str) -> tuple[list[Prompt | Drop], str]:
    """Every row of `source` as a prompt or a drop with its reason, and the form that was detected."""
    if Path(source).suffix in FILE_SUFFIXES and (recipe.name is not None or recipe.split != "train"):
        raise RecipeError(
            f"prompts.name and prompts.split, also those of prompts.heldout, are of data set ids; {source} is a file and has "
            "neither"
        )
    rows = list(read_rows(source, name=recipe.name, split=recipe.split))
    if not rows:
        raise DataError(f"{source}: no rows")
    form = _form(rows[0], recipe, source)
    return [_prompt(row, form, recipe, f"{source}:{n + 1}") for n, row in enumerate(rows)], form


def read_rows(source: str, *, name: str | None = None, split: str = "train") -> Iterator[dict[str, Any]]:
    """The rows of a local .jsonl, .json, .csv or .parquet file, or of a data set id through `datasets`."""
    path = Path(source)
    if path.suffix in (".jsonl", ".json"):
        yield from _json_rows(path)
        return
    from datasets import load_dataset

    try:
        if path.suffix in (".csv", ".parquet"):
            if not path.is_file():
                raise DataError(f"{source}: no such file")
            yield from load_dataset(path.suffix[1:], data_files=str(path), split="train")
        else:
            yield from load_dataset(source, name, split=split)
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: can't be read as a file or a data set id ({error})") from error


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read ({error})") from error
    try:
        # JSON lines are split at "\n" alone: U+2028 and others may stand inside a string
        rows = json.loads(text) if path.suffix == ".json" else None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
    if rows is None:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}:{number}: not a JSON line ({error.msg})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected rows that are objects with named fields")
    yield from rows


def _form(row: Mapping[str, Any], recipe: PromptsRecipe, source: str) -> str:
    if recipe.prompt_column is not None:
        if recipe.prompt_column not in row:
            raise DataError(f"{source}: no column {recipe.prompt_column!r}; there are {', '.join(row)}")
        return "messages" if isinstance(row[recipe.prompt_column], list) else "prompt"
    for form in ("prompt", "messages", "conversations", "instruction"):
        if form in row:
            return (
                "messages" if form == "prompt" and (isinstance(row[form], list) or _is_opening(row, recipe)) else form
            )
    raise DataError(
        f"{source}: no prompts found in columns {', '.join(row)}. Known forms: prompt, messages, "
        "instruction/input/output, conversations; else name the column in prompts.prompt_column"
    )


def _is_opening(row: Mapping[str, Any], recipe: PromptsRecipe) -> bool:
    """Whether the column prompt repeats how the turns in `messages` begin, as in UltraChat; the gold answer is there."""
    beside = {"completion", "gold", recipe.gold_column} & row.keys()
    return not beside and isinstance(row.get("messages"), list)


def _prompt(row: Mapping[str, Any], form: str, recipe: PromptsRecipe, where: str) -> Prompt | Drop:
    if recipe.gold_column is not None and recipe.gold_column not in row:
        raise DataError(f"{where}: no column {recipe.gold_column!r} (prompts.gold_column)")
    try:
        messages, gold = _messages_and_gold(row, form, recipe)
        gold = read_gold(gold if recipe.gold_column is None else row[recipe.gold_column])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{where}: this row does not fit the form {form!r} of the first row ({error!r})") from error
    if recipe.system_prompt is not None and messages and messages[0].role != "system":
        messages = (Message("system", recipe.system_prompt), *messages)
    if not any(m.content.strip() for m in messages if m.role == "user"):
        return Drop(where, "empty prompt", where)
    tools = read_tools(row.get("tools"), where)
    used = {
        "prompt",
        "messages",
        "conversations",
        "instruction",
        "input",
        "output",
        "tools",
        *IFEVAL,
        recipe.checks_column,
    }
    meta = {k: v for k, v in row.items() if k not in used and isinstance(v, str | int | float | bool)}
    checks = (*read_checks(row.get(recipe.checks_column), recipe.checks_column, where), *_instructions(row, where))
    try:
        texts = [[m.content for m in messages], gold, tools, checks, meta]
        json.dumps(texts, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return Drop(where, "lone surrogate in the text", where)
    return Prompt(prompt_id(messages, tools), messages, tools, gold, checks, where, meta)


def read_tools(value: Any, where: str) -> tuple[dict[str, Any], ...] | None:
    """The tools of a row: a list of mappings, or its JSON text, as tables have it. DataError for anything else."""
    try:
        tools = json.loads(value) if isinstance(value, str) and value.strip() else value
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: tools: not JSON ({error.msg})") from error
    if not tools:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: tools: expected a list of tools, each a mapping, found {str(value)[:80]}")
    return tuple(tools)


def read_checks(value: Any, column: str, where: str) -> tuple[dict[str, Any], ...]:
    """The checks of a row: a list of mappings, or its JSON text. DataError for anything else."""
    try:  # columns of mixed objects travel as JSON text in Parquet and CSV
        checks = (json.loads(value) if isinstance(value, str) else value) or []
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: {column}: not JSON ({error.msg})") from error
    if not isinstance(checks, list) or not all(isinstance(check, dict) for check in checks):
        raise DataError(f"{where}: {column}: expected a list of checks, each a mapping, found {str(value)[:80]}")
    return tuple(checks)


def _instructions(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    """The check that a row of IFEval's own form asks for; none where the row has no such columns."""
    if row.get(IFEVAL[0]) is None:
        return ()
    try:
        ids, given = (json.loads(v) if isinstance(v, str) else v for v in (row[key] for key in IFEVAL))
    except (json.JSONDecodeError, KeyError) as error:
        raise DataError(f"{where}: {' and '.join(IFEVAL)}: can't be read ({error!r})") from error
    return ({"kind": "ifeval", IFEVAL[0]: ids, IFEVAL[1]: given},)


def _text(value: Any) -> str:
    """A cell as text; empty cells of tables are None."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"expected text, found {str(value)[:80]}")
    return value or ""


def read_gold(value: Any) -> str | None:
    """The gold answer of a row as text, numbers too. TypeError for anything else."""
    return str(value) if isinstance(value, int | float) else None if value is None else _text(value)


def _messages_and_gold(
    row: Mapping[str, Any], form: str, recipe: PromptsRecipe
) -> tuple[tuple[Message, ...], str | None]:
    if form == "prompt":
        return (Message("user", _text(row[recipe.prompt_column or "prompt"])),), _completion(row)
    if form == "instruction":
        given = f"\n\n{row['input']}" if row.get("input") else ""
        return (Message("user", _text(row["instruction"]) + given),), row.get("output")
    if form == "conversations":
        turns = [Message(ROLES[turn["from"]], _text(turn["value"])) for turn in row["conversations"]]
    else:
        turns = [
            Message(turn["role"], _text(turn["content"])) for turn in row[recipe.prompt_column or _list_column(row)]
        ]
    if (
        form == "messages"
        and (recipe.prompt_column or _list_column(row)) != "messages"
        and turns[-1].role != "assistant"
    ):
        return tuple(turns), _completion(row)  # a prompt of several turns, as it stands
    return split_turns(turns, recipe.turns)


def _list_column(row: Mapping[str, Any]) -> str:
    return "messages" if "messages" in row else "prompt"


def _completion(row: Mapping[str, Any]) -> str | None:
    """The gold answer beside a prompt: the column completion or gold, as text, number or a list with one assistant turn."""
    value = row.get("completion", row.get("gold"))
    if isinstance(value, list):
        (turn,) = value
        value = turn["content"]
    return read_gold(value)


def split_turns(turns: Sequence[Message], which: Turns) -> tuple[tuple[Message, ...], str | None]:
    """The messages up to the first or the last user turn, and the assistant turn after it as the gold answer."""
    users = [n for n, turn in enumerate(turns) if turn.role == "user"]
    if not users:
        return (), None
    at = users[0] if which == "first" else users[-1]
    follows = turns[at + 1] if at + 1 < len(turns) else None
    return tuple(turns[: at + 1]), follows.content if follows and follows.role == "assistant" else None
