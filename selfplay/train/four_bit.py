"""QLoRA (arXiv:2305.14314): an adapter over a base whose linear layers hold 4-bit weights (nf4, scales quantized as well).

The policy is then the adapter on what those 4 bits stand for, and not on the weights that they were made from. So a run
writes that base once, as an ordinary checkpoint `base-4bit` with the values of the 4 bits in the dtype that training computes
in, and each adapter names it as its base. Engines, the panel, KL and `selfplay merge` read it like any model and play the very
policy that trains; only the trainer goes back to the weights that it was made from, quantizes them the same way, and holds a
quarter of the memory. Quantizing the checkpoint instead would not do: the scales come out a little different the second time.
Importing this loads no torch.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.adapters import FOUR_BIT, four_bit_source, is_adapter
from selfplay.errors import RecipeError, SelfplayError
from selfplay.recipe_train import TrainRecipe

BASE = "base-4bit"


def playable(model: Path, out: Path, recipe: TrainRecipe) -> Path:
    """The folder of the policy that a recipe starts from: `model` itself, but where it is a plain one that
    `train.lora.load_in_4bit` quantizes, `out`/base-4bit, which is written where it isn't there.
    """
    if recipe.lora is None or not recipe.lora.load_in_4bit or is_adapter(model) or four_bit_source(model) is not None:
        return model
    import torch

    base, dtype = out / BASE, "bfloat16" if recipe.bf16 else "float32"
    if base.exists():
        store.check_folder(base)
    elif torch.cuda.is_available():
        # a process of its own: a CUDA context in this one would keep memory from the engine
        command = [sys.executable, "-P", "-m", "selfplay.train.four_bit", str(model), str(base), dtype]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            kind = RecipeError if done.returncode == RecipeError.exit_code else SelfplayError
            raise kind(done.stderr.strip().rpartition("\n")[2] or f"{base}: the process that makes it was killed")
    else:
        write_base(model, base, dtype)
    return base


def write_base(model: Path, out: Path, dtype: str) -> None:
    """The checkpoint of what `model` is at 4 bits, with a mark that names `model`."""
    import bitsandbytes
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from selfplay.train.model import copy_tokenizer

    source = model.resolve()
    target = getattr(torch, dtype)
    quantized = load_quantized(source, {})
    layers = {name: m for name, m in quantized.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    state: dict[str, Any] = {}
    with torch.no_grad():
        for name, param in quantized.named_parameters():
            layer = layers.get(name.removesuffix(".weight"))
            state[name] = (values_of(layer) if layer is not None else param).to("cpu", target).contiguous()
    config = AutoConfig.from_pretrained(source)
    config.dtype = target
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(config)
    tied = set(bare._tied_weights_keys or ())
    mark = {"quantized_from": str(source), "weights": store.weights_digest(source), **settings_of()}

    def write(folder: Path) -> None:
        bare.save_pretrained(folder, state_dict={k: v for k, v in state.items() if k not in tied})
        copy_tokenizer(source, folder)
        (folder / FOUR_BIT).write_text(json.dumps(mark, indent=2) + "\n")

    store.write_folder(out, write)


def settings_of() -> dict[str, Any]:
    """transformers' names of what QLoRA's paper does."""
    return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def values_of(layer: Any) -> Any:
    """What the 4 bits of a layer stand for, in the dtype of the weights that they were made from."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def load_quantized(source: Path, arguments: dict[str, Any]) -> Any:
    """The causal LM at `source` with 4-bit linear layers, its head and all else as they are stored, in fp32, on the device that
    trains. RecipeError where bitsandbytes can't do it: it is missing, has no backend for this device, or the model has no
    linear layer that it replaces.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from selfplay.train.model import default_device

    try:
        import bitsandbytes

        config = BitsAndBytesConfig(**settings_of(), bnb_4bit_compute_dtype=torch.float32)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, quantization_config=config, device_map={"": default_device()}, **arguments
        )
    except (ImportError, RuntimeError) as error:
        raise RecipeError(f"train.lora.load_in_4bit: bitsandbytes can't quantize {source} here ({error})") from error
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    if not layers:
        raise RecipeError(
            f"train.lora.load_in_4bit: {source} ({model.config.model_type}) has no linear layer that bitsandbytes replaces. "
            "Remove load_in_4bit"
        )
    for layer in layers:
        # On CPUs with AVX512-BF16 the first forward without gradients would pack the weights for a kernel that has no
        # backward pass: the layers below would then silently get no gradient.
        layer.support_avx512bf16_for_cpu = False
    return model


def compute_in(model: Any, dtype: Any) -> None:
    """Has 4-bit layers compute in `dtype`; models without any stay as they are."""
    for module in model.modules():
        if "quant_state" in vars(module) and "compute_dtype" in vars(module):
            module.compute_dtype, module.compute_type_is_set = dtype, True


if __name__ == "__main__":
    try:
        write_base(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    except SelfplayError as found:
        print(found, file=sys.stderr)
        sys.exit(found.exit_code)
