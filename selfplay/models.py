"""Where a model lies, what it is, and what the machine can do with it."""

import importlib
import importlib.util
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from selfplay.adapters import adapter_rank, base_folder, is_adapter
from selfplay.chat import Chat
from selfplay.collection import collection_paused
from selfplay.errors import DataError, RecipeError
from selfplay.recipe import GeneratorRecipe, Recipe
from selfplay.recipe_chat import ChatRecipe


def local_model(model: str, revision: str | None = None) -> Path:
    """The folder of a model or an adapter: the path itself, or the hub snapshot of an id, at a `revision` of it (None: its main
    branch). DataError where there is neither.
    """
    if Path(model).is_dir():
        folder = Path(model)
    elif model.startswith(("/", ".")):
        raise DataError(f"model {model}: no such folder")
    else:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            wanted = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            at = f" at the revision {revision}" if revision is not None else ""
            raise DataError(
                f"model {model}{at}: neither a folder here nor a model that the hub gives ({error})"
            ) from error
    if not (base_folder(folder) / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise DataError(
            f"model {model}: {folder} needs a config.json and .safetensors weights (see selfplay import-gguf)"
        )
    return folder


def named_model(recipe: Recipe, model: str) -> Path:
    """The folder of a model that is named beside a recipe; the recipe's own comes at the recipe's revision."""
    return local_model(model, recipe.model_revision if model == recipe.model else None)


def resolve_auto(recipe: Recipe) -> Recipe:
    """The recipe with every `auto` replaced by what this machine takes; recorded in the run, so a resumed run keeps it."""
    kind = resolved_kind(recipe.generator)
    bf16 = computes_bf16() if recipe.train.bf16 == "auto" else recipe.train.bf16
    return recipe.model_copy(
        update={
            "generator": recipe.generator.model_copy(update={"kind": kind}),
            "train": recipe.train.model_copy(update={"bf16": bf16}),
        }
    )


def resolved_kind(recipe: GeneratorRecipe) -> str:
    """The kind of engine that a recipe means on this machine."""
    if recipe.kind == "auto":
        return "vllm" if importlib.util.find_spec("vllm") is not None else "transformers"
    return recipe.kind


def engine_ahead(recipe: GeneratorRecipe, *, wanted: bool) -> AbstractContextManager[None]:
    """Starts vLLM's process, which takes seconds to import, before the model and the prompts are read: the first
    `open_generator` in the block takes it. Nothing where it isn't `wanted`, for other engines, or for several replicas.
    """
    if not wanted or resolved_kind(recipe) != "vllm" or recipe.data_parallel_size > 1:
        return nullcontext()
    from selfplay.generators.engine import EngineSettings
    from selfplay.generators.isolated import started_ahead

    # whatever its environment depends on
    args, parallel = recipe.engine_args, recipe.tensor_parallel_size
    return started_ahead(EngineSettings("vllm", model="", tensor_parallel_size=parallel, engine_args=args))


def import_trainer() -> None:
    """Imports what training in this process needs, while the engine's process imports its own: seconds, of which peft, that
    transformers' schedules import, takes most. On CUDA training has a process of its own.
    """
    import torch

    if not torch.cuda.is_available():
        with collection_paused():
            importlib.import_module("transformers.optimization")


def computes_bf16() -> bool:
    """Whether this machine computes bfloat16 and does not emulate it."""
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    from selfplay.generators.environment import cpu_computes_bf16

    return cpu_computes_bf16()


def load_chat(model: str, recipe: ChatRecipe, *, key: str = "chat") -> Chat:
    """The chat of a model with a recipe's overrides; errors name the section `key`."""
    tags = (recipe.reasoning_tags[0], recipe.reasoning_tags[1]) if recipe.reasoning_tags else None
    return Chat.load(
        model,
        chat_template=recipe.chat_template,
        chat_template_kwargs=recipe.chat_template_kwargs,
        reasoning_tags=tags,
        key=key,
    )


def prompt_room(recipe: Recipe, model: Path) -> int | None:
    """The most tokens that a prompt may have, so that max_tokens of every round fit behind it; None where neither the
    model nor the recipe names a length. RecipeError where no prompt would fit.
    """
    limit = recipe.generator.max_model_len or declared_length(model)
    if limit is None:
        return None
    sampled = recipe.generator.max_tokens
    most = max(*(sampled if isinstance(sampled, list) else [sampled]), recipe.evaluate.max_tokens or 0)
    if most >= limit:
        raise RecipeError(
            f"generator.max_tokens is {most}, but prompt and completion together have at most {limit} tokens "
            "(generator.max_model_len, or the model's own length): lower max_tokens"
        )
    return limit - most


def declared_length(model: Path) -> int | None:
    """The most tokens of a sequence by a model's config; None where it names no such number."""
    config = json.loads((base_folder(model) / "config.json").read_text())
    declared = config.get("text_config", config)
    found = declared.get("max_position_embeddings") or declared.get("n_positions")
    return int(found) if found else None


def for_judge(recipe: GeneratorRecipe, model: Path) -> GeneratorRecipe:
    """How the engine of a judge's own model is started: like the policy's, but with no more than the judge's own length, which
    vLLM would refuse and the transformers engine would read past.
    """
    declared = declared_length(model)
    if declared is None or recipe.max_model_len is None or recipe.max_model_len <= declared:
        return recipe
    return recipe.model_copy(update={"max_model_len": declared})


def open_generator(
    recipe: GeneratorRecipe, model: Path, chat: Chat, *, seed: int, encode_gold: bool = False
) -> AbstractContextManager[Any]:
    """A generator of `model`; its engine starts when it is first asked and is gone when the block ends. `encode_gold` gives
    groups their gold answers as tokens, which not every chat template allows.
    """
    if recipe.kind == "scripted":
        from selfplay.generators.scripted import ScriptedGenerator

        return nullcontext(ScriptedGenerator(chat, seed=seed, encode_gold=encode_gold))
    import torch

    from selfplay.generators.engine import EngineSettings
    from selfplay.generators.generator import EngineGenerator

    assert recipe.kind in ("vllm", "transformers"), "auto is resolved by now"
    settings = EngineSettings(
        kind="vllm" if recipe.kind == "vllm" else "transformers",
        model=str(base_folder(model)),
        adapter=str(model) if is_adapter(model) else None,
        adapter_rank=adapter_rank(model) if is_adapter(model) else 0,
        dtype=recipe.dtype,
        max_model_len=recipe.max_model_len,
        gpu_memory_utilization=recipe.gpu_memory_utilization,
        tensor_parallel_size=recipe.tensor_parallel_size,
        data_parallel_size=recipe.data_parallel_size,
        max_batch_size=recipe.max_batch_size,
        engine_args=recipe.engine_args,
        stop_token_ids=chat.stop_token_ids,
        seed=seed,
    )
    # a CUDA context in this process would keep memory from the trainer; vLLM always gets a process of its own
    isolate = recipe.kind == "vllm" or torch.cuda.is_available() or recipe.data_parallel_size > 1
    return EngineGenerator(settings, chat, isolate=isolate, encode_gold=encode_gold)
