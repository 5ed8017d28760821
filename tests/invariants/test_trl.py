"""The first steps are TRL's: same rows, same order, AdamW, fp32. And losses that another trainer of TRL's has are its own."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import job_of, steps
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM

from selfplay import store
from selfplay.chat import Chat
from selfplay.losses import PairLogps, reward_metrics, sigmoid, simpo
from selfplay.train.loop import run_training
from selfplay.train.rows import demonstration_of
from selfplay.types import Demonstration, Message, PreferencePair, Prompt, prompt_id

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


def turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    """What all runs of TRL share."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 3,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "max_length": None,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        **changes,
    }


def trl_steps(model: Path, pairs: Sequence[PreferencePair], folder: Path, **changes: Any) -> list[dict[str, float]]:
    """What TRL logs of its steps over the pairs, which it tokenizes by itself, to the same ids."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": turns(p.prompt), "chosen": turns(p.chosen), "rejected": turns(p.rejected)} for p in pairs]
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=DPOConfig(**arguments(folder, **changes)),
        train_dataset=Dataset.from_list(rows),
        processing_class=Chat.load(str(model)).tokenizer,
    )
    for column in ("prompt", "chosen", "rejected"):
        assert trainer.train_dataset[f"{column}_ids"] == [list(getattr(p, f"{column}_token_ids")) for p in pairs]
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def assert_same_steps(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, float]], names: Sequence[str]) -> None:
    assert len(ours) == len(theirs)
    for own, their in zip(ours, theirs, strict=True):
        assert own["learning_rate"] == pytest.approx(their["learning_rate"], rel=1e-9)
        for name in names:
            assert own[name] == pytest.approx(their[name], rel=1e-4, abs=1e-4), (own["step"], name)


CHECKPOINTING = pytest.mark.filterwarnings("ignore:.*checkpointing` is deprecated:FutureWarning")  # TRL's own defaults
# a loss, and what TRL and we are told beside it; sft is a mean over a batch's tokens there, so there a pair is a batch
SAME: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss_type": ["sigmoid"]},
    "hinge": {"loss_type": ["hinge"], "beta": 0.3},
    "ipo": {"loss_type": ["ipo"], "beta": 0.5},
    "sppo_hard": {"loss_type": ["sppo_hard"], "beta": 0.05},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"], "beta": 5.0},
    "a list": {"loss_type": ["sigmoid", "ipo"], "loss_weights": [0.7, 0.2]},
    "sigmoid and sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.4], "batch": 1},
}


@CHECKPOINTING
@pytest.mark.parametrize("case", sorted(SAME))
def test_the_first_steps_equal_those_of_trl(case: str, model: Path, tmp_path: Path) -> None:
    """Losses and gradients of all steps, the first from equal weights and the later ones from weights that moved."""
    told = dict(SAME[case])
    batch, pairs = told.pop("batch", 3), pairs_of(Chat.load(str(model)))
    run = {"num_train_epochs": 2 if batch == 3 else 1, "warmup_steps": 2, "learning_rate": 1e-3}
    run_training(job_of(tmp_path, model, pairs, shuffle=False, batch_size=batch, **run, **told))
    ours = steps(tmp_path)
    theirs = trl_steps(model, pairs, tmp_path / "trl", per_device_train_batch_size=batch, **run, **told)
    assert len(ours) == (6 if batch == 3 else 9)
    assert_same_steps(ours, theirs, NEAR)
    for own, their in zip(ours, theirs, strict=True):
        assert own["rewards/accuracies"] == pytest.approx(their["rewards/accuracies"])
    assert max(row["grad_norm"] for row in ours) > 1  # clipped at least once
    assert max(abs(row["rewards/chosen"]) for row in ours) > 0.1  # and it moved


@CHECKPOINTING
def test_sft_equals_trl_s_where_a_row_is_a_step_and_else_counts_rows_alike(model: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    chosen = [demonstration_of(pair) for pair in pairs_of(Chat.load(str(model)))]
    data = Dataset.from_list([{"prompt": turns(d.prompt), "completion": turns(d.completion)} for d in chosen])

    def theirs(folder: Path, **changes: Any) -> list[dict[str, float]]:
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            args=SFTConfig(**arguments(folder, num_train_epochs=1, **changes)),
            train_dataset=data,
            processing_class=Chat.load(str(model)).tokenizer,
        )
        whole = [list(d.prompt_token_ids + d.completion_token_ids) for d in chosen]
        assert trainer.train_dataset["input_ids"] == whole
        trainer.train()
        return [row for row in trainer.state.log_history if "loss" in row]

    def ours(name: str, **changes: Any) -> list[dict[str, Any]]:
        told = {"loss_type": "sft", "shuffle": False, "warmup_steps": 2, "learning_rate": 1e-3, **changes}
        job = job_of(tmp_path / name, model, [], **told)
        store.write_records(tmp_path / name / "pairs.jsonl", chosen, Demonstration)
        run_training(job)
        return steps(tmp_path / name)

    alone = theirs(tmp_path / "trl", per_device_train_batch_size=1)
    assert_same_steps(ours("alone", batch_size=1), alone, ("loss", "grad_norm"))
    # with more rows a step: theirs is a mean over tokens, ours over rows. The first step starts from equal weights
    still = ours("still", batch_size=1, learning_rate=1e-12)[:3]
    lengths = [len(d.completion_token_ids) for d in chosen[:3]]
    by_token = sum(n * row["loss"] for n, row in zip(lengths, still, strict=True)) / sum(lengths)
    assert theirs(tmp_path / "trl-batch")[0]["loss"] == pytest.approx(by_token, rel=1e-4)
    assert ours("batch", batch_size=3)[0]["loss"] == pytest.approx(sum(row["loss"] for row in still) / 3, rel=1e-4)
    assert abs(by_token - sum(row["loss"] for row in still) / 3) > 1e-3


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", ["simpo", "sigmoid"])
def test_simpo_and_label_smoothing_are_those_of_trl_s_cpo_trainer(name: str, smoothing: float) -> None:
    """Its loss is a function of two logps. SimPO's are averaged over tokens; cDPO is CPO on log-ratios in their place."""
    from trl.experimental.cpo import CPOTrainer

    draw = torch.Generator().manual_seed(0)
    values = [(-20 * torch.rand(16, generator=draw)).requires_grad_() for _ in range(2)]
    reference = [-20 * torch.rand(16, generator=draw) for _ in range(2)]
    lengths = [torch.randint(1, 9, (16,), generator=draw).float() for _ in range(2)]
    logps = PairLogps(*values, *reference, *lengths)
    if name == "simpo":
        ours = simpo(logps, beta=2.0, simpo_gamma=1.5, label_smoothing=smoothing)
        fed = [value / length for value, length in zip(values, lengths, strict=True)]
        logps = PairLogps(*values, None, None, *lengths)
    else:
        ours = sigmoid(logps, beta=2.0, label_smoothing=smoothing)
        fed = [value - base for value, base in zip(values, reference, strict=True)]
    trainer = SimpleNamespace(
        alpha=0.0,
        beta=2.0,
        simpo_gamma=1.5,
        label_smoothing=smoothing,
        loss_type=name,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )
    theirs, chosen_rewards, rejected_rewards = CPOTrainer.cpo_loss(trainer, *fed)
    assert torch.allclose(ours, theirs, atol=1e-5)
    for own, their in zip(*(torch.autograd.grad(loss.sum(), values) for loss in (ours, theirs)), strict=True):
        assert torch.allclose(own, their, atol=1e-6)
    rewards = reward_metrics(logps, 2.0)
    assert rewards["rewards/chosen"] == pytest.approx(chosen_rewards.sum().item(), rel=1e-5)
    assert rewards["rewards/rejected"] == pytest.approx(rejected_rewards.sum().item(), rel=1e-5)
