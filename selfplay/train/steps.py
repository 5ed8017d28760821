"""Which rows every optimizer step of a job takes. Held are 4 bytes for each row of an epoch."""

import random
from array import array
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from selfplay.records import Lazy
from selfplay.train.rows import Numbers, prompt_numbers
from selfplay.train.settings import TrainJob, TrainSettings
from selfplay.types import TrainRow, derive_seed


class Steps(Lazy[list[int]]):
    """Indices of the rows of each step of an epoch: those of `order` up to each of `ends`."""

    def __init__(self, order: Numbers, ends: Sequence[int]) -> None:
        self._order, self._ends = order, ends

    def __len__(self) -> int:
        return len(self._ends)

    def _item(self, place: int) -> list[int]:
        found: list[int] = self._order[self._ends[place - 1] if place else 0 : self._ends[place]].tolist()
        return found


class Plan(Lazy[tuple[float, list[int]]]):
    """(epoch, indices) of every optimizer step; max_steps goes on into further epochs, as in transformers."""

    def __init__(self, rows: Sequence[TrainRow], settings: TrainSettings, *, seed: int) -> None:
        self._epochs: list[Steps] = []
        self._count, most = 0, settings.max_steps
        while self._count < most if most > 0 else len(self._epochs) < settings.num_train_epochs:
            size, epoch = settings.batch_size, len(self._epochs)
            steps = form_steps(rows, batch_size=size, seed=seed, epoch=epoch, shuffle=settings.shuffle)
            self._epochs.append(steps)
            self._count += len(steps)
        self._count = min(self._count, most) if most > 0 else self._count

    def __len__(self) -> int:
        return self._count

    def _item(self, place: int) -> tuple[float, list[int]]:
        for epoch, steps in enumerate(self._epochs):
            if place < len(steps):
                return round(epoch + (place + 1) / len(steps), 4), steps[place]
            place -= len(steps)
        raise IndexError(place)


def schedule_steps(rows: Sequence[TrainRow], job: TrainJob, steps: Plan) -> int:
    """The steps that the schedule of a job spans: its own `steps`, or those of `schedule_epochs` epochs."""
    if job.schedule_epochs is None:
        return len(steps)
    return len(Plan(rows, replace(job.settings, num_train_epochs=job.schedule_epochs), seed=job.seed))


def form_steps(rows: Sequence[TrainRow], *, batch_size: int, seed: int, epoch: int, shuffle: bool) -> Steps:
    """Indices of the rows of each optimizer step of an epoch.

    Shuffled steps take whole prompts, so a step overshoots batch_size by at most one prompt; the order is a function of
    seed and epoch alone. Unshuffled ones cut the file's order exactly.
    """
    if not shuffle:
        ends = array("I", (min(i + batch_size, len(rows)) for i in range(0, len(rows), batch_size)))
        return Steps(np.arange(len(rows), dtype="u4"), ends)
    of_row = prompt_numbers(rows)
    num_rows = np.bincount(of_row)
    prompts = array("I", range(len(num_rows)))
    random.Random(derive_seed(seed, "epoch", epoch)).shuffle(prompts)
    ends, start, done = array("I"), 0, 0
    for prompt in prompts:
        if not ends or done - start >= batch_size:
            start = done
            ends.append(done)
        done += int(num_rows[prompt])
        ends[-1] = done
    turn = np.empty(len(prompts), "u4")
    turn[np.frombuffer(prompts, "u4")] = np.arange(len(prompts), dtype="u4")
    return Steps(np.argsort(turn[of_row], kind="stable").astype("u4"), ends)
