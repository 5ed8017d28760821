"""An fp32 weight in two halves of 16 bits, so that weights that compute in bf16 take 4 bytes and not 6.

The upper half is the bf16 number that the model computes with: the weight rounded to the nearest, a half away from zero. The
lower half is an int16 that is added to its bits: bits = (upper << 16) + lower, exactly. torch's own cast rounds a half to the
even neighbour, and then a half could not be told from its mirror image; one weight in 65,536 lies at a half.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNKS = {"cpu": 1 << 17, "cuda": 1 << 24}  # values at a time: a core's cache, or what keeps a GPU busy
HALF = 1 << 15


def split(weight: Tensor, upper: Tensor, lower: Tensor) -> None:
    """Writes the halves of an fp32 weight into a bf16 and an int16 tensor of its shape. All are contiguous."""
    bits, high = weight.view(torch.int32), upper.view(torch.int16)
    for whole, high_part, low_part in _chunks(bits, high, lower):
        low_part.copy_(whole)  # an integer that is too large loses its upper bits
        high_part.copy_((whole + HALF).bitwise_right_shift_(16))


def join(upper: Tensor, lower: Tensor, weight: Tensor) -> None:
    """Writes the fp32 weight that `split` was given."""
    for whole, high_part, low_part in _chunks(weight, upper, lower):
        whole.copy_(high_part)  # the same number, whose lower bits are 0
        whole.view(torch.int32).add_(low_part)


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    size = CHUNKS[tensors[0].device.type]
    return zip(*(torch.split(tensor.view(-1), size) for tensor in tensors), strict=True)
