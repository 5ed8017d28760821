"""Prompts made by reasoning-gym (extra `reasoning-gym`): as many as you want, each with its gold answer and its scorer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from selfplay import store
from selfplay.errors import RecipeError, StorageError
from selfplay.judges.checks.foreign import FOREIGN
from selfplay.judges.checks.reasoning_gym import task_fault, tasks


def write_tasks(
    task: str,
    out: Path,
    *,
    count: int,
    seed: int,
    read: Literal["tag", "last_number", "all"],
    options: Mapping[str, Any],
) -> int:
    """Writes rows with prompt, gold and checks, as many of `count` as differ, and returns how many. RecipeError where there is
    no such task, where its scorer can't be used, or where its generator refuses the options; StorageError where `out` is there.
    """
    FOREIGN["reasoning_gym"].require("reasoning_gym", "tasks")
    if task not in tasks():
        raise RecipeError(f"reasoning-gym has no task {task!r}; there are {', '.join(sorted(tasks()))}")
    if out.exists():
        raise StorageError(f"{out}: already there; remove it or take another name")
    rows: dict[str, str] = {}
    for entry in _entries(task, count, seed, options):
        if fault := task_fault(None, entry=entry):
            raise RecipeError(f"tasks: {fault}")
        check = {"kind": "reasoning_gym", "entry": entry, "read": read}
        rows.setdefault(
            entry["question"], json.dumps({"prompt": entry["question"], "gold": entry["answer"], "checks": [check]})
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    store.rewrite(out, "".join(row + "\n" for row in rows.values()).encode())
    return len(rows)


def _entries(task: str, count: int, seed: int, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries as they will be when they are read from the file."""
    from reasoning_gym import create_dataset

    try:
        made = create_dataset(task, size=count, seed=seed, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise RecipeError(f"tasks: {task} refuses these options: {error}") from error
    read: list[dict[str, Any]] = json.loads(json.dumps([made[place] for place in range(count)]))
    return read
