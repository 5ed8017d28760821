"""A model of about 100,000 random parameters with a byte-level tokenizer and a chat template, made on the fly.

    path = make_tiny_model(tmp_path / "model")                      # Llama, fp32
    path = make_tiny_model(tmp_path / "gemma", family="gemma2", sliding_window=16)

Every text round-trips through its tokenizer. A few merges exist ("the", " the"), so that a text cut in the middle
tokenizes differently from its parts. The template writes a newline after each end of turn, as many real ones do.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SPECIAL = ("<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
# What tokenizers add that is not special: markup, and ordinary text. One mark stands in another, one is no ASCII.
MARKUP = ("<think>", "</think>", "<tool_call>", "[INST]", "<[INST]>", "<\uff5cUser\uff5c>")
ORDINARY = ("    ", "wren", "\n\n", "<b")
# "\u0120" is a space in the byte-level alphabet.
MERGES = [("t", "h"), ("th", "e"), ("\u0120", "the"), ("a", "n"), ("an", "d"), ("i", "n"), ("in", "g")]
TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# A head of 32 is the smallest that vLLM's CPU attention takes. The wide initial range makes peaked distributions:
# greedy decoding then has few near-ties.
CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "tie_word_embeddings": True,
}


def make_tiny_tokenizer(
    *,
    pad_is_eos: bool = False,
    chat_template: str | None = TEMPLATE,
    num_tokens: int | None = None,
    added: Sequence[str] = (),
) -> Any:
    """A fast byte-level BPE tokenizer: ids 0-5 are SPECIAL, then 256 bytes, then the merges, then words that no text becomes,
    up to `num_tokens`, for models that sample from more. It adds no bos by itself. `added` are tokens that are not special.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    tokens += [f"<{number}>" for number in range(len(tokens), num_tokens or 0)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=END if pad_is_eos else PAD,
        additional_special_tokens=[token for token in SPECIAL if token not in (BOS, END)],
        clean_up_tokenization_spaces=False,
    )
    fast.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    fast.chat_template = chat_template
    return fast


def make_tiny_model(
    folder: Path | str,
    *,
    seed: int = 0,
    family: str = "llama",
    pad_is_eos: bool = False,
    chat_template: str | None = TEMPLATE,
    added: Sequence[str] = (),
    **config: Any,
) -> Path:
    """Writes a model folder in fp32 safetensors and returns it. `family` is a transformers model type with a causal
    head (llama, mistral, qwen2, gemma2, gemma3_text, ...); `config` overrides CONFIG. The global random state stays as it was.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    tokenizer = make_tiny_tokenizer(pad_is_eos=pad_is_eos, chat_template=chat_template, added=added)
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    settings = AutoConfig.for_model(family, **{**CONFIG, **ids, **config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
