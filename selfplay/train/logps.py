"""Per-token log-probabilities of packs: the one forward that training, reference and audit share.

Shapes: R rows, T tokens of a row, N completion tokens, D hidden, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfplay.train import attention
from selfplay.train.activations import keeping_less, replace_modules
from selfplay.train.memory import trim_memory
from selfplay.train.pack import NO_BRANCH, PADDING, Pack
from selfplay.train.sizes import CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS, STORED_ELEMENTS

Mask = Tensor | dict[str, Tensor]


class TokenLogps(nn.Module):
    """Log-probability in nats of every completion token of a pack, shape (N,), fp32.

    The decoder runs over the rows, the head on the N predicting places only and in chunks. accelerate prepares this
    module: calling decoder and head apart would go round DDP's hooks.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        replace_modules(model)
        config = model.config.get_text_config()
        # families scale or cap their logits after the head; the probe at load compares with the model's own logits
        self.scale = float(config.to_dict().get("logit_scale") or 1.0) / float(
            config.to_dict().get("logits_scaling") or 1.0
        )
        self.softcap = config.to_dict().get("final_logit_softcapping")

    def forward(self, pack: Pack) -> Tensor:
        # rows padded on the right have the default positions, and recurrent models take none
        positions = {"position_ids": pack.position_ids_RT} if pack.shared else {}
        with keeping_less() if torch.is_grad_enabled() else nullcontext():
            hidden_RTD = self.model.base_model(
                input_ids=pack.input_ids_RT,
                attention_mask=self.mask(pack),
                use_cache=False,  # with a cache, restarting positions would be taken for another kind of packing
                **positions,
            ).last_hidden_state
        if torch.is_grad_enabled():
            trim_memory(hidden_RTD.device)  # the head's chunks are larger than any hole that the layers leave
        hidden_ND = hidden_RTD.reshape(-1, hidden_RTD.shape[-1])[pack.predict_N]
        head = self.model.get_output_embeddings()
        logps: Tensor = _HeadLogps.apply(  # type: ignore[no-untyped-call]
            hidden_ND, head.weight, getattr(head, "bias", None), pack.target_N, self.scale, self.softcap
        )
        return logps

    def mask(self, pack: Pack) -> Mask:
        """The attention mask in the form that this model takes: 2-D for plain rows, else 4-D, one per kind of layer."""
        if not pack.shared:
            return (pack.segment_RT != PADDING).long()
        config = self.model.config.get_text_config()
        kinds = set(config.layer_types) if "layer_types" in config.to_dict() and config.layer_types else set()
        window = config.to_dict().get("sliding_window")
        if kinds - {"full_attention"}:
            # one tensor for all layers would silently drop the window
            return {"full_attention": self._form(pack, None), "sliding_attention": self._form(pack, window)}
        return self._form(pack, None if kinds else window)

    def _form(self, pack: Pack, window: int | None) -> Tensor:
        kind = self.model.config._attn_implementation
        if kind == attention.IMPLEMENTATION:
            rows, device = len(pack.input_ids_RT), pack.input_ids_RT.device
            return attention.marked_mask(pack.lengths, rows=rows, window=window, device=device)
        mask_R1TT = attention_mask(pack, window=window)
        if kind != "eager":
            return mask_R1TT
        dtype = self.model.dtype
        return torch.zeros(mask_R1TT.shape, dtype=dtype, device=mask_R1TT.device).masked_fill(
            ~mask_R1TT, torch.finfo(dtype).min
        )


class _HeadLogps(torch.autograd.Function):
    """log softmax(cap(scale (h W' + b)))[target], shape (N,), fp32, and its gradients.

    Logits are handled in chunks of rows. Up to STORED_ELEMENTS of them are kept in the compute dtype, and their gradient
    takes their place; beyond that they are computed anew in the backward pass, so the peak stops growing with N x V.
    d logp / d logits = onehot(target) - softmax.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        count, vocabulary = len(hidden_ND), len(weight_VD)
        store = any(ctx.needs_input_grad) and count * vocabulary <= STORED_ELEMENTS
        stored_NV = hidden_ND.new_empty(count, vocabulary) if store else None
        ctx.scale, ctx.softcap = scale, softcap
        lse_N, logps_N = (torch.empty(count, device=hidden_ND.device) for _ in range(2))
        for rows in _chunks(count, vocabulary, hidden_ND.device):
            raw = F.linear(hidden_ND[rows], weight_VD, bias_V)
            if stored_NV is not None:
                stored_NV[rows] = raw
            logits = _capped(raw.float(), scale, softcap)
            lse_N[rows] = logits.logsumexp(1)
            logps_N[rows] = logits.gather(1, target_N[rows, None])[:, 0] - lse_N[rows]
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N, lse_N, stored_NV)
        return logps_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> Any:
        hidden_ND, weight_VD, bias_V, target_N, lse_N, stored_NV = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_ND)
        train_weight, train_bias = ctx.needs_input_grad[1], bias_V is not None and ctx.needs_input_grad[2]
        sum_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if train_weight and stored_NV is None else None
        sum_bias = torch.zeros_like(bias_V, dtype=torch.float32) if train_bias else None
        for rows in _chunks(len(hidden_ND), len(weight_VD), hidden_ND.device):
            raw = stored_NV[rows] if stored_NV is not None else F.linear(hidden_ND[rows], weight_VD, bias_V)
            logits = _capped(raw.float(), ctx.scale, ctx.softcap)
            slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap).square()
            scaled_N = grad_N[rows, None] * ctx.scale
            grad = logits.sub_(lse_N[rows, None]).exp_().mul_(-scaled_N)
            grad = grad.scatter_add_(1, target_N[rows, None], scaled_N)
            if slope is not None:
                grad *= slope
            if sum_bias is not None:
                sum_bias += grad.sum(0)
            grad = grad.to(raw.dtype)
            grad_hidden[rows] = grad @ weight_VD
            if stored_NV is not None:
                stored_NV[rows] = grad
            elif sum_weight is not None:
                sum_weight += grad.T @ hidden_ND[rows]
        if train_weight and stored_NV is not None:
            sum_weight = stored_NV.T @ hidden_ND
        grad_weight = sum_weight.to(weight_VD.dtype) if sum_weight is not None else None
        grad_bias = sum_bias.to(bias_V.dtype) if sum_bias is not None else None
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _chunks(count: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    size = max(1, (CHUNK_ELEMENTS if device.type == "cpu" else GPU_CHUNK_ELEMENTS) // vocabulary)
    return (slice(start, start + size) for start in range(0, count, size))


def _capped(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """What some families do to their logits after the head."""
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def attention_mask(pack: Pack, *, window: int | None) -> Tensor:
    """Which place sees which, boolean, shape (R, 1, T, T): earlier places of the same prompt, of the prompt itself or of
    the same completion, at a distance in *positions* below the window.
    """
    seg, branch, pos = pack.segment_RT, pack.branch_RT, pack.position_ids_RT
    length = seg.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=seg.device).tril()
    same_RTT = (seg[:, :, None] == seg[:, None, :]) & causal_TT
    same_RTT &= (branch[:, None, :] == NO_BRANCH) | (branch[:, None, :] == branch[:, :, None])
    if window is not None:
        same_RTT &= (pos[:, :, None] - pos[:, None, :]) < window
    return same_RTT[:, None]
