"""LoRA adapters on disk, in peft's format: a folder with adapter_config.json beside the adapter's weights. A policy may be one;
then its base model lies elsewhere and is never changed. Importing this loads no torch.
"""

import json
from pathlib import Path
from typing import Any

from selfplay.errors import DataError, RecipeError
from selfplay.recipe_train import LoraRecipe

CONFIG = "adapter_config.json"
FOUR_BIT = "four_bit.json"  # beside weights that are the values of a 4-bit base (train/four_bit.py)
SHARED_KEYS = ("r", "lora_alpha", "use_rslora")  # settings of a recipe that an adapter on disk has, too
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's max_lora_rank may be


def is_adapter(folder: Path) -> bool:
    """Whether a model folder holds a LoRA adapter and no weights of its own."""
    return (folder / CONFIG).is_file()


def adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's settings under peft's names. DataError where it is no LoRA adapter."""
    path = folder / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: no JSON ({error})") from error
    if config.get("peft_type") != "LORA":
        raise DataError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA adapters can be used")
    return config


def base_folder(folder: Path) -> Path:
    """The model that an adapter belongs to, or the folder itself where it is no adapter. DataError where the base is gone."""
    if not is_adapter(folder):
        return folder
    base = Path(str(adapter_config(folder).get("base_model_name_or_path")))
    # a base that a run wrote itself moves with it: RUN/round-000/policy, or OUT/policy of a single training
    near = [parent / base.name for parent in folder.absolute().parents[:2]]
    base = next((one for one in (base, *near) if (one / "config.json").is_file()), base)
    if not (base / "config.json").is_file():
        raise DataError(
            f"{folder / CONFIG}: its base model {base} is no model folder here. Bring it back, or write its new place into "
            "base_model_name_or_path"
        )
    return base


def four_bit_source(base: Path) -> Path | None:
    """The model that was quantized to 4 bits, where a folder holds the values of those; None for any other folder."""
    path = base / FOUR_BIT
    return Path(str(json.loads(path.read_text())["quantized_from"])) if path.is_file() else None


def adapter_rank(folder: Path) -> int:
    """The largest rank of an adapter's matrices."""
    config = adapter_config(folder)
    return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])


def served_rank(rank: int) -> int:
    """The smallest max_lora_rank with which vLLM serves an adapter of this rank. DataError above its largest."""
    for served in VLLM_RANKS:
        if rank <= served:
            return served
    raise DataError(f"vLLM serves adapters up to rank {VLLM_RANKS[-1]}, and this one has rank {rank}: merge it first")


def check_lora(folder: Path, recipe: LoraRecipe | None) -> None:
    """RecipeError where the policy to be trained is an adapter and the recipe asks for something else."""
    if not is_adapter(folder):
        return
    if recipe is None:
        raise RecipeError(
            f"{folder} is a LoRA adapter. To go on training it, add train.lora with its settings; to train all weights, "
            "merge it into its base first: selfplay merge"
        )
    found, settings = adapter_config(folder), recipe.model_dump()
    keys = (*SHARED_KEYS, "load_in_4bit")
    found["load_in_4bit"] = four_bit_source(base_folder(folder)) is not None
    differing = [f"{key} {found.get(key)} -> {settings[key]}" for key in keys if found.get(key) != settings[key]]
    if differing:
        raise RecipeError(
            f"train.lora: {folder} is an adapter with other settings ({', '.join(differing)}). Take its own, or merge it "
            "into its base first: selfplay merge"
        )


def load_adapter(model: Any, folder: Path, *, trainable: bool) -> Any:
    """Puts the adapter of a folder into its base model, and returns that."""
    wrapped = import_peft().PeftModel.from_pretrained(
        model, str(folder), is_trainable=trainable, autocast_adapter_dtype=False
    )
    return wrapped.get_base_model()


def import_peft() -> Any:
    """peft. RecipeError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise RecipeError('LoRA needs peft: pip install "selfplay-dpo[peft]"') from error
    return peft
