"""The files of a model folder that are not its weights."""

import hashlib
from pathlib import Path

from selfplay.store import file_digest

TOKENIZER_FILES = (
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "generation_config.json",
)


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 over the files of a model folder that say how text becomes tokens and where a turn ends."""
    files = sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})
    return hashlib.sha256("".join(f"{file.name} {file_digest(file)}\n" for file in files).encode()).hexdigest()
