"""Memory between packs, and work in smaller packs where the device's memory runs out."""

import ctypes
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from selfplay.train.world import World

R = TypeVar("R")


class SmallerPacksError(Exception):
    """Memory ran out where weights are sharded: the other processes are in the middle of a pass with this one, so all of them
    must start again, with packs of at most `max_pack_tokens`.
    """

    def __init__(self, max_pack_tokens: int) -> None:
        super().__init__(f"packs of at most {max_pack_tokens} tokens")
        self.max_pack_tokens = max_pack_tokens


MIN_PACK_TOKENS = 64  # most pairs are longer: below it nothing would be split any more
# glibc's own; other C libraries have none
_LIBC: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
_TRIM: Callable[[int], int] | None = _LIBC.malloc_trim if hasattr(_LIBC, "malloc_trim") else None


def free_memory() -> None:
    """Gives the device what nothing holds any more: blocks of the old sizes would stand in the way of new ones."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def trim_memory(device: torch.device) -> None:
    """Gives the system what a phase on a CPU has freed; nothing on other devices, which take blocks anew from what is free.
    glibc keeps every block of less than 32 MiB, with holes between what lives on, and the next phase wants other sizes: a
    training process then grows to half a gigabyte more. It takes some hundredths of a second.
    """
    if device.type == "cpu" and _TRIM is not None:
        _TRIM(0)


def in_smaller_packs(
    work: Callable[[int], R], max_pack_tokens: int, *, halved: Callable[[int], None], world: World
) -> R:
    """What `work` returns at the first cap that fits all processes: `max_pack_tokens`, or half of it, and so on. `halved`
    gets each cap that is tried after it. torch.OutOfMemoryError where none fits, SmallerPacksError where weights are sharded.
    """
    while True:
        done: list[R] = []
        try:
            done.append(work(max_pack_tokens))
        except torch.OutOfMemoryError as error:
            if max_pack_tokens < 2 * MIN_PACK_TOKENS:
                raise
            if world.sharding is not None:
                raise SmallerPacksError(max_pack_tokens // 2) from error
        if not world.most(not done)[0]:
            return done[0]
        # outside the except block, whose traceback holds what the failed work took
        done.clear()
        max_pack_tokens //= 2
        free_memory()
        halved(max_pack_tokens)
