"""`train.full_determinism`: kernels whose sums have one order, so that a job that goes on gives the same bits on a GPU too."""

import contextlib
import os
from collections.abc import Iterator

import torch

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_FIXED = ":4096:8"  # cuBLAS then has a buffer for each stream, and the same sums whichever stream is first


@contextlib.contextmanager
def full_determinism(wanted: bool) -> Iterator[None]:
    """In the block torch takes an operation's deterministic kernel, where it is `wanted`; one that has none is torch's
    RuntimeError, which names it. On a CPU training needs none of this.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault(CUBLAS, CUBLAS_FIXED)  # read when a device is first computed on
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
