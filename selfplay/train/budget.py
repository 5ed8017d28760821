"""The token budget of a pack where the recipe says `max_pack_tokens: auto`: how many tokens one forward holds.

On CUDA it is measured: packs of growing size go forward and backward through the loaded model until the next one would take
more than a share of the memory that is free beside the optimizer's state. On a CPU it is a constant. A timing would choose
other packs in every run, by noise, and with other packs the last bits of every sum differ; and from a thousand tokens on a
CPU's matrix products are busy anyway.

The figure is written once, into a file of the run, and read ever after: a job that goes on, and every later round, takes the
same packs. Where memory runs out all the same, packs are halved (memory.py).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from selfplay import store
from selfplay.errors import RecipeError
from selfplay.train import attention
from selfplay.train.logps import TokenLogps
from selfplay.train.memory import free_memory
from selfplay.train.optim import Masters
from selfplay.train.pack import build_packs
from selfplay.train.settings import TrainSettings
from selfplay.train.sizes import (
    COMPLETION,
    CPU_PACK_TOKENS,
    DENSE_PACK_LENGTH,
    PROMPT,
    SHARE,
    SIZES,
    optimizer_bytes,
)
from selfplay.train.world import World
from selfplay.types import Demonstration, Message

GROWTH = 4  # doubling a row adds at most this much of what the doubling before added, where attention is quadratic


class Meter(Protocol):
    """What a device can say of its memory, in bytes."""

    def limit(self, promised: int) -> int:
        """The most that packs may bring this process to, what it holds now included; `promised` bytes are taken beside it."""
        ...

    def peak(self, work: Callable[[], object]) -> int:
        """The most that was held while `work` ran."""
        ...


class CudaMeter:
    """Of the memory of one CUDA device that is free now."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def limit(self, promised: int) -> int:
        free_memory()
        free: int = torch.cuda.mem_get_info(self.device)[0] - promised
        return torch.cuda.memory_allocated(self.device) + int(SHARE * free)

    def peak(self, work: Callable[[], object]) -> int:
        free_memory()
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        return int(torch.cuda.max_memory_allocated(self.device))


def pack_tokens(
    path: Path, module: TokenLogps, masters: Masters, settings: TrainSettings, *, shared: bool, world: World
) -> int:
    """The token budget of a job: the recipe's number, else that in the file `path`, which is written where it isn't there.
    Several processes measure together, and the first one writes and reads.
    """
    if settings.max_pack_tokens is not None:
        return settings.max_pack_tokens
    if not world.first(path.exists):
        found: dict[str, Any] = {"max_pack_tokens": CPU_PACK_TOKENS, "device": "cpu"}
        if world.device.type == "cuda":
            found = measured(module, masters, settings, CudaMeter(world.device), shared=shared, world=world)
            found["device"] = torch.cuda.get_device_name(world.device)
        if world.is_first:
            store.write_json(path, found)
    return int(world.first(lambda: store.read_json(path)["max_pack_tokens"]))


def with_pack_length(settings: TrainSettings, model: Any) -> TrainSettings:
    """The settings with a length of rows where the recipe names none and this model's attention takes dense masks."""
    if settings.max_pack_length is not None or model.config._attn_implementation == attention.IMPLEMENTATION:
        return settings
    return replace(settings, max_pack_length=DENSE_PACK_LENGTH)


def measured(
    module: TokenLogps,
    masters: Masters,
    settings: TrainSettings,
    meter: Meter,
    *,
    shared: bool,
    world: World,
) -> dict[str, Any]:
    """What the file holds: the budget, the limit, and the peak of every size that was tried, in bytes: those of the process
    that has the least room.

    Weights and random states stay as they are and no gradient is left. What the optimizer will take at its first step is
    counted before it does. RecipeError where weights are sharded and memory runs out.
    """

    def peak(tokens: int) -> int:
        taken, full = 0, 0
        try:
            taken = meter.peak(partial(_forward_and_backward, module, masters, settings, tokens, shared, world.device))
        except torch.OutOfMemoryError as error:
            if world.sharding is not None:  # the others are in the middle of a pass with this process, which must end
                raise RecipeError(
                    f"max_pack_tokens: auto: the device's memory ran out at a pack of {tokens} tokens, which with FSDP "
                    f"can't be undone. Set train.max_pack_tokens to less than {tokens}"
                ) from error
            full = 1
        taken, full = world.most(taken, full)
        if full:  # everywhere, so that all go on from here together
            raise torch.OutOfMemoryError
        return taken

    try:
        peak(SIZES[0])  # from here on the masters hold gradients, as they do in every step from its second pack on
        own = meter.limit(state_bytes(masters, settings.optim))
        limit = -world.most(-own)[0]
        peaks = grow(peak, limit)
    except torch.OutOfMemoryError:
        limit, peaks = 0, []
    masters.clear_gradients()
    free_memory()
    fitting = [tokens for tokens, peak in peaks if peak <= limit]
    return {"max_pack_tokens": max(fitting, default=SIZES[0]), "limit_bytes": limit, "peak_bytes": peaks}


def state_bytes(masters: Masters, optim: str) -> int:
    """What the optimizer takes at its first step."""
    every, tables = (sum(weight.numel() for weight in weights) for weights in (masters.weights, masters.embeddings))
    return optimizer_bytes(every, tables, optim)


def grow(peak_of: Callable[[int], int], limit: int) -> list[tuple[int, int]]:
    """(tokens, peak bytes) of the sizes that were tried: the two smallest, then each whose peak is expected within `limit`."""
    found: list[tuple[int, int]] = []
    for tokens in SIZES:
        if len(found) > 1 and _next_peak(found) > limit:
            break
        try:
            found.append((tokens, peak_of(tokens)))
        except torch.OutOfMemoryError:
            break
    return found


def _next_peak(found: Sequence[tuple[int, int]]) -> int:
    (_, before), (_, last) = found[-2:]
    return last + GROWTH * max(0, last - before)


def _forward_and_backward(
    module: TokenLogps, masters: Masters, settings: TrainSettings, tokens: int, shared: bool, device: torch.device
) -> None:
    """What a training step does to one pack of about `tokens` random tokens."""
    draw = random.Random(0)
    vocabulary = module.model.config.get_text_config().vocab_size

    def some(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocabulary) for _ in range(count))

    nothing = (Message("assistant", ""),)
    each = PROMPT + 2 * COMPLETION if shared else 2 * (PROMPT + COMPLETION)
    rows = []
    for _ in range(max(1, tokens // each)):
        prompt = some(PROMPT)
        rows += [Demonstration("", nothing, nothing, prompt, some(COMPLETION)) for _ in range(2)]
    length = settings.max_pack_length
    for pack in build_packs(rows, range(len(rows)), max_pack_tokens=1 << 30, shared=shared, max_pack_length=length):
        module(pack.to(device)).sum().backward()
        masters.accumulate()
