"""A recipe of two small rounds with the scripted generator and a verifier, for tests of the command line."""

import json
from pathlib import Path
from typing import Any

import yaml

from selfplay.cli import main

JUDGED = {"kind": "verifier", "checks": [{"kind": "words", "min": 9}, {"kind": "contains", "any": ["moon", "sky"]}]}


def write_recipe(folder: Path, model: Path, /, **sections: Any) -> Path:
    """A recipe in `folder` and its prompts: 8 a round, 8 held out; two rows are the same and one is empty."""
    rows = [
        {"prompt": text} for text in (*(f"Tell me about thing {n}." for n in range(32)), "Tell me about thing 0.", "")
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data: dict[str, Any] = {
        "model": str(model),
        "rounds": 2,
        "prompts": {"source": "prompts.jsonl", "num_prompts": 8, "heldout": 0.25},
        "generator": {"kind": "scripted", "max_tokens": 100},
        "judge": JUDGED,
        "train": {"learning_rate": [1e-3, 1e-4], "batch_size": 4, "bf16": False},
        "evaluate": {"num_completions": 2},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**data, **sections}))
    return path


def ok(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0
