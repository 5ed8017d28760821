"""Tiny reward models with random heads, and groups for them to judge."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny import CONFIG, TEMPLATE, make_tiny_tokenizer

from selfplay.types import Completion, Group, Message, Prompt, prompt_id

TEXTS = ("the thing", "I sing in the rain, and then again and again.", "no", "and the end", "")


def make_reward_model(
    folder: Path,
    *,
    seed: int = 0,
    family: str = "llama",
    num_labels: int = 1,
    pad: str | None = "<|pad|>",
    chat_template: str | None = TEMPLATE,
    padding_side: str = "right",
    added: Sequence[str] = (),
    **config: Any,
) -> Path:
    """A classifier with a random head in fp32. `pad` is the token that the config names, None for none."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    tokenizer = make_tiny_tokenizer(chat_template=chat_template, added=added)
    tokenizer.padding_side = padding_side
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1}
    ids["pad_token_id"] = None if pad is None else tokenizer.convert_tokens_to_ids(pad)
    settings = AutoConfig.for_model(family, **{**CONFIG, **ids, "num_labels": num_labels, **config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(settings, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def group_of(ask: str, *texts: str) -> Group:
    messages = (Message("user", ask),)
    return Group(Prompt(prompt_id(messages), messages), (1,), tuple(Completion(text, (1,)) for text in texts))
