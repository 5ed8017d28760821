"""LoRA (arXiv:2106.09685) through peft: a policy that is a small adapter on a base model which is never changed.

The adapter continues from round to round. Its B matrices start at 0, so before the first step it is the base to the last bit.
There is no dropout: the policy must equal its reference before the first step.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from selfplay.adapters import CONFIG, SHARED_KEYS, base_folder, import_peft, load_adapter
from selfplay.errors import DataError, RecipeError
from selfplay.store import write_folder

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # before the base's own names in a peft checkpoint
ADAPTER = "default"  # peft's name for the only adapter


def add_adapter(model: Any, settings: Mapping[str, Any]) -> Any:
    """Puts a fresh adapter into a base model, and freezes all else. Returns the same model. `settings` are a recipe's
    train.lora; RecipeError where the model has none of its target modules.
    """
    peft = import_peft()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        lora_dropout=0.0,
        **{key: settings[key] for key in (*SHARED_KEYS, "target_modules")},
    )
    try:
        return peft.get_peft_model(model, config, autocast_adapter_dtype=False).get_base_model()
    except ValueError as error:
        raise RecipeError(f"train.lora.target_modules: {error}") from error


def write_adapter(model: Any, weights: Mapping[str, torch.Tensor], base: Path, folder: Path) -> None:
    """The adapter's weights (named as in `model`) and settings in `folder`, for peft and vLLM to read."""
    from safetensors.torch import save_file

    named = {PREFIX + name.replace(f".{ADAPTER}.", "."): weight for name, weight in weights.items()}
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads(json.dumps(model.peft_config[ADAPTER].to_dict(), default=_plain))
    config |= {"base_model_name_or_path": str(base.absolute()), "inference_mode": True}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def merge_adapter(folder: Path, out: Path, *, dtype: str, base: Path | None = None) -> None:
    """A full checkpoint at `out`: the base with the adapter added to its weights, computed in fp32. `base` takes the place of
    the one that the adapter was trained on; DataError where the adapter doesn't fit it.
    """
    import_peft()
    from peft.tuners.lora import LoraLayer
    from transformers import AutoConfig, AutoModelForCausalLM

    from selfplay.train.model import copy_tokenizer, load_model

    base = base if base is not None else base_folder(folder)
    try:
        model = load_adapter(load_model(str(base)), folder, trainable=False)
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{base}: the adapter in {folder} does not fit this model ({error})") from error
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    state = {
        name.replace(".base_layer.", "."): weight.to(getattr(torch, dtype))
        for name, weight in model.state_dict().items()
        if ".lora_" not in name
    }

    def write(target: Path) -> None:
        config = AutoConfig.from_pretrained(base)
        config.dtype = getattr(torch, dtype)
        with torch.device("meta"):
            bare = AutoModelForCausalLM.from_config(config)
        tied = bare.all_tied_weights_keys  # _tied_weights_keys names those that could be tied, whatever the config says
        bare.save_pretrained(target, state_dict={k: v.contiguous() for k, v in state.items() if k not in tied})
        copy_tokenizer(folder, target)

    write_folder(out, write)


def _plain(value: Any) -> Any:
    """Sets and enumerations of peft's settings as JSON."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
