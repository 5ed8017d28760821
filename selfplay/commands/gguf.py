"""`selfplay import-gguf`."""

from pathlib import Path
from typing import Annotated

import typer


def import_gguf_command(
    file: Annotated[Path, typer.Argument(help="A .gguf file.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The model folder to write.", show_default=False)],
) -> None:
    """Convert a GGUF file to a model folder that transformers and vLLM load."""
    from selfplay.gguf import import_gguf

    import_gguf(file, out)
    typer.echo(f"{out}: converted from {file.name}")
