"""Turn a GGUF file into a Hugging Face checkpoint: safetensors, config, tokenizer, chat template.

Why this exists: neither training nor vLLM reads GGUF. The weights come out as the file's quantized values, which no
later cast makes better: a Q4 file gives a Q4-quality model, only larger.
"""

import logging
from pathlib import Path
from typing import Any, Literal, NamedTuple

from selfplay.errors import DataError, StorageError
from selfplay.store import write_folder

Dtype = Literal["bfloat16", "float16", "float32"]

# Files that split every digit from the text before the byte-level split. transformers reads the vocabulary of such a
# file but splits as GPT-2 does, so runs of spaces before a number get other ids than the model was trained on.
DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "command-r"})
SPLIT_AS_GPT2 = frozenset({"gpt-2", "gpt2", "default", "olmo", "mpt", "jais"})

PROBE = "It is 12 o'clock.\n\n  Count:  3, 4 and 56."

log = logging.getLogger(__name__)


class Header(NamedTuple):
    """What a checkpoint needs from the file's header beyond what transformers takes from it."""

    architecture: str
    pre_tokenizer: str  # "" where the file names none
    end_ids: tuple[int, ...]  # end of text first, then end of turn, without repeats


def import_gguf(gguf_path: Path, out: Path, *, dtype: Dtype = "bfloat16") -> None:
    """Write the model in the GGUF file `gguf_path` to the folder `out` as a Hugging Face checkpoint.

    `out` then holds config.json, generation_config.json, model.safetensors in `dtype`, the tokenizer and the file's
    chat template; it loads in transformers and vLLM as it is. The folder appears whole or not at all: it is made under
    a temporary name beside `out`, loaded again, compared on one forward pass, and renamed.

    Raises DataError where the file is missing, is no GGUF, or holds an architecture that transformers can't convert;
    StorageError where `out` exists and is not an empty folder, or where the checkpoint does not load as it was saved.
    Needs the `gguf` package. Takes about 4 bytes of memory per parameter.
    """
    check_paths(gguf_path, out)
    header = read_header(gguf_path)
    tokenizer, model = load_tokenizer(gguf_path, header), load_model(gguf_path, header, dtype)
    tokenizer.model_max_length = model.config.max_position_embeddings
    write_folder(out, lambda folder: save(folder, tokenizer, model))


def check_paths(gguf_path: Path, out: Path) -> None:
    """Raise where there is no GGUF file to read or no free place to write."""
    if not gguf_path.is_file():
        raise DataError(f"{gguf_path}: no such file. Give the path of a .gguf file.")
    with gguf_path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise DataError(f"{gguf_path}: not a GGUF file (it starts with {magic!r}, not b'GGUF'). Is the download whole?")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise StorageError(f"{out}: already there. Remove it or give another folder; nothing was written.")


def read_header(gguf_path: Path) -> Header:
    """The few header fields that decide how text is split and where a completion ends."""
    try:
        import gguf
    except ImportError as error:
        raise DataError("Reading GGUF needs the package gguf: pip install 'selfplay-dpo[gguf]'.") from error
    try:
        reader = gguf.GGUFReader(gguf_path)
    except (ValueError, IndexError, OSError) as error:
        raise DataError(f"{gguf_path}: damaged or cut short ({error}). Fetch the file again.") from error

    def value(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    ends = (value(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return Header(
        architecture=value("general.architecture") or "",
        pre_tokenizer=value("tokenizer.ggml.pre") or "",
        end_ids=tuple(dict.fromkeys(int(end) for end in ends if end is not None)),
    )


def load_tokenizer(gguf_path: Path, header: Header) -> Any:
    """The file's tokenizer, splitting text as its vocabulary was learned."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise DataError(f"{gguf_path}: transformers can't read this tokenizer: {error}") from error
    backend = tokenizer.backend_tokenizer
    if header.pre_tokenizer in DIGITS_APART:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif header.pre_tokenizer not in SPLIT_AS_GPT2 and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        log.warning(
            "%s: text is split as GPT-2 does, the file asks for %r. Compare token ids with the original tokenizer.",
            gguf_path,
            header.pre_tokenizer or "nothing",
        )
    return tokenizer


def load_model(gguf_path: Path, header: Header, dtype: Dtype) -> Any:
    """The file's model, its weights unpacked from their quantized blocks in fp32 and then rounded to `dtype`."""
    import torch
    import transformers

    options: dict[str, Any] = {"gguf_file": gguf_path.name, "dtype": torch.float32}
    # Releases without GgufConfig always unpack; those with it keep the blocks unless told, and blocks can't be saved.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(gguf_file=gguf_path.name, dequantize=True)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(gguf_path.parent, **options).eval()
    except (ValueError, KeyError, NotImplementedError) as error:
        raise DataError(
            f"{gguf_path}: transformers {transformers.__version__} can't convert the architecture "
            f"{header.architecture!r}: {error}"
        ) from error
    # save_pretrained refuses a model that still says it is quantized.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    for parameter in model.parameters():  # not model.to(dtype): it would round the rotary frequencies, which stay fp32
        parameter.data = parameter.data.to(getattr(torch, dtype))
    if header.end_ids:
        model.generation_config.eos_token_id = header.end_ids[0] if len(header.end_ids) == 1 else list(header.end_ids)
    return model


def save(folder: Path, tokenizer: Any, model: Any) -> None:
    """Write the checkpoint into `folder`, load it again and compare."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():  # weights come out readable by their owner alone; the others' mode follows the umask
        path.chmod((folder / "config.json").stat().st_mode)
    verify(folder, tokenizer, model)


def verify(folder: Path, tokenizer: Any, model: Any) -> None:
    """Raise StorageError unless what was saved gives the same ids and the same logits as what was converted."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = tokenizer(PROBE, return_tensors="pt")["input_ids"]
    saved_ids = AutoTokenizer.from_pretrained(folder)(PROBE, return_tensors="pt")["input_ids"]
    if ids.tolist() != saved_ids.tolist():
        raise StorageError(
            f"{folder}: the saved tokenizer gives {saved_ids.tolist()}, the file's gives {ids.tolist()}."
        )
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()
    with torch.no_grad():
        logits, saved_logits = model(ids).logits, saved(ids).logits
    if not torch.isfinite(logits).all():
        raise DataError("The converted model's logits are not finite: the file's weights are damaged.")
    if not torch.equal(logits, saved_logits):
        raise StorageError(f"{folder}: the checkpoint's logits differ from the converted model's after reloading.")
