"""`selfplay merge`: a LoRA adapter and its base as one model."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from selfplay.adapters import is_adapter
from selfplay.errors import DataError


def merge_command(
    adapter: Annotated[Path, typer.Argument(help="The folder of a LoRA adapter.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The model folder to write.", show_default=False)],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the merged weights.")
    ] = "bfloat16",
) -> None:
    """Add a LoRA adapter to its base model: a full checkpoint, for engines and trainers that read no adapters."""
    if not is_adapter(adapter):
        raise DataError(f"{adapter}: no LoRA adapter in this folder (no adapter_config.json)")
    if out.exists():
        raise DataError(f"{out} exists; name a folder that does not")
    from selfplay.train.lora import merge_adapter

    merge_adapter(adapter, out, dtype=dtype)
    typer.echo(f"{out}: merged from {adapter}")
