"""An fp32 weight in two halves of 16 bits, so that weights that compute in bf16 take 4 bytes and not 6.

The upper half is the bf16 number that the model computes with: the weight rounded to the nearest, a half away from zero. The
lower half is an int16 that is added to its bits: bits = (upper << 16) + lower, exactly. torch's own cast rounds a half to the
even neighbour, and then a half could not be told from its mirror image; one weight in 65,536 lies at a half.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNKS = {"cpu": 1 << 16, "cuda": 1 << 24}  # values at a time: a core's cache, or what keeps a GPU busy
HALF = 1 << 15


def split(weight: Tensor, upper: Tensor, lower: Tensor) -> None:
    """Writes the halves of an fp32 weight into a bf16 and an int16 tensor of its shape. All are contiguous."""
    for bits, high, low in _chunks(weight, upper, lower):
        low.copy_(bits)  # an integer that is too large loses its upper bits
        high.copy_((bits + HALF) >> 16)


def join(upper: Tensor, lower: Tensor, weight: Tensor) -> None:
    """Writes the fp32 weight that `split` was given."""
    for bits, high, low in _chunks(weight, upper, lower):
        bits.copy_(high).bitwise_left_shift_(16).add_(low)


def _chunks(weight: Tensor, upper: Tensor, lower: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    size = CHUNKS[weight.device.type]
    bits, high = weight.view(-1).view(torch.int32), upper.view(-1).view(torch.int16)
    return zip(*(torch.split(part, size) for part in (bits, high, lower.view(-1))), strict=True)
