"""The rows of a file or data set, and what each says: messages, gold answer, tools and checks of a prompt."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from selfplay.data_rows import FILE_SUFFIXES, Row, open_rows
from selfplay.errors import DataError, RecipeError
from selfplay.recipe_prompts import PromptsRecipe
from selfplay.types import Drop, Message, Prompt, prompt_id

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
Turns = Literal["first", "last"]
IFEVAL = ("instruction_id_list", "kwargs")


class PromptRows:
    """Every row of `source` as a prompt, or a drop with its reason, made when it is asked for. `form` is what was detected."""

    def __init__(self, recipe: PromptsRecipe, source: str) -> None:
        if Path(source).suffix in FILE_SUFFIXES and (recipe.name is not None or recipe.split != "train"):
            raise RecipeError(
                f"prompts.name and prompts.split, also those of prompts.heldout, are of data set ids; {source} is a file and "
                "has neither"
            )
        self._recipe, self._source = recipe, source
        self._rows = open_rows(source, name=recipe.name, split=recipe.split)
        if not len(self._rows):
            raise DataError(f"{source}: no rows")
        self.form = _form(self._rows[0], recipe, source)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Prompt | Drop]:
        for number, row in enumerate(self._rows):
            yield _prompt(row, self.form, self._recipe, self.where(number))

    def __getitem__(self, number: int) -> Prompt | Drop:
        return _prompt(self._rows[number], self.form, self._recipe, self.where(number))

    def where(self, number: int) -> str:
        """What names a row, in the `source` of its prompt."""
        return f"{self._source}:{number + 1}"


def read_prompts(recipe: PromptsRecipe, source: str) -> tuple[list[Prompt | Drop], str]:
    """All rows of `source`, and their form."""
    rows = PromptRows(recipe, source)
    return list(rows), rows.form


def read_rows(source: str, *, name: str | None = None, split: str = "train") -> Iterator[Row]:
    """The rows of a local file or of a data set id, one after the other."""
    yield from open_rows(source, name=name, split=split)


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
