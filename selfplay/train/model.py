"""Loading, probing and saving the policy that trains."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selfplay.adapters import FOUR_BIT, base_folder, four_bit_source, is_adapter, load_adapter
from selfplay.errors import AuditError, DataError
from selfplay.model_files import TOKENIZER_FILES
from selfplay.store import weights_digest, write_folder
from selfplay.train import attention
from selfplay.train.four_bit import load_quantized
from selfplay.train.logps import TokenLogps
from selfplay.train.lora import add_adapter, write_adapter
from selfplay.train.optim import Masters
from selfplay.train.pack import build_packs
from selfplay.types import Message, PreferencePair

PROBE_TOLERANCE = 1e-3  # nats; fp32 noise over a few layers is about 1e-5, a wrong mask is about 1


def load_model(
    path: str,
    *,
    lora: Mapping[str, Any] | None = None,
    load_in_4bit: bool = False,
    gradient_checkpointing: bool = False,
) -> Any:
    """The causal LM at `path` in fp32, without dropout, ready for packs; where `path` is a LoRA adapter, its base with the
    adapter in place. `lora` (a recipe's train.lora) makes the adapter the only thing that trains, a fresh one where the
    model has none. With `load_in_4bit` a base that holds the values of 4-bit weights is loaded as these. DataError where it
    can't be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = base_folder(Path(path))
    source = _quantized_from(folder) if load_in_4bit else None
    try:
        config = AutoConfig.from_pretrained(folder)
        kind = AutoModelForCausalLM._model_mapping[type(config)]
        # sdpa ignores attention soft-caps; recurrent and ALiBi models don't have it
        softcap = config.get_text_config().to_dict().get("attn_logit_softcapping")
        kernel = "sdpa" if kind._supports_sdpa and not softcap else "eager"
        if kernel == "sdpa" and kind._supports_attention_backend:
            attention.register()
            kernel = attention.IMPLEMENTATION
        if source is not None:
            model = load_quantized(source, {"attn_implementation": kernel})
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=kernel)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: no causal language model could be loaded from here ({error})") from error
    if is_adapter(Path(path)):
        model = load_adapter(model, Path(path), trainable=lora is not None)
    elif lora is not None:
        model = add_adapter(model, lora)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if "attention_dropout" in vars(module):
            module.attention_dropout = 0.0
    if gradient_checkpointing:
        if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.20
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train(gradient_checkpointing)  # transformers checkpoints in train mode only
    return model


def _quantized_from(folder: Path) -> Path | None:
    """The weights that the 4-bit base in `folder` was made from; None where it is an ordinary model. DataError where they are
    gone or changed.
    """
    source = four_bit_source(folder)
    if source is not None:
        there = (source / "config.json").is_file()
        if not there or weights_digest(source) != json.loads((folder / FOUR_BIT).read_text())["weights"]:
            raise DataError(
                f"{folder / FOUR_BIT}: the model {source} that it was quantized from is {'changed' if there else 'gone'}. "
                "Bring it back, or write its new place into quantized_from"
            )
    return source


def default_device() -> torch.device:
    """The first CUDA device, else the CPU."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


@contextmanager
def exact_products() -> Iterator[None]:
    """Within it fp32 matrix products are products of fp32: containers for GPUs may ask for TF32 in the environment, whose
    rounding could be taken for a wrong mask.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def probe(model: Any, device: torch.device) -> tuple[bool, float | None]:
    """What `can_share_prompts` says of this very model. AuditError where our logps differ from its own."""
    head = check_head(model, device)
    if not head <= PROBE_TOLERANCE:
        raise AuditError(
            f"this model scales its logits in a way that selfplay doesn't know: our logps and its own differ by {head:.4f} "
            "nats. Training it would follow a wrong gradient; please report the model's family"
        )
    return can_share_prompts(model, device)


@exact_products()
def can_share_prompts(model: Any, device: torch.device) -> tuple[bool, float | None]:
    """(whether packed logps equal plain ones, the largest difference in nats) on this very model. The difference is None
    where the model takes no mask of packs at all.

    The probe crosses the sliding window where there is one within reach. Recurrent and ALiBi models fail it, and then
    train on plain rows.
    """
    config = model.config.get_text_config()
    window = config.to_dict().get("sliding_window") or 0
    length = window + 8 if 0 < window <= 1024 else 24
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, config.vocab_size, (count,), generator=generator).tolist())

    prompts = [draw(length), draw(7)]
    pairs = [_bare_pair(p, draw(9), draw(5)) for p in (*prompts, prompts[0])]
    sums = []
    with torch.no_grad():
        for shared in (True, False):
            packs = build_packs(pairs, range(len(pairs)), max_pack_tokens=1 << 20, shared=shared)
            pack = packs[0].to(device)
            try:
                sums.append(pack.sum_per_sequence(TokenLogps(model)(pack)))
            except (TypeError, ValueError, RuntimeError, KeyError):
                if not shared:
                    raise
                return False, None
        difference = (sums[0] - sums[1]).abs().max().item()
    return difference <= PROBE_TOLERANCE * max(1.0, sums[1].abs().max().item() / 100), difference


@exact_products()
def check_head(model: Any, device: torch.device) -> float:
    """Largest difference in nats between our per-token logps and those from the model's own logits: a family that scales
    its logits in a way that we don't know shows here.
    """
    vocab = model.config.get_text_config().vocab_size
    ids = torch.arange(3, 19, device=device)[None] % vocab
    pair = _bare_pair(tuple(ids[0, :4].tolist()), tuple(ids[0, 4:].tolist()), tuple(ids[0, 4:].tolist()))
    pack = build_packs([pair], [0], max_pack_tokens=64, shared=False)[0].to(device)
    with torch.no_grad():
        own = TokenLogps(model)(pack)
        logits_TV = model(input_ids=ids, use_cache=False).logits[0].float()
        theirs = logits_TV.log_softmax(-1)[3:-1].gather(1, ids[0, 4:, None])[:, 0]
    return float((own - theirs).abs().max())


def _bare_pair(prompt: tuple[int, ...], chosen: tuple[int, ...], rejected: tuple[int, ...]) -> PreferencePair:
    nothing = (Message("user", ""),)
    return PreferencePair("probe", nothing, nothing, nothing, prompt, chosen, rejected)


def save_policy(model: Any, masters: Masters, source: str, out: Path, *, dtype: str, chat_template: str | None) -> None:
    """A Hugging Face checkpoint of the masters at `out`, written whole: an adapter in peft's format where an adapter was
    trained. Tokenizer and generation config are the source's own files, byte for byte: saving a tokenizer anew may order
    its tokens differently in every process.
    """
    target = getattr(torch, dtype)
    state = {name: weight.to("cpu", target).contiguous() for name, weight in masters.whole()}
    is_lora = any(".lora_" in name for name in state)
    tied = set(model._tied_weights_keys or ())
    if not is_lora:
        others = {k: v for k, v in model.state_dict().items() if k not in state and k not in tied}
        state |= {k: v.to(target) for k, v in others.items() if v.is_floating_point()}

    def write(folder: Path) -> None:
        if is_lora:
            write_adapter(model, state, base_folder(Path(source)), folder)
        else:
            model.save_pretrained(folder, state_dict=state)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n")
        copy_tokenizer(Path(source), folder)
        if chat_template is not None:
            (folder / "chat_template.jinja").write_text(chat_template)

    write_folder(out, write)


def copy_tokenizer(source: Path, target: Path) -> None:
    """The files of a model folder that say how text becomes ids and how completions end."""
    for file in {f for pattern in TOKENIZER_FILES for f in source.glob(pattern) if f.is_file()}:
        shutil.copyfile(file, target / file.name)
