"""What can be known of a model without loading it: the headers of weights that are here; else its config.json, by which a model
without memory is made (on torch's device "meta", for which torch is imported then).
"""

import json
import math
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfplay.adapters import base_folder
from selfplay.errors import DataError
from selfplay.recipe_train import LoraRecipe
from selfplay.train.sizes import Dimensions

ANSWER_SECONDS = 5.0
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The shapes of a model's weights, tied ones once, and what its config says of its language model."""

    shapes: Mapping[str, list[int]]
    config: Mapping[str, Any]

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def num_in_tables(self) -> int:
        """Parameters of embeddings."""
        return sum(math.prod(s) for name, s in self.shapes.items() if len(s) == 2 and self._is_table(name))

    @property
    def num_in_linear(self) -> int:
        """Parameters that `load_in_4bit` quantizes: all matrices but embeddings and the head."""
        return sum(math.prod(s) for s in self.shapes.values() if len(s) == 2 and self.vocabulary not in s)

    @property
    def vocabulary(self) -> int | None:
        found = self.config.get("vocab_size")
        return int(found) if found else None

    @property
    def stored(self) -> str:
        """The dtype that the weights are stored in."""
        return str(self.config.get("dtype") or self.config.get("torch_dtype") or "float32").removeprefix("torch.")

    @property
    def dimensions(self) -> Dimensions | None:
        """None where the config has other names for them."""
        layers, hidden, heads = (
            self.config.get(a) or self.config.get(b)
            for a, b in (("num_hidden_layers", "n_layer"), ("hidden_size", "n_embd"), ("num_attention_heads", "n_head"))
        )
        if not (layers and hidden and heads and self.vocabulary):
            return None
        return Dimensions(
            layers=layers,
            hidden=hidden,
            heads=heads,
            key_heads=self.config.get("num_key_value_heads") or heads,
            head_size=self.config.get("head_dim") or hidden // heads,
            inner=self.config.get("intermediate_size") or 4 * hidden,
            vocabulary=self.vocabulary,
        )

    def num_trained(self, lora: LoraRecipe | None) -> int:
        """Parameters that training changes: all, or those of an adapter, which are r (n + m) for each n x m matrix."""
        if lora is None:
            return self.num_parameters
        total = 0
        for name, shape in self.shapes.items():
            module = name.removesuffix(".weight").rpartition(".")[2]
            # peft's all-linear leaves out the head; embeddings are no linear layers
            asked = (
                self.vocabulary not in shape if lora.target_modules == "all-linear" else module in lora.target_modules
            )
            if asked and len(shape) == 2 and name.endswith(".weight"):
                total += lora.r * sum(shape)
        return total

    def _is_table(self, name: str) -> bool:
        return "embed" in name or name.endswith(("wte.weight", "wpe.weight"))


def find_model(model: str, revision: str | None = None) -> Path | None:
    """The folder of a model, or the snapshot of a hub id that is already on this machine; None where there is neither."""
    if Path(model).is_dir():
        return Path(model)
    if model.startswith(("/", ".")):
        raise DataError(f"model {model}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise DataError(f"model {model}: neither a folder here nor a hub id ({error})") from error
    # of what was only planned the config alone is here
    return folder if any(folder.glob("*.safetensors")) else None


def model_facts(model: str, revision: str | None = None, *, classifier: bool = False) -> ModelFacts | None:
    """What is known of a model (of its base, for an adapter); of one that is not here, what the hub's config.json says. None
    where that can't be had either: offline, behind a gate, or of a kind that transformers doesn't know. A `classifier` has a
    head of one label. DataError where a folder is no model.
    """
    folder = find_model(model, revision)
    if folder is not None:
        return facts_in(folder)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if not hub_answers():
        return None
    try:
        config = hf_hub_download(model, "config.json", revision=revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return None
    return facts_of_config(Path(config), classifier=classifier)


def hub_answers() -> bool:
    """Whether there is a hub to ask: huggingface_hub itself tries for half a minute where there is no network."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(
            urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=ANSWER_SECONDS
        ).close()
    except urllib.error.HTTPError:
        return True  # it has answered
    except (OSError, ValueError):
        return False
    return True


def facts_in(folder: Path) -> ModelFacts:
    """Those of a model folder, or of the base of an adapter."""
    base = base_folder(folder)
    path = base / "config.json"
    if not path.is_file():
        raise DataError(f"model {base}: no config.json in this folder (see selfplay import-gguf)")
    return ModelFacts(_shapes(base), _of_text(json.loads(path.read_text())))


def facts_of_config(config: Path, *, classifier: bool = False) -> ModelFacts | None:
    """Those of the model that a config.json describes; None where transformers knows none of its kind."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    try:
        described = AutoConfig.from_pretrained(str(config), trust_remote_code=False)
        with torch.device("meta"):
            model = kind.from_config(described, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError):
        return None
    shapes = {name: list(param.shape) for name, param in model.named_parameters()}
    return ModelFacts(shapes, _of_text(json.loads(config.read_text()) | described.to_dict()))


def _of_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says, and what it says of its language model apart."""
    return {**config, **(config.get("text_config") or {})}


def _shapes(folder: Path) -> dict[str, list[int]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(f"model {folder}: no .safetensors weights in this folder (see selfplay import-gguf)")
    return {name: shape for file in files for name, shape in _shapes_in(file).items()}


def _shapes_in(file: Path) -> dict[str, list[int]]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            raise DataError(f"{file}: no safetensors file, or cut short; fetch it again")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise DataError(f"{file}: no safetensors file ({error}); fetch it again") from error
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
