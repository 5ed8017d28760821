"""What a benchmark runs on: a model folder or random weights of a size, on one device.

Random weights are drawn on the device itself from seed 0, so that 8 billion of them need neither a disk nor the CPU's memory;
they cost what trained ones cost. Their tokenizer is made here too, so that nothing has to be downloaded.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # for a Python that selfplay is not installed in
OUT = ROOT / ".bench"
MODEL = ROOT / "models" / "smollm2-135m-instruct"
TRAINED = "135m"  # the model folder; the other sizes have random weights

# Shapes of Llama: "1b" is that of Llama 3.2 1B (1.24e9 weights), "8b" that of Llama 3.1 8B (8.03e9).
_LLAMA: dict[str, Any] = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 128_256}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": 49_152,
        "tie_word_embeddings": True,
    },
    "1b": _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}
SIZES = (TRAINED, *SHAPES)
MAX_LENGTH = 8192  # tokens of prompt and completion
CHECKED_LAYERS = 2  # of random weights, whose gradients in fp32 would not fit beside each other


@dataclass(frozen=True, slots=True)
class Setup:
    """`model` is a folder with a config and a tokenizer, and weights where `size` is TRAINED. The work of a training benchmark
    is done `times` over in each of its steps: on a GPU eight short pairs say little. Plain values alone: it travels to a
    peer's process as JSON.
    """

    model: str
    device: str = "cpu"
    size: str = TRAINED
    optim: str = "adamw_torch"
    bf16: bool = True
    times: int = 1

    @property
    def is_random(self) -> bool:
        return self.size != TRAINED

    def as_argument(self) -> str:
        return json.dumps(asdict(self))


def make_setup(device: str, size: str, optim: str | None = None) -> Setup:
    """The setup of a size; its folder is made where it isn't there. Full training of 8B takes 8-bit Adam on one device of 80
    GB; with AdamW, 129 GB of weights, gradients and states.
    """
    optim = optim or ("adamw_bnb_8bit" if size == "8b" else "adamw_torch")
    times = 16 if device == "cuda" else 1
    return Setup(str(model_folder(size)), device, size, optim, times=times)


def checked(setup: Setup) -> Setup:
    """What the gradients are compared on: fp32, one time the work, few layers of random weights, and the optimizer that every
    machine has: none is asked.
    """
    size = setup.size
    folder = model_folder(size, num_layers=CHECKED_LAYERS) if setup.is_random else Path(setup.model)
    return replace(setup, model=str(folder), bf16=False, times=1, optim="adamw_torch")


def model_folder(size: str, *, num_layers: int | None = None) -> Path:
    """The folder of a size. That of random weights holds config and tokenizer, and weights only once `write_weights` has
    been asked for them.
    """
    if size == TRAINED:
        return MODEL
    folder = OUT / "models" / (size if num_layers is None else f"{size}-{num_layers}-layers")
    if not folder.exists():
        from transformers import LlamaConfig

        shape = SHAPES[size]
        shape = shape | {"num_hidden_layers": min(num_layers or shape["num_hidden_layers"], shape["num_hidden_layers"])}
        ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        config = LlamaConfig(**shape, **ids, max_position_embeddings=MAX_LENGTH, architectures=["LlamaForCausalLM"])
        unfinished = folder.with_name(folder.name + ".unfinished")
        config.save_pretrained(unfinished)
        _tokenizer(shape["vocab_size"]).save_pretrained(unfinished)
        unfinished.rename(folder)
    return folder


def _tokenizer(num_tokens: int) -> Any:
    """The tests' tokenizer with a name for every id that random weights may sample."""
    sys.path.append(str(ROOT / "tests"))
    from tiny import make_tiny_tokenizer

    return make_tiny_tokenizer(num_tokens=num_tokens)


def new_model(setup: Setup, dtype: torch.dtype, **settings: Any) -> Any:
    """The causal LM of a setup on its device, equal in every process. `settings` are those of transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not setup.is_random:
        model = AutoModelForCausalLM.from_pretrained(setup.model, dtype=dtype, **settings)
        return model.to(setup.device)
    config = AutoConfig.from_pretrained(setup.model)
    torch.manual_seed(0)
    with torch.device(setup.device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **settings)


def write_weights(setup: Setup) -> None:
    """Puts random weights on the disk in bf16, for engines, which read a folder. Nothing where they lie there."""
    if setup.is_random and not any(Path(setup.model).glob("*.safetensors")):
        model = new_model(setup, torch.bfloat16)
        model.save_pretrained(setup.model)
        del model
        release(setup)


def release(setup: Setup) -> None:
    """Gives the device what nothing holds any more."""
    if setup.device == "cuda":
        torch.cuda.empty_cache()


def missing(modules: Sequence[str]) -> str | None:
    """Why what needs these modules can't run here; None where it can."""
    absent = [name for name in modules if find_spec(name) is None]
    return f"{', '.join(absent)} not installed" if absent else None
