"""Per-token log-probabilities of packs: the one forward that training, reference and audit share.

Shapes: R rows, T tokens of a row, N completion tokens, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from selfplay.train.pack import NO_BRANCH, PADDING, Pack

CHUNK_ELEMENTS = 1 << 26  # logits at a time: 256 MiB in fp32
Mask = Tensor | dict[str, Tensor]


class TokenLogps(nn.Module):
    """Log-probability in nats of every completion token of a pack, shape (N,), fp32.

    The decoder runs over the rows, the head on the N predicting places only, in chunks that are recomputed in the
    backward pass, so the peak does not grow with N x V. accelerate prepares this module: calling decoder and head apart
    would go round DDP's hooks.
    """

    def __init__(self, model: Any, *, shared: bool) -> None:
        super().__init__()
        self.model = model
        self.shared = shared
        config = model.config.get_text_config()
        # families scale or cap their logits after the head; the probe at load compares with the model's own logits
        self.scale = float(config.to_dict().get("logit_scale") or 1.0) / float(
            config.to_dict().get("logits_scaling") or 1.0
        )
        self.softcap = config.to_dict().get("final_logit_softcapping")

    def forward(self, pack: Pack) -> Tensor:
        # rows padded on the right have the default positions, and recurrent models take none
        positions = {"position_ids": pack.position_ids_RT} if self.shared else {}
        hidden_RTD = self.model.base_model(
            input_ids=pack.input_ids_RT,
            attention_mask=self.mask(pack),
            use_cache=False,  # with a cache, restarting positions would be taken for another kind of packing
            **positions,
        ).last_hidden_state
        hidden_ND = hidden_RTD.reshape(-1, hidden_RTD.shape[-1])[pack.predict_N]
        head = self.model.get_output_embeddings()
        rows = max(1, CHUNK_ELEMENTS // head.weight.shape[0])
        chunks = zip(torch.split(hidden_ND, rows), torch.split(pack.target_N, rows), strict=True)
        if len(hidden_ND) <= rows or not torch.is_grad_enabled():
            parts = [self._logps(hidden, target) for hidden, target in chunks]
        else:
            parts = [checkpoint(self._logps, hidden, target, use_reentrant=False) for hidden, target in chunks]
        return torch.cat(parts)

    def _logps(self, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
        logits_NV: Tensor = self.model.get_output_embeddings()(hidden_ND).float()
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV.gather(1, target_N[:, None])[:, 0] - logits_NV.logsumexp(1)

    def mask(self, pack: Pack) -> Mask:
        """The attention mask in the form that this model takes: 2-D for plain rows, else 4-D, one per kind of layer."""
        if not self.shared:
            return (pack.segment_RT != PADDING).long()
        config = self.model.config.get_text_config()
        kinds = set(config.layer_types) if "layer_types" in config.to_dict() and config.layer_types else set()
        window = config.to_dict().get("sliding_window")
        full = attention_mask(pack, window=None)
        if kinds - {"full_attention"}:
            # one tensor for all layers would silently drop the window
            return {
                "full_attention": self._form(full),
                "sliding_attention": self._form(attention_mask(pack, window=window)),
            }
        if window is not None and not kinds:
            return self._form(attention_mask(pack, window=window))
        return self._form(full)

    def _form(self, mask_R1TT: Tensor) -> Tensor:
        if self.model.config._attn_implementation != "eager":
            return mask_R1TT
        dtype = self.model.dtype
        return torch.zeros(mask_R1TT.shape, dtype=dtype, device=mask_R1TT.device).masked_fill(
            ~mask_R1TT, torch.finfo(dtype).min
        )


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
