"""What training holds, in bytes, by numbers of weights and tokens: the trainer and a plan of a run count alike. Loads no torch.

A token is kept for the backward pass as activations.py leaves it in a model of Llama's kind: the inputs of both norms, the
projections and what attention gives, and the two halves of the MLP.
"""

from dataclasses import dataclass

from selfplay.train.settings import STATE_BYTES

CPU_PACK_TOKENS = 2048
DENSE_PACK_LENGTH = 2048  # a dense mask of a row costs the square of its length: 4 MiB here
SIZES = tuple(1 << n for n in range(8, 17))  # tokens of the packs that are tried: 256 to 65,536
SHARE = 0.8  # of the memory that is free beside the optimizer's state, for packs; blocks of many sizes leave holes
PROMPT, COMPLETION = 64, 96  # tokens of the packs that are tried; a prompt has two completions
CHUNK_ELEMENTS = 1 << 23  # logits in fp32 at a time: 32 MiB
# On a GPU 256 MiB: each chunk reads the head's weight once, and its gradient in fp32 twice. With 128,256 tokens 32 MiB are 65
# rows, for which that takes several times as long as their products.
GPU_CHUNK_ELEMENTS = 1 << 26
STORED_ELEMENTS = 1 << 27  # logits kept for the backward pass: 256 MiB in bf16
MASTER_BYTES = 4  # of a weight that trains: in fp32, or as two halves of it
GRADIENT_BYTES = 4
FOUR_BITS = 0.52  # bytes of a weight in nf4 with its doubly quantized scales


def optimizer_bytes(num_weights: int, num_in_tables: int, optim: str) -> int:
    """What the optimizer takes at its first step. 8-bit states of embeddings, `num_in_tables` of the weights, stay in fp32."""
    wide = num_in_tables if optim == "adamw_bnb_8bit" else 0
    return STATE_BYTES["adamw_torch"] * wide + STATE_BYTES[optim] * (num_weights - wide)


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Those of a decoder. `inner` is the MLP's."""

    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_size: int
    inner: int
    vocabulary: int

    def cache_bytes(self, width: int) -> int:
        """Of one token in an engine's cache, where a number takes `width` bytes."""
        return 2 * self.layers * self.key_heads * self.head_size * width


@dataclass(frozen=True, slots=True)
class PackSize:
    """A pack of `tokens`, of which `completion_tokens` are trained on, in a dtype of `width` bytes. `keys` are those of a
    completion's query where their probabilities are kept: on a CPU.
    """

    tokens: int
    completion_tokens: int
    width: int
    keys: int
    on_gpu: bool
    checkpointing: bool

    def bytes_of(self, model: Dimensions) -> int:
        """What its forward and backward pass hold at their peak beside weights and gradients: what every layer keeps, or its
        input alone, and again a layer whose turn it is in the backward pass.
        """
        layer = self.layer_bytes(model)
        each = self.width * self.tokens * model.hidden if self.checkpointing else layer
        return model.layers * each + (2 if self.checkpointing else 1) * layer + self._head(model)

    def layer_bytes(self, model: Dimensions) -> int:
        """What one layer keeps for the backward pass."""
        queries, keys = model.heads * model.head_size, model.key_heads * model.head_size
        numbers = 2 * model.hidden + 2 * queries + 2 * keys + 2 * model.inner + model.heads * self.keys
        return self.width * self.tokens * numbers

    def _head(self, model: Dimensions) -> int:
        logits = self.completion_tokens * model.vocabulary
        kept = self.width * logits if logits <= STORED_ELEMENTS else 0
        chunk = min(logits, GPU_CHUNK_ELEMENTS if self.on_gpu else CHUNK_ELEMENTS)
        return kept + 3 * 4 * chunk  # logits, their softmax and one of the two in the making
