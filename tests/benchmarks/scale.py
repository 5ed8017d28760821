"""The benchmark `scale`: a round over many prompts, without a model that costs anything; one run in a process of its own.

    python scale.py COUNT      prints one JSON line

Prompts, sampling by the scripted generator (4 completions), judging by rules, pairing and one training step of a model of
100,000 weights with a loss that needs no reference: what grows with the number of prompts is selfplay's own. The data set is
written before and is not counted. Every stage is given with its seconds and the peak of memory up to its end.
"""

import contextlib
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from machine import ROOT
from peer import peak, resident

from selfplay import iterate, load_recipe
from selfplay.progress import Advance, Reporter

sys.path.append(str(ROOT / "tests"))
WORDS = ("moon", "sky", "sun", "hill", "leaf", "bee")


@dataclass(slots=True)
class Watched(Reporter):
    """Notes where time and memory went: [what ended, seconds since the start, peak bytes since the start]."""

    before: int = 0
    started: float = field(default_factory=time.perf_counter)
    seen: list[tuple[str, float, int]] = field(default_factory=list)

    def mark(self, name: str) -> None:
        self.seen.append((name, round(time.perf_counter() - self.started, 2), peak() - self.before))

    def note(self, text: str) -> None:
        self.mark(text.partition(":")[0])

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str, *, done: int = 0) -> Iterator[Advance]:
        yield lambda done: None
        self.mark(name)


def main(count: int) -> None:
    """One round over `count` prompts."""
    import torch

    from selfplay.chat import Chat
    from selfplay.train import loop  # noqa: F401 - imported before memory is looked at

    with tempfile.TemporaryDirectory() as name:
        recipe = write_recipe(Path(name), count)
        loaded = load_recipe(recipe)
        Chat.load(loaded.model)
        torch.zeros(1)
        watched = Watched(before=resident())
        iterate(loaded, Path(name) / "run", report=watched)
        watched.mark("all")
    print(json.dumps({"seconds": watched.seen[-1][1], "peak_bytes": watched.seen[-1][2], "stages": watched.seen}))


def write_recipe(folder: Path, count: int) -> Path:
    """A recipe, its model and its data set of `count` prompts."""
    from tiny import make_tiny_model

    with (folder / "prompts.jsonl").open("w") as file:
        for n in range(count):
            file.write(json.dumps({"prompt": f"Tell me about thing {n} and the {WORDS[n % len(WORDS)]}."}) + "\n")
    recipe = {
        "model": str(make_tiny_model(folder / "model")),
        "rounds": 1,
        "prompts": {"source": "prompts.jsonl", "num_prompts": count},
        "generator": {"kind": "scripted", "max_tokens": 100},
        "judge": {"kind": "verifier", "checks": [{"kind": "words", "min": 9}, {"kind": "contains", "any": WORDS[:2]}]},
        "train": {"loss_type": "simpo", "batch_size": 8, "max_steps": 1, "bf16": False},
        "evaluate": {"kl": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # which is YAML as well
    return path


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(int(sys.argv[1]))
