"""Training of a small reward model on preference pairs (Bradley and Terry 1952; Stiennon et al. 2020, arXiv:2009.01325).

B pairs, S sequences: the chosen ones of a batch, then the rejected.
"""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from selfplay.errors import DataError, NonFiniteError
from selfplay.generators.reward_model import Rewards, batches
from selfplay.progress import Reporter
from selfplay.recipe_reward import RewardTraining
from selfplay.recipe_train import TrainRecipe
from selfplay.train.model import copy_tokenizer, default_device
from selfplay.train.optim import Masters, make_optimizer, make_schedule
from selfplay.train.settings import TrainJob, settings_at
from selfplay.types import derive_seed


@dataclass(frozen=True, slots=True)
class TokenPair:
    """Token ids of two whole conversations that differ in the last turn."""

    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


def bradley_terry(chosen_B: Tensor, rejected_B: Tensor, *, centering: float) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected) + centering * (r_chosen + r_rejected)^2 per pair. The second term holds the mean
    of both near 0, which the first leaves free (Eisenstein et al. 2023, arXiv:2312.09244).
    """
    return -logsigmoid(chosen_B - rejected_B) + centering * (chosen_B + rejected_B) ** 2


class RewardTrainer:
    """A causal model's decoder with a new head of one label; `base` keeps its files as they are."""

    def __init__(self, base: Path, settings: RewardTraining, *, num_pairs: int, bf16: bool) -> None:
        self.settings = settings
        self.base = base
        model = _with_new_head(base, seed=settings.seed).to(default_device())
        # `Rewards` computes the head in fp32
        dtype = torch.bfloat16 if bf16 else torch.float32
        self._masters = Masters(model, compute_dtype=dtype, wide=[model.score.weight])
        self.rewards = Rewards(model)
        self.num_steps = math.ceil(num_pairs / settings.batch_size) * settings.num_train_epochs
        recipe = TrainRecipe(
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            lr_scheduler_type=settings.lr_scheduler_type,
            warmup_steps=settings.warmup_steps,
        )
        optimizing = settings_at(recipe, 0, bf16=bf16)
        self._optimizer = make_optimizer(self._masters, optimizing)
        job = TrainJob(policy=str(base), pairs="", out="", settings=optimizing, seed=settings.seed)
        self._schedule = make_schedule(self._optimizer, job, self.num_steps, done=0)

    def train(self, pairs: Sequence[TokenPair], report: Reporter) -> list[float]:
        """The mean loss of every step. Each epoch has an order of its own, which follows from the seed."""
        losses = []
        with report.stage("training the reward model", self.num_steps, "steps") as advance:
            for epoch in range(self.settings.num_train_epochs):
                order = list(range(len(pairs)))
                random.Random(derive_seed(self.settings.seed, "reward epoch", epoch)).shuffle(order)
                for start in range(0, len(order), self.settings.batch_size):
                    losses.append(self._step([pairs[n] for n in order[start : start + self.settings.batch_size]]))
                    advance(len(losses))
        return losses

    def _step(self, pairs: Sequence[TokenPair]) -> float:
        total = 0.0
        # the longer side twice: a pair's two rows are padded to one length
        longer = [max(pair.chosen, pair.rejected, key=len) for pair in pairs]
        for places in batches(longer, max(1, self.settings.max_batch_tokens // 2)):
            batch = [pairs[n] for n in places]
            rewards_S = self.rewards([p.chosen for p in batch] + [p.rejected for p in batch])
            chosen_B, rejected_B = rewards_S.chunk(2)
            loss = bradley_terry(chosen_B, rejected_B, centering=self.settings.center_rewards_coefficient).sum()
            torch.autograd.backward(loss / len(pairs))
            self._masters.accumulate()
            total += loss.item() / len(pairs)
        norm = self._masters.grad_norm()
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise NonFiniteError(
                f"the reward model's loss is {total} and its gradient's norm {norm}; nothing was written. Lower "
                "--learning-rate, or say --no-bf16"
            )
        self._masters.scale_gradients(min(1.0, 1.0 / (norm + 1e-6)))
        self._masters.update(self._optimizer)
        self._schedule.step()
        return total

    @torch.inference_mode()
    def margins(self, pairs: Sequence[TokenPair]) -> list[float]:
        """r_chosen - r_rejected of each pair."""
        rows = [row for pair in pairs for row in (pair.chosen, pair.rejected)]
        found: dict[int, float] = {}
        for places in batches(rows, self.settings.max_batch_tokens):
            found |= zip(places, self.rewards([rows[n] for n in places]).tolist(), strict=True)
        return [found[2 * n] - found[2 * n + 1] for n in range(len(pairs))]

    def save(self, folder: Path, *, chat_template: str | None) -> None:
        """A Hugging Face classifier in `folder`, with the tokenizer's own files of the base, and `chat_template` in the
        place of its own where one was given.
        """
        model, dtype = self.rewards.model, self.settings.save_dtype
        target: torch.dtype = torch.__dict__[dtype]
        state = {name: weight.to(target).contiguous() for name, weight in self._masters.named()}
        others = {k: v for k, v in model.state_dict().items() if k not in state}
        model.save_pretrained(folder, state_dict=others | state)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n")
        copy_tokenizer(self.base, folder)
        if chat_template is not None:
            (folder / "chat_template.jinja").write_text(chat_template)


def _with_new_head(base: Path, *, seed: int) -> Any:
    """The causal model at `base` with a head of one label in the place of its own, in fp32 and without dropout. The head is
    drawn from N(0, 1 / (hidden + 1)), as in arXiv:2009.01325. DataError where it can't be loaded.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers warns of the new head, which is what was asked for
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False, num_labels=1)
        text = config.get_text_config()
        softcap = text.to_dict().get("attn_logit_softcapping")  # sdpa would ignore it
        if text.pad_token_id is None:  # the saved model must take batches in any program
            tokenizer = AutoTokenizer.from_pretrained(base)
            text.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        model = AutoModelForSequenceClassification.from_pretrained(
            base,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            **({"attn_implementation": "eager"} if softcap else {}),
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{base}: no model with a reward head can be made of this one ({error})") from error
    finally:
        logging.set_verbosity(before)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(derive_seed(seed, "reward head"))
        weight = model.score.weight
        weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[1] + 1))
    return model.eval()  # no dropout: gradients need no train mode
