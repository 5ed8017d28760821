"""Attention over packs, block by block: a completion's queries meet its prompt and itself, and nothing else is computed.

A dense mask over a pack of T tokens costs T x T, most of it for pairs of places that don't see each other. Transformers
calls `packed_attention` under the name IMPLEMENTATION; the blocks travel with the mask, so models need no change. A GPU takes
all blocks at once (flash.py).
Shapes: B rows, H query heads, K key heads, G = H / K, T tokens, D head size, q queries and k keys of a block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from selfplay.train import flash

IMPLEMENTATION = "selfplay_packed"
MARK = "blocks"  # the attribute that a pack's mask carries
MAX_STORED_KEYS = 1024  # mean keys a query up to which a CPU keeps the probabilities for the backward pass


@dataclass(frozen=True, slots=True)
class Block:
    """Queries at places start..end see keys of the prompt at prompt_start..prompt_end, then their own.

    The block that is the prompt itself has no keys before its own.
    """

    prompt_start: int
    prompt_end: int
    start: int
    end: int

    @property
    def num_shared(self) -> int:
        """Keys of the prompt."""
        return self.prompt_end - self.prompt_start

    def keys(self, x_KTD: Tensor) -> Tensor:
        """Those keys (or values) that the block's queries may see, shape (K, k, D)."""
        own = x_KTD[:, self.start : self.end]
        return torch.cat([x_KTD[:, self.prompt_start : self.prompt_end], own], 1) if self.num_shared else own

    def hidden_qk(self, window: int | None, device: torch.device) -> Tensor:
        """Which keys a query may not see. A window counts positions, which run on from the prompt in every completion."""
        shared, count = self.num_shared, self.end - self.start
        query = torch.arange(shared, shared + count, device=device)[:, None]
        key = torch.arange(shared + count, device=device)
        return key > query if window is None else (key > query) | (query - key >= window)


@dataclass(frozen=True, eq=False)
class Blocks:
    """Those of a pack, in the order of its places. What a way of attending needs beside them is made when it is asked for."""

    parts: tuple[Block, ...]
    window: int | None
    device: torch.device

    @cached_property
    def hidden(self) -> tuple[Tensor, ...]:
        """Which keys the queries of each block may not see, boolean, shapes (q, k)."""
        return tuple(block.hidden_qk(self.window, self.device) for block in self.parts)

    @cached_property
    def layout(self) -> flash.Layout:
        """What the flash kernel takes."""
        spans = [(b.prompt_start, b.prompt_end, b.start, b.end) for b in self.parts]
        return flash.layout(spans, window=self.window, device=self.device)


def marked_mask(lengths: Sequence[Sequence[int]], *, rows: int, window: int | None, device: torch.device) -> Tensor:
    """What a model is given as its attention mask, shape (B, 1, T, T): no memory behind it, but the blocks with it.

    `lengths` are those of each prompt and its completions, row after row, and cover every place of the B `rows`.
    """
    blocks: list[Block] = []
    place = 0
    for prompt, *completions in lengths:
        first = place
        for number, count in enumerate((prompt, *completions)):
            blocks.append(Block(first, first + (prompt if number else 0), place, place + count))
            place += count
    mask = torch.zeros((), dtype=torch.bool, device=device).expand(rows, 1, place // rows, place // rows)
    setattr(mask, MARK, Blocks(tuple(blocks), window, device))
    return mask


def mask_blocks(mask: Tensor | None) -> Blocks:
    """Those that such a mask carries."""
    found: Blocks = getattr(mask, MARK)
    return found


def register() -> None:
    """Makes `attn_implementation=IMPLEMENTATION` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, packed_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query (B, H, T, D), key and value (B, K, T, D) -> (B, T, H, D).

    Without blocks on the mask it is transformers' own sdpa.
    """
    if not hasattr(attention_mask, MARK):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        plain: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)[0]
        return plain, None
    blocks = mask_blocks(attention_mask)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    stored = sum((b.end - b.start) * (b.num_shared + b.end - b.start) for b in blocks.parts)
    # the rows one behind another: the places of blocks count through all of them
    if flash.takes(query, key, value, window=blocks.window):
        q_THD, k_TKD, v_TKD = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        out = flash.attend(q_THD, k_TKD, v_TKD, scale, blocks.layout)
        return out.view(query.shape[0], -1, *out.shape[1:]), None
    q_HTD, k_KTD, v_KTD = (x.transpose(0, 1).flatten(1, 2) for x in (query, key, value))
    if query.device.type == "cpu" and stored <= MAX_STORED_KEYS * q_HTD.shape[1]:
        out = _StoredAttention.apply(q_HTD, k_KTD, v_KTD, scale, blocks)  # type: ignore[no-untyped-call]
    else:
        out = sdpa_blocks(q_HTD, k_KTD, v_KTD, scale, blocks)
    return out.view(query.shape[0], -1, *out.shape[1:]), None


def sdpa_blocks(q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, scale: float, blocks: Blocks) -> Tensor:
    """Attention within blocks by torch's own, a call for each; shape (T, H, D)."""
    outs = []
    counts = [block.end - block.start for block in blocks.parts]
    groups = len(q_HTD) // len(k_KTD)
    if groups > 1 and q_HTD.device.type != "cpu":
        # beside a mask not every release has a fused kernel that shares key heads; without one torch keeps all scores
        k_KTD, v_KTD = (x.repeat_interleave(groups, 0) for x in (k_KTD, v_KTD))
    for block, hidden_qk, q_HqD in zip(blocks.parts, blocks.hidden, torch.split(q_HTD, counts, 1), strict=True):
        o_1HqD = F.scaled_dot_product_attention(
            q_HqD[None],
            block.keys(k_KTD)[None],
            block.keys(v_KTD)[None],
            attn_mask=~hidden_qk,
            scale=scale,
            enable_gqa=len(q_HTD) != len(k_KTD),
        )
        outs.append(o_1HqD[0])
    return torch.cat(outs, 1).transpose(0, 1)


class _StoredAttention(torch.autograd.Function):
    """Attention with its probabilities kept: for the short blocks of a CPU about twice as fast as sdpa there.

    With P = softmax(scale QK') of a block: dV = P'dO, dS = softmax's backward of dO V', dQ = scale dS K, dK = scale dS'Q.
    Sums over the completions of a prompt are taken in fp32.
    """

    @staticmethod
    def forward(ctx: Any, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, scale: float, blocks: Blocks) -> Tensor:
        heads = len(q_HTD)
        out_THD = torch.empty(q_HTD.shape[1], heads, v_KTD.shape[-1], dtype=q_HTD.dtype)
        probabilities = []
        for (block, q), hidden_qk in zip(_queries(blocks.parts, q_HTD, len(k_KTD)), blocks.hidden, strict=True):
            count = block.end - block.start
            nothing = q.new_empty(1)
            scores = torch.baddbmm(nothing, q, block.keys(k_KTD).transpose(1, 2), beta=0, alpha=scale)
            p_Hqk = scores.view(heads, count, -1).masked_fill_(hidden_qk, float("-inf")).softmax(-1)
            out = torch.bmm(p_Hqk.view(len(k_KTD), -1, p_Hqk.shape[-1]), block.keys(v_KTD))
            out_THD[block.start : block.end] = out.view(heads, count, -1).transpose(0, 1)
            probabilities.append(p_Hqk)
        ctx.save_for_backward(q_HTD, k_KTD, v_KTD, *probabilities)
        ctx.scale, ctx.blocks = scale, blocks.parts
        return out_THD

    @staticmethod
    def backward(ctx: Any, grad_THD: Tensor) -> Any:
        q_HTD, k_KTD, v_KTD, *probabilities = ctx.saved_tensors
        heads, groups = len(q_HTD), len(k_KTD)
        grad_q, grad_k, grad_v = torch.empty_like(q_HTD), torch.empty_like(k_KTD), torch.empty_like(v_KTD)
        prompt_k = prompt_v = torch.empty(0)
        queries, grads = _queries(ctx.blocks, q_HTD, groups), _queries(ctx.blocks, grad_THD.transpose(0, 1), groups)
        for number, ((block, q), (_, grad), p_Hqk) in enumerate(zip(queries, grads, probabilities, strict=True)):
            count, shared = block.end - block.start, block.num_shared
            p = p_Hqk.view(groups, -1, p_Hqk.shape[-1])
            dp_Hqk = torch.bmm(grad, block.keys(v_KTD).transpose(1, 2)).view_as(p_Hqk)
            ds = torch._softmax_backward_data(dp_Hqk, p_Hqk, -1, p_Hqk.dtype).mul_(ctx.scale).view_as(p)
            grad_q[:, block.start : block.end] = torch.bmm(ds, block.keys(k_KTD)).view(heads, count, -1)
            dk, dv = torch.bmm(ds.transpose(1, 2), q), torch.bmm(p.transpose(1, 2), grad)
            if not shared:
                first, prompt_k, prompt_v = block, dk.float(), dv.float()
            else:
                prompt_k += dk[:, :shared]
                prompt_v += dv[:, :shared]
                grad_k[:, block.start : block.end] = dk[:, shared:]
                grad_v[:, block.start : block.end] = dv[:, shared:]
            if number + 1 == len(ctx.blocks) or not ctx.blocks[number + 1].num_shared:
                grad_k[:, first.start : first.end] = prompt_k
                grad_v[:, first.start : first.end] = prompt_v
        return grad_q, grad_k, grad_v, None, None


def _queries(blocks: Sequence[Block], x_HTD: Tensor, groups: int) -> Iterator[tuple[Block, Tensor]]:
    """Each block with its rows of x, those of the heads that share a key head together: shape (K, G q, D)."""
    for block in blocks:
        yield block, x_HTD[:, block.start : block.end].reshape(groups, -1, x_HTD.shape[-1])
