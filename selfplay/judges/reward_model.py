"""A reward model as the judge: a sequence classifier reads prompt and completion in its own chat template, and its raw logit
is the score. Importing this loads no torch.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from selfplay.adapters import is_adapter
from selfplay.chat import Chat, template_text
from selfplay.errors import DataError, GeneratorError, RecipeError
from selfplay.generators.engine import EngineSettings, Scorer, start_scorer
from selfplay.generators.isolated import EngineDiedError, IsolatedEngine
from selfplay.model_files import tokenizer_digest
from selfplay.models import declared_length, local_model
from selfplay.protocols import JudgeContext
from selfplay.recipe_reward import RewardModelRecipe
from selfplay.store import weights_digest
from selfplay.types import Group, Judgement, Message, Prompt

Place = tuple[int, int]  # of a completion: its group's, and its own in the group

# Part of the judge's identity: raise it when a change of how a conversation becomes tokens can change a score. 2: markup in
# messages is read as text.
VERSION = 2


class RewardModelJudge:
    """Scores every completion by the logit that the model gives to the conversation which ends with it.

    `open_scorer` opens the model when the first group is judged; `close()`, or the end of a `with` block, frees it.
    `model` is the digest of the weights, `tokenizer` that of the files beside them that make tokens of text.
    """

    def __init__(
        self,
        chat: Chat,
        open_scorer: Callable[[], Scorer],
        *,
        model: str,
        tokenizer: str,
        max_length: int | None,
        max_batch_tokens: int,
        dtype: str,
    ) -> None:
        self.chat = chat
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_batch_tokens = max_batch_tokens
        self.dtype = dtype
        self._open_scorer = open_scorer
        self._scorer: Scorer | None = None

    @property
    def identity(self) -> str:
        """Weights, tokenizer, template, version, length and dtype: whatever a score depends on, the device's rounding apart."""
        read = hashlib.sha256(f"{self.tokenizer} {self.chat.template_digest_text}".encode()).hexdigest()[:16]
        return f"reward_model v{VERSION}:{self.model} chat {read} max_length {self.max_length} dtype {self.dtype}"

    def close(self) -> None:
        """Frees the model, if it was opened. Calling it twice is fine; the next use opens it anew."""
        scorer, self._scorer = self._scorer, None
        if scorer is not None:
            scorer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def judge(self, groups: Sequence[Group], context: JudgeContext) -> list[Judgement]:
        """One judgement per group. None with a reason where prompt and completion are longer than `max_length`, where the
        template refuses the prompt, or where the logit is not finite.
        """
        asked: dict[Place, tuple[int, ...]] = {}
        notes: dict[Place, str] = {}
        for g, group in enumerate(groups):
            for k, completion in enumerate(group.completions):
                try:
                    ids = encode_conversation(self.chat, group.prompt, completion.text)
                except DataError as error:
                    notes[g, k] = str(error)
                    continue
                if self.max_length is not None and len(ids) > self.max_length:
                    notes[g, k] = f"prompt and completion don't fit max_length {self.max_length}\n{len(ids)} tokens"
                else:
                    asked[g, k] = ids
        scores: dict[Place, float | None] = {}
        for place, reward in zip(asked, self._rewards(list(asked.values())), strict=True):
            scores[place] = reward if math.isfinite(reward) else None
            notes[place] = "" if math.isfinite(reward) else f"the reward is not finite\n{reward}"
        return [_judgement(group, g, scores, notes) for g, group in enumerate(groups)]

    def _rewards(self, sequences: Sequence[tuple[int, ...]]) -> list[float]:
        distinct = list(dict.fromkeys(sequences))
        if not distinct:
            return []
        try:
            found = self._collect(distinct)
        except EngineDiedError:  # a process that was killed from outside: another one may do better
            self.close()
            found = self._collect(distinct)
        return [found[sequence] for sequence in sequences]

    def _collect(self, sequences: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
        if self._scorer is None:
            self._scorer = self._open_scorer()
        found = {sequences[n]: reward for n, reward in self._scorer.rewards(sequences, self.max_batch_tokens)}
        if len(found) != len(sequences):
            raise GeneratorError(f"the reward model scored {len(found)} of {len(sequences)} sequences")
        return found


def _judgement(group: Group, g: int, scores: dict[Place, float | None], notes: dict[Place, str]) -> Judgement:
    places = [(g, k) for k in range(len(group.completions))]
    return Judgement(group.prompt.id, tuple(scores.get(p) for p in places), tuple(notes[p] for p in places))


def encode_conversation(chat: Chat, prompt: Prompt, text: str) -> tuple[int, ...]:
    """Token ids of the prompt with `text` as the assistant's turn after it, as the template ends it. Special tokens and
    markup come from the template alone. DataError where it refuses the messages.
    """
    turns = (*prompt.messages, Message("assistant", text))
    return chat.encode_messages(turns, tools=prompt.tools, add_generation_prompt=False, untrusted=True)


def load_reward_chat(folder: Path, chat_template: str | None, *, key: str) -> Chat:
    """The chat of a reward model. DataError where it has no tokenizer; RecipeError, naming `key`, where it has no template."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: no tokenizer could be loaded ({error})") from error
    if chat_template is not None:
        tokenizer.chat_template = template_text(chat_template, key=key)
    if not tokenizer.chat_template:
        raise RecipeError(_no_template(folder, key))
    return Chat(tokenizer, stop_token_ids=(0,))  # any: nothing is sampled, so no token ends anything


def _no_template(folder: Path, key: str) -> str:
    return (
        f"{key}: the tokenizer of {folder} has no chat template, so it is not known how the model was shown conversations. "
        "Give the one that it was trained with, as text or as a file"
    )


def open_reward_model(recipe: RewardModelRecipe, key: str = "judge") -> RewardModelJudge:
    """The judge that a recipe names; its model is opened when it is first asked."""
    folder = local_model(recipe.model, recipe.model_revision)
    check_reward_model(recipe, folder, key)
    settings = EngineSettings(
        "reward_model",
        str(folder),
        dtype=recipe.dtype,
        device=recipe.device,
        data_parallel_size=recipe.data_parallel_size,
    )
    return RewardModelJudge(
        load_reward_chat(folder, recipe.chat_template, key=f"{key}.chat_template"),
        lambda: _open(settings),
        model=weights_digest(folder),
        tokenizer=tokenizer_digest(folder),
        max_length=recipe.max_length or declared_length(folder),
        max_batch_tokens=recipe.max_batch_tokens,
        dtype=recipe.dtype,
    )


def _open(settings: EngineSettings) -> Scorer:
    import torch

    # a CUDA context in this process would keep memory from the policy's engine and the trainer
    isolate = settings.data_parallel_size > 1 or (settings.device != "cpu" and torch.cuda.is_available())
    return IsolatedEngine(settings) if isolate else start_scorer(settings)


def check_reward_model(recipe: RewardModelRecipe, folder: Path, key: str) -> None:
    """What can be known of a reward model from its files, before anything is sampled: that it has one label, a head among its
    weights, a chat template, and positions for max_length. DataError or RecipeError names what is missing.
    """
    if is_adapter(folder):
        raise DataError(f"{key}.model: {folder} is a LoRA adapter; merge it into its base model to judge with it")
    config = json.loads((folder / "config.json").read_text())
    count = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
    if count != 1 or not _has_head(folder):
        what = f"its config.json says num_labels {count}" if count != 1 else "there is no head among its weights"
        raise DataError(
            f"{key}.model: {folder}: {what}, and a reward model has one label, whose logit is the score. Name a model that "
            "was trained as a reward model (selfplay train-reward makes one)"
        )
    if recipe.chat_template is None and not _has_template(folder):
        raise RecipeError(_no_template(folder, f"{key}.chat_template"))
    limit = declared_length(folder)
    if limit is not None and recipe.max_length is not None and recipe.max_length > limit:
        raise RecipeError(f"{key}.max_length is {recipe.max_length}, but {folder} has {limit} positions: lower it")


def _has_head(folder: Path) -> bool:
    """Whether a matrix of one row is among the weights: the head of every classifier with one label."""
    from safetensors import safe_open

    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118 - no mapping
        if any(len(shape) == 2 and shape[0] == 1 for shape in shapes):
            return True
    return False


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(json.loads(path.read_text()).get("chat_template"))
