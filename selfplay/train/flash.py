"""Attention over packs on CUDA: all blocks of a pack in one call of the flash kernel that torch brings.

torch's scaled_dot_product_attention is no way there: beside a mask few of its kernels share key heads, and where none does it
holds all scores; on Hopper it may build a cuDNN plan for every new pair of lengths; and a call for each block keeps a GPU
waiting for Python. The kernel takes lists of queries and keys one behind another, the last query of a list beside its last
key: a completion's list of keys is its prompt, then itself, which is what it may see.
Shapes: N blocks, T tokens, X keys of all blocks, S of them those of a prompt, H query heads, K key heads, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_SIZE, HEAD_STEP = 256, 8  # the kernel's
AGREES = 0.05  # relative L2 of outputs and gradients; rounding to bf16 gives 0.005, counting from the first key 0.7


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where the keys of all blocks come from, and where each block's queries and keys end."""

    place_X: Tensor  # of every key among the tokens
    own_T: Tensor  # of every token, among the X keys, as its own block has it
    shared_S: Tensor  # those of the X keys that completions have of their prompts
    query_ends_N: Tensor  # int32, and a 0 before them
    key_ends_N: Tensor
    most_queries: int
    most_keys: int
    window: int | None

    @property
    def kernel_window(self) -> dict[str, int]:
        """The keys to the left and right of a query's place that it sees beside its own; -1 is all of them."""
        return {"window_size_left": -1 if self.window is None else self.window - 1, "window_size_right": 0}


def layout(spans: Sequence[tuple[int, int, int, int]], *, window: int | None, device: torch.device) -> Layout:
    """That of blocks, each (start and end of its prompt, start and end of its own): they cover the T tokens in order."""
    places, owns, shareds = [], [], []
    queries, keys, most_queries, most_keys = [0], [0], 0, 0
    for prompt_start, prompt_end, start, end in spans:
        shared, own, before = prompt_end - prompt_start, end - start, keys[-1]
        places += [torch.arange(prompt_start, prompt_end), torch.arange(start, end)]
        shareds.append(torch.arange(before, before + shared))
        owns.append(torch.arange(before + shared, before + shared + own))
        queries.append(queries[-1] + own)
        keys.append(before + shared + own)
        most_queries, most_keys = max(most_queries, own), max(most_keys, shared + own)
    query_ends_N, key_ends_N = (torch.tensor(ends, dtype=torch.int32).to(device) for ends in (queries, keys))
    place_X, own_T, shared_S = (torch.cat(parts).to(device) for parts in (places, owns, shareds))
    return Layout(place_X, own_T, shared_S, query_ends_N, key_ends_N, most_queries, most_keys, window)


def takes(query: Tensor, key: Tensor, value: Tensor, *, window: int | None) -> bool:
    """Whether the kernel takes such tensors, (..., H or K, ..., D), and gives what it should on a trial."""
    heads, groups, size = query.shape[1], key.shape[1], query.shape[-1]
    if query.device.type != "cuda" or query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype:
        return False
    if size != value.shape[-1] or size % HEAD_STEP or size > MAX_HEAD_SIZE:
        return False
    return agrees(heads, groups, size, query.dtype, query.device, windowed=window is not None)


@lru_cache
def agrees(
    heads: int, groups: int, size: int, dtype: torch.dtype, device: torch.device, *, windowed: bool = False
) -> bool:
    """Whether the kernel's outputs and gradients are those of plain attention with a mask, on a small pack. False where
    there is no such kernel for this device.
    """
    from selfplay.train.attention import marked_mask, mask_blocks, sdpa_blocks

    blocks = mask_blocks(marked_mask([(9, 4, 7), (5,)], rows=1, window=6 if windowed else None, device=device))
    draw = torch.Generator().manual_seed(0)
    drawn = [
        torch.randn(25, number, size, generator=draw).to(device, dtype) for number in (heads, groups, groups, heads)
    ]
    scale, found = size**-0.5, []
    # a layer that is checkpointed counts what is kept: hooks of its own keep the trial out of that
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept):
        for exact in (False, True):
            q, k, v = ((x.float() if exact else x.clone()).requires_grad_() for x in drawn[:3])
            try:
                if exact:
                    out = sdpa_blocks(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), scale, blocks)
                else:
                    out = attend(q, k, v, scale, blocks.layout)
                grads = torch.autograd.grad(out, (q, k, v), drawn[3].to(out.dtype))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                return False
            found.append([x.float() for x in (out, *grads)])
    return all(bool((a - b).norm() <= AGREES * b.norm()) for a, b in zip(*found, strict=True))


def attend(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, scale: float, where: Layout) -> Tensor:
    """Attention within blocks, shape (T, H, D)."""
    out: Tensor = _Flash.apply(q_THD, k_TKD, v_TKD, scale, where)  # type: ignore[no-untyped-call]
    return out


class _Flash(torch.autograd.Function):
    """Keys and values are gathered anew for the backward pass: beside many completions a prompt's would be kept many times.
    Their gradients are summed over the completions of a prompt in fp32.
    """

    @staticmethod
    def forward(ctx: Any, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, scale: float, where: Layout) -> Tensor:
        out_THD, *rest = kernel_forward(q_THD, k_TKD[where.place_X], v_TKD[where.place_X], scale, where)
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, out_THD, *rest)
        ctx.scale, ctx.where = scale, where
        return out_THD

    @staticmethod
    def backward(ctx: Any, grad_THD: Tensor) -> Any:
        q_THD, k_TKD, v_TKD, out_THD, *rest = ctx.saved_tensors
        where: Layout = ctx.where
        keys, values = k_TKD[where.place_X], v_TKD[where.place_X]
        grad_q, *grads = kernel_backward(grad_THD, q_THD, keys, values, out_THD, rest, ctx.scale, where)
        return grad_q, *(_summed(grad, where) for grad in grads), None, None


def _summed(grad_XKD: Tensor, where: Layout) -> Tensor:
    summed = grad_XKD[where.own_T].float()
    summed.index_add_(0, where.place_X[where.shared_S], grad_XKD[where.shared_S].float())
    return summed.to(grad_XKD.dtype)


def kernel_forward(q_THD: Tensor, k_XKD: Tensor, v_XKD: Tensor, scale: float, where: Layout) -> list[Tensor]:
    """The output, and what the backward pass wants: logsumexp and two states of a generator that is not used."""
    found = torch.ops.aten._flash_attention_forward(
        q_THD,
        k_XKD,
        v_XKD,
        where.query_ends_N,
        where.key_ends_N,
        where.most_queries,
        where.most_keys,
        0.0,
        where.window is None,
        False,
        scale=scale,
        **where.kernel_window,
    )
    return list(found[:4])


def kernel_backward(
    grad_THD: Tensor,
    q_THD: Tensor,
    k_XKD: Tensor,
    v_XKD: Tensor,
    out_THD: Tensor,
    rest: Sequence[Tensor],
    scale: float,
    where: Layout,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values."""
    logsumexp, *states = rest
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        grad_THD,
        q_THD,
        k_XKD,
        v_XKD,
        out_THD,
        logsumexp,
        where.query_ends_N,
        where.key_ends_N,
        where.most_queries,
        where.most_keys,
        0.0,
        where.window is None,
        *states,
        scale=scale,
        **where.kernel_window,
    )
    return grads
