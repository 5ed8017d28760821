"""Data sets of others become our pairs, or our demonstrations where they have no rejected completion: rows in = rows out +
drops, each with its reason.

Known forms of preferences, by the columns of the first row; `chosen` and `rejected` are always there:

    explicit prompt      prompt (text or messages), instruction + input, or conversations; then chosen and rejected hold
                         a text, one message, or a list of messages
    implicit prompt      no such column: chosen and rejected are whole conversations, or whole texts, that share their
                         beginning; a text in "Human: ... Assistant: ..." turns is read as a conversation

A conversation that opens with a system or a user turn brings its own prompt, also where a prompt column stands beside it.

Demonstrations are read as the recipe's prompts are (prompts.py), and the gold answer of a row is what is trained on.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from selfplay.chat import Chat
from selfplay.errors import DataError
from selfplay.prompt_rows import ROLES, read_checks, read_gold, read_prompts, read_rows, read_tools
from selfplay.recipe_prompts import PromptsRecipe
from selfplay.types import Demonstration, Drop, Message, PreferencePair, Prompt, prompt_id

T = TypeVar("T")
Turns = tuple[Message, ...]
PROMPT_COLUMNS = ("prompt", "instruction", "conversations")
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Preferences:
    """The pairs of a preference data set, and why rows gave none."""

    pairs: tuple[PreferencePair, ...]
    drops: tuple[Drop, ...]
    form: str


@dataclass(frozen=True, slots=True)
class Demonstrations:
    """The demonstrations of a data set, and why rows gave none."""

    rows: tuple[Demonstration, ...]
    drops: tuple[Drop, ...]
    form: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """A prompt with the completion that somebody preferred and the one that they didn't, as texts."""

    prompt: Prompt
    chosen: str
    rejected: str


class _UnusableError(Exception):
    """Says why a row gives no pair."""


def our_records(source: str) -> type[PreferencePair] | type[Demonstration] | None:
    """The kind of records in a .jsonl file of ours, whose token ids are trained on as they are; None where it is another's."""
    path = Path(source)
    if path.suffix != ".jsonl" or not path.is_file():
        return None
    with path.open("rb") as file:
        first = file.readline()
    try:
        row = json.loads(first)
    except ValueError:
        return None
    if not isinstance(row, dict) or "prompt_token_ids" not in row:
        return None
    if {"chosen_token_ids", "rejected_token_ids"} <= row.keys():
        return PreferencePair
    return Demonstration if "completion_token_ids" in row else None


def holds_preferences(source: str, *, name: str | None = None, split: str = "train") -> bool:
    """Whether the first row of a file or data set id has a chosen and a rejected completion."""
    first = next(iter(read_rows(source, name=name, split=split)), None)
    return first is not None and {"chosen", "rejected"} <= first.keys()


def read_demonstrations(source: str, chat: Chat, prompts: PromptsRecipe) -> Demonstrations:
    """The demonstrations of a local file or of a data set id, tokenized by `chat`: the forms that prompts have, with a gold
    answer. `prompts` says which turn is trained on, how long a prompt may be, the system prompt and so on; its columns are
    those of its own source, and are looked for in the usual places where this data set has none of their names.
    """
    columns = next(iter(read_rows(source, name=prompts.name, split=prompts.split)), {}).keys()
    update = {
        "prompt_column": prompts.prompt_column if prompts.prompt_column in columns else None,
        "gold_column": prompts.gold_column if prompts.gold_column in columns else None,
    }
    read, form = read_prompts(prompts.model_copy(update=update), source)
    made = [row if isinstance(row, Drop) else _demonstration(row, chat, prompts.max_prompt_length) for row in read]
    rows = tuple(row for row in made if isinstance(row, Demonstration))
    drops = tuple(row for row in made if isinstance(row, Drop))
    if not rows:
        raise DataError(f"{source}: none of {len(made)} rows gives a demonstration; the first: {drops[0].reason}")
    return Demonstrations(rows, drops, form)


def _demonstration(prompt: Prompt, chat: Chat, max_prompt_length: int) -> Demonstration | Drop:
    if prompt.gold is None or not prompt.gold.strip():
        return Drop(prompt.source, "no completion to imitate", prompt.source)
    try:
        prompt_ids = chat.encode_prompt(prompt)
        ids = chat.encode_completion(prompt, prompt.gold)
    except DataError as error:
        raise DataError(f"{prompt.source}: {error}") from error
    if len(prompt_ids) > max_prompt_length:
        return Drop(prompt.source, "prompt longer than max_prompt_length", prompt.source)
    return Demonstration(prompt.id, prompt.messages, (Message("assistant", prompt.gold),), prompt_ids, ids)


def read_preferences(
    source: str,
    chat: Chat,
    *,
    name: str | None = None,
    split: str = "train",
    prompt_column: str | None = None,
    system_prompt: str | None = None,
    max_prompt_length: int | None = None,
) -> Preferences:
    """The pairs of a local file or of a data set id, tokenized by `chat`. Prompts of more than max_prompt_length tokens
    are dropped, never cut. DataError where the columns are of no known form, or where no row gives a pair.
    """
    rows, column, form = _rows(source, name, split, prompt_column)

    def pair(row: Mapping[str, Any]) -> PreferencePair:
        return _pair(_labelled(row, column, system_prompt), chat, max_prompt_length)

    pairs, drops = _convert(rows, source, pair)
    return Preferences(pairs, drops, form)


def read_labelled(
    source: str,
    *,
    name: str | None = None,
    split: str = "train",
    prompt_column: str | None = None,
    gold_column: str | None = None,
    checks_column: str = "checks",
    system_prompt: str | None = None,
    limit: int | None = None,
) -> tuple[tuple[Labelled, ...], tuple[Drop, ...]]:
    """The first `limit` rows as texts, for a judge: no tokenizer is needed. Prompts have the gold answer and the checks that
    the rows hold. Errors as `read_preferences`.
    """
    rows, column, _ = _rows(source, name, split, prompt_column)

    def labelled(row: Mapping[str, Any]) -> Labelled:
        found = _labelled(row, column, system_prompt)
        gold = read_gold(row.get(gold_column)) if gold_column is not None else None
        checks = read_checks(row.get(checks_column), checks_column, "this row")
        return replace(found, prompt=replace(found.prompt, gold=gold, checks=checks, source=source))

    return _convert(rows[:limit], source, labelled)


def _rows(
    source: str, name: str | None, split: str, prompt_column: str | None
) -> tuple[list[dict[str, Any]], str | None, str]:
    """The rows, the column of the prompt, and the form."""
    rows = list(read_rows(source, name=name, split=split))
    if not rows:
        raise DataError(f"{source}: no rows")
    return rows, *_form(rows[0], prompt_column, source)


def _form(row: Mapping[str, Any], prompt_column: str | None, source: str) -> tuple[str | None, str]:
    """The column of the prompt, None where it is implicit, and the form in words."""
    missing = [name for name in ("chosen", "rejected") if name not in row]
    if missing:
        raise DataError(
            f"{source}: no column {missing[0]!r}; there are {', '.join(row)}. Preference rows have chosen and rejected, "
            "and a prompt in a column of its own or at the start of both. Rows with one completion train with "
            "train.loss_type: sft"
        )
    # the recipe's column is that of its prompts, and a preference data set need not share it
    column = next((name for name in (prompt_column, *PROMPT_COLUMNS) if name is not None and name in row), None)
    holds = "text" if isinstance(row["chosen"], str) else "messages"
    return column, f"{'implicit prompt' if column is None else f'explicit prompt in {column!r}'}, {holds}"


def _convert(
    rows: Sequence[Mapping[str, Any]], source: str, make: Callable[[Mapping[str, Any]], T]
) -> tuple[tuple[T, ...], tuple[Drop, ...]]:
    """What `make` makes of the rows, and why it made nothing. DataError where it made nothing at all."""
    made: list[T] = []
    drops: list[Drop] = []
    for number, row in enumerate(rows, 1):
        where = f"{source}:{number}"
        try:
            made.append(make(row))
        except _UnusableError as reason:
            drops.append(Drop(where, str(reason), where))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: this row does not fit the form of the first row ({error!r})") from error
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
    assert len(made) + len(drops) == len(rows)
    if not made:
        raise DataError(f"{source}: none of {len(rows)} rows gives a pair; the first: {drops[0].id}: {drops[0].reason}")
    return tuple(made), tuple(drops)


def _with_system(messages: Turns, system_prompt: str | None) -> Turns:
    if system_prompt is None or messages[0].role == "system":
        return messages
    return (Message("system", system_prompt), *messages)


def _labelled(row: Mapping[str, Any], column: str | None, system_prompt: str | None) -> Labelled:
    messages, chosen, rejected = split_row(row, column)
    messages = _with_system(messages, system_prompt)
    for which, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise _UnusableError(f"empty {which}")
    if not any(message.content.strip() for message in messages if message.role != "system"):
        raise _UnusableError("empty prompt")
    if not _encodable((*(m.content for m in messages), chosen, rejected)):
        raise _UnusableError("lone surrogate in the text")
    tools = read_tools(row.get("tools"), "this row")
    return Labelled(Prompt(prompt_id(messages, tools), messages, tools), chosen, rejected)


def _pair(row: Labelled, chat: Chat, max_prompt_length: int | None) -> PreferencePair:
    prompt = row.prompt
    prompt_ids = chat.encode_prompt(prompt)
    if max_prompt_length is not None and len(prompt_ids) > max_prompt_length:
        raise _UnusableError("prompt longer than max_prompt_length")
    chosen_ids, rejected_ids = chat.encode_completion(prompt, row.chosen), chat.encode_completion(prompt, row.rejected)
    if chosen_ids == rejected_ids:
        raise _UnusableError("chosen equals rejected")
    return PreferencePair(
        prompt_id=prompt.id,
        prompt=prompt.messages,
        chosen=(Message("assistant", row.chosen),),
        rejected=(Message("assistant", row.rejected),),
        prompt_token_ids=prompt_ids,
        chosen_token_ids=chosen_ids,
        rejected_token_ids=rejected_ids,
    )


def _encodable(texts: Sequence[str]) -> bool:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def split_row(row: Mapping[str, Any], column: str | None) -> tuple[Turns, str, str]:
    """(prompt, chosen, rejected) of a row; `column` holds the prompt, None where it is implicit."""
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if column is not None:
            return _prompt(row, column), chosen, rejected
        one, other = _dialogue(chosen), _dialogue(rejected)
        return _split_texts(chosen, rejected) if one is None or other is None else _split_turns(one, other)
    one, other = _turns(chosen), _turns(rejected)
    if column is None or (one and one[0].role != "assistant"):
        found = _split_turns(one, other)
        if column is not None and _last(found[0]) != _last(_prompt(row, column)):
            raise _UnusableError(f"the prompt in {column!r} differs from that of the conversations")
        return found
    return _prompt(row, column), _only(one, "chosen"), _only(other, "rejected")


def _prompt(row: Mapping[str, Any], column: str) -> Turns:
    value = row[column]
    if not isinstance(value, str):
        return _turns(value)
    given = f"\n\n{row['input']}" if column == "instruction" and row.get("input") else ""
    return (Message("user", value + given),)


def _turns(value: Any) -> Turns:
    """Messages from a list of {role, content} or {from, value}, or from one of these."""
    rows = [value] if isinstance(value, dict) else value
    return tuple(
        Message(ROLES[turn["from"]], turn["value"]) if "from" in turn else Message(turn["role"], turn["content"])
        for turn in rows
    )


def _last(messages: Turns) -> str:
    return messages[-1].content.strip() if messages else ""


def _only(turns: Turns, which: str) -> str:
    """The one assistant turn that a completion is."""
    if not turns:
        raise _UnusableError(f"empty {which}")
    if len(turns) > 1 or turns[0].role != "assistant":
        raise _UnusableError("chosen and rejected differ in more than the last turn")
    return turns[0].content


def _split_turns(chosen: Turns, rejected: Turns) -> tuple[Turns, str, str]:
    """Two conversations with the same beginning."""
    if chosen == rejected:
        raise _UnusableError("chosen equals rejected")
    shared = _shared_length(chosen, rejected)
    if not any(message.role == "user" for message in chosen[:shared]):
        raise _UnusableError("chosen and rejected share no prompt")
    return chosen[:shared], _only(chosen[shared:], "chosen"), _only(rejected[shared:], "rejected")


def _split_texts(chosen: str, rejected: str) -> tuple[Turns, str, str]:
    """Two texts with the same beginning, which ends at the last white space before they part."""
    if chosen == rejected:
        raise _UnusableError("chosen equals rejected")
    shared = chosen[: _shared_length(chosen, rejected)]
    at = max((n + 1 for n, char in enumerate(shared) if char.isspace()), default=0)
    if not shared[:at].strip():
        raise _UnusableError("chosen and rejected share no prompt")
    return (Message("user", shared[:at].strip()),), chosen[at:], rejected[at:]


def _shared_length(one: Sequence[object], other: Sequence[object]) -> int:
    parted = (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(parted, min(len(one), len(other)))


def _dialogue(text: str) -> Turns | None:
    """The turns of a text like "Human: ... Assistant: ..."; None where it is none."""
    parts = _SPEAKER.split(text)
    if len(parts) < 5 or parts[0].strip() or parts[1] != "Human":
        return None
    return tuple(
        Message(_SPEAKERS[speaker], said.strip()) for speaker, said in zip(parts[1::2], parts[2::2], strict=True)
    )
