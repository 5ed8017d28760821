"""The benchmark `scale`: a round over many prompts, without a model that costs anything; one run in a process of its own.

    python scale.py COUNT      prints one JSON line

Prompts, sampling by the scripted generator (4 completions), judging by rules, pairing and one training step of a model of
100,000 weights with a loss that needs no reference: what grows with the number of prompts is selfplay's own. The data set is
written before and is not counted. Every stage is given with the seconds and the peak of memory up to its end. CPU seconds are
of this process and its children; those of the whole leave the training out, which at any size costs about the same.
"""

import contextlib
import json
import resource
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


def clocks() -> tuple[float, float]:
    """Seconds, and CPU seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in used)


@dataclass(slots=True)
class Watched(Reporter):
    """Notes where time and memory went: [what ended, seconds, CPU seconds and peak bytes since the start]."""

    before: int = 0
    started: tuple[float, float] = field(default_factory=clocks)
    seen: list[tuple[str, float, float, int]] = field(default_factory=list)

    def mark(self, name: str) -> None:
        seconds, cpu = (round(now - then, 2) for now, then in zip(clocks(), self.started, strict=True))
        self.seen.append((name, seconds, cpu, peak() - self.before))

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
    stages = watched.seen
    _, seconds, cpu, peak_bytes = stages[-1]
    trained = next(n for n, (name, *_) in enumerate(stages) if name == "train")
    cpu -= stages[trained][2] - stages[trained - 1][2]
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak_bytes, "stages": stages}))


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
