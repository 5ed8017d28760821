"""Similarity to the gold answer by sentence embeddings (extra `embeddings`): a score, or a figure of the panel, that sees
meaning where ROUGE-L sees words. An encoder cuts what is longer than its own limit, often 256 or 512 tokens.
"""

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfplay.errors import DataError, RecipeError
from selfplay.models import local_model
from selfplay.protocols import JudgeContext
from selfplay.store import file_digest
from selfplay.types import Group, Judgement

BATCH_SIZE = 32
# The texts beside it in a batch, and so the shard that it is judged in, change the last bits of a text's embedding: scores
# end before those. Two texts whose cosines are that close are a tie.
DECIMALS = 5


def open_similarity(model: str) -> "Similarity":
    """The judge on a folder or a hub id. RecipeError without the extra; DataError where it is no sentence encoder."""
    if importlib.util.find_spec("sentence_transformers") is None:
        raise RecipeError(
            'judge.kind similarity needs the package sentence_transformers: pip install "selfplay-dpo[embeddings]"'
        )
    folder = local_model(model)
    if not (folder / "modules.json").is_file():
        raise DataError(
            f"judge.model {model}: {folder} has no modules.json, so it is no model of sentence-transformers; name one"
        )
    return Similarity(folder)


class Similarity:
    """Scores a completion by the cosine of its embedding and the gold answer's, in [-1, 1] to 5 decimals. No verdict where the
    prompt has no gold answer. The encoder is loaded once, at the first call, and runs on the CPU: the engine has the GPU.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.encoder: Any = None
        files = sorted(file for kind in ("*.safetensors", "*.json") for file in folder.rglob(kind))
        parts = [f"{file.relative_to(folder)} {file_digest(file)}" for file in files]
        self.identity = "similarity v1:" + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def judge(self, groups: Sequence[Group], context: JudgeContext) -> list[Judgement]:
        """One judgement per group."""
        asked = [group for group in groups if group.prompt.gold is not None]
        texts = {group.prompt.gold or "" for group in asked} | {c.text for group in asked for c in group.completions}
        # one order whatever the order of the groups, and texts of one length together
        ordered = sorted(texts, key=lambda text: (len(text), text))
        vectors = dict(zip(ordered, self._embed(ordered), strict=True)) if ordered else {}
        return [_judge_group(group, vectors) for group in groups]

    def _embed(self, texts: list[str]) -> Any:
        """One vector of length 1 for each text."""
        from sentence_transformers import SentenceTransformer

        if self.encoder is None:
            self.encoder = SentenceTransformer(
                str(self.folder), device="cpu", local_files_only=True, model_kwargs={"use_safetensors": True}
            )
        return self.encoder.encode(texts, batch_size=BATCH_SIZE, normalize_embeddings=True, show_progress_bar=False)


def _judge_group(group: Group, vectors: dict[str, Any]) -> Judgement:
    gold = group.prompt.gold
    if gold is None:
        none = (None,) * len(group.completions)
        return Judgement(group.prompt.id, none, ("no gold answer",) * len(group.completions))
    cosines = [float(vectors[c.text] @ vectors[gold]) for c in group.completions]
    return Judgement(group.prompt.id, tuple(round(max(-1.0, min(1.0, cosine)), DECIMALS) for cosine in cosines))
