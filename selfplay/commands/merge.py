"""`selfplay merge`: a LoRA adapter and its base as one model."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from selfplay import store
from selfplay.adapters import base_folder, is_adapter
from selfplay.errors import DataError


def merge_command(
    adapter: Annotated[Path, typer.Argument(help="The folder of a LoRA adapter.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The model folder to write.", show_default=False)],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the merged weights.")
    ] = "bfloat16",
    base: Annotated[Path | None, typer.Option(help="Another base than the adapter's own.", show_default=False)] = None,
) -> None:
    """Add a LoRA adapter to its base model: a full checkpoint, for engines and trainers that read no adapters.

    The base of an adapter that was trained with load_in_4bit has the values of its 4 bits. With --base the adapter is added to
    another one, such as the model that these were made from; that is not the policy that was trained.
    """
    if not is_adapter(adapter):
        raise DataError(f"{adapter}: no LoRA adapter in this folder (no adapter_config.json)")
    if out.exists():
        raise DataError(f"{out} exists; name a folder that does not")
    own = base_folder(adapter)
    if base is not None and store.weights_digest(base) != store.weights_digest(own):
        typer.echo(
            f"warning: {out} will not be the policy that was trained: that is the adapter on {own}, not on {base}. "
            "Evaluate it before you use it",
            err=True,
        )
    from selfplay.train.lora import merge_adapter

    merge_adapter(adapter, out, dtype=dtype, base=base)
    typer.echo(f"{out}: merged from {adapter}")
