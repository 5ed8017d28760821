"""How many floating-point operations a piece of training needs, so that a time can be judged.

A forward costs 2 FLOPs per weight and token, a backward 4. The head is counted apart, on the tokens whose logits are needed.
Attention is left out: at these lengths it is below a tenth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from selfplay.types import PreferencePair


@dataclass(frozen=True, slots=True)
class Size:
    """Weights of the decoder without embeddings, and of the head (vocabulary x hidden)."""

    decoder: int
    head: int


def shared_flops(size: Size, pairs: Sequence[PreferencePair], *, reference_pass: bool) -> float:
    """The least that these pairs need: every prompt once, every distinct completion once, the head on completions only."""
    prompts = {p.prompt_token_ids for p in pairs}
    completions = {(p.prompt_token_ids, ids) for p in pairs for ids in (p.chosen_token_ids, p.rejected_token_ids)}
    head_tokens = sum(len(ids) for _, ids in completions)
    tokens = sum(map(len, prompts)) + head_tokens
    return _flops(size, tokens, head_tokens, reference_pass)


def padded_flops(size: Size, pairs: Sequence[PreferencePair], *, batch_size: int, reference_pass: bool) -> float:
    """What a trainer does that forwards prompt and completion in rows, padded to the longest of a batch, the head on all."""
    tokens = 0
    for start in range(0, len(pairs), batch_size):
        rows = [
            len(p.prompt_token_ids) + len(ids)
            for p in pairs[start : start + batch_size]
            for ids in (p.chosen_token_ids, p.rejected_token_ids)
        ]
        tokens += len(rows) * max(rows)
    return _flops(size, tokens, tokens, reference_pass)


def _flops(size: Size, tokens: int, head_tokens: int, reference_pass: bool) -> float:
    passes = 4 if reference_pass else 3  # forward 1, backward 2, one more forward for the reference
    return 2.0 * passes * (size.decoder * tokens + size.head * head_tokens)
