"""The first steps are TRL's: same rows, same order, AdamW, fp32."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from jobs import job_of
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM

from selfplay import store
from selfplay.chat import Chat
from selfplay.train.loop import run_training
from selfplay.types import Message, PreferencePair, Prompt, prompt_id

# TRL trains on what a template writes after the end token; ours writes nothing there, so both see the same ids.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROWS = (
    ("Name a bird.", "I sing in the rain", "no"),
    ("What is the sea and the sand?", "the thing", "and the end, then again in the rain"),
    ("Sing!", "the thing and the other thing", "in the end"),
    ("Name a bird.", "in the thing", "no"),
    ("And then?", "ring", "the string in the ring"),
    ("Sing!", "a", "in the end, the ending"),
    ("Why?", "and", "then"),
    ("How?", "in the thin rain", "then and there"),
    ("What is the sea and the sand?", "then", "the"),
)
EXACT = ("learning_rate", "rewards/accuracies")
NEAR = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("trl") / "model", chat_template=TEMPLATE)


def pairs_of(chat: Chat) -> list[PreferencePair]:
    made = []
    for question, better, worse in ROWS:
        messages = (Message("user", question),)
        prompt = Prompt(prompt_id(messages), messages)
        chosen, rejected = ((Message("assistant", text),) for text in (better, worse))
        ids = (chat.encode_completion(prompt, text) for text in (better, worse))
        made.append(PreferencePair(prompt.id, messages, chosen, rejected, chat.encode_prompt(prompt), *ids))
    return made


def trl_steps(model: Path, pairs: Sequence[PreferencePair], folder: Path) -> list[dict[str, float]]:
    """What TRL logs of 6 steps over the pairs, which it tokenizes by itself, to the same ids."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    def turns(messages: Sequence[Message]) -> list[dict[str, str]]:
        return [{"role": m.role, "content": m.content} for m in messages]

    rows = [{"prompt": turns(p.prompt), "chosen": turns(p.chosen), "rejected": turns(p.rejected)} for p in pairs]
    args = DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=3,
        num_train_epochs=2,
        learning_rate=1e-3,
        warmup_steps=2,
        max_length=None,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=Chat.load(str(model)).tokenizer,
    )
    for column in ("prompt", "chosen", "rejected"):
        assert trainer.train_dataset[f"{column}_ids"] == [list(getattr(p, f"{column}_token_ids")) for p in pairs]
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.filterwarnings("ignore:.*checkpointing` is deprecated:FutureWarning")  # TRL's own defaults
def test_the_first_steps_equal_those_of_trl(model: Path, tmp_path: Path) -> None:
    pairs = pairs_of(Chat.load(str(model)))
    run_training(
        job_of(
            tmp_path, model, pairs, shuffle=False, batch_size=3, num_train_epochs=2, warmup_steps=2, learning_rate=1e-3
        )
    )
    ours = store.read_json_lines(tmp_path / "out" / "train" / "steps.jsonl")
    theirs = trl_steps(model, pairs, tmp_path / "trl")
    assert len(ours) == len(theirs) == 6
    for own, their in zip(ours, theirs, strict=True):
        for name in EXACT:
            assert own[name] == pytest.approx(their[name], rel=1e-9), name
        for name in NEAR:
            assert own[name] == pytest.approx(their[name], rel=1e-4, abs=1e-4), (own["step"], name)
    assert max(row["grad_norm"] for row in ours) > 1  # clipped at least once
    assert ours[-1]["loss"] < 0.5  # and it moved
