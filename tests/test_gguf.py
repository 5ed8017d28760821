"""A GGUF file written here from a tiny Llama comes back as that Llama."""

import json
import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfplay.errors import DataError, StorageError
from selfplay.gguf import import_gguf
from tests.tiny import END, SPECIAL, make_tiny_model

F32, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0
TEXT = "the cat  and  12 dogs\n\n  in 3 boxes<|end|>\n"
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    layer, part = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{LAYER_NAMES[part.removesuffix('.weight')]}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF keeps the two halves of a rotary head interleaved row by row."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(
    path: Path, model: Path, *, pre: str = "gpt-2", architecture: str = "llama", kind: GGMLQuantizationType = F32
) -> Path:
    config = json.loads((model / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(model)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_eot_token_id(tokenizer.convert_tokens_to_ids("<|user|>"))
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in load_file(model / "model.safetensors").items():
        weight = tensor.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            weight = interleaved(weight, config[heads])
        blocks = kind if weight.ndim == 2 else F32
        writer.add_tensor(gguf_name(name), quantize(weight, blocks), raw_dtype=blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(tokenizer(TEXT, return_tensors="pt")["input_ids"]).logits
    return result


def test_an_imported_fp32_file_gives_the_logits_and_the_token_ids_of_the_model_it_was_made_from(
    tiny: Path, tmp_path: Path
) -> None:
    import_gguf(write_gguf(tmp_path / "tiny.gguf", tiny), tmp_path / "out", dtype="float32")
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (tiny, tmp_path / "out"))
    chat = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "in the end"}]
    assert before(TEXT)["input_ids"] == after(TEXT)["input_ids"]
    assert before.apply_chat_template(chat) == after.apply_chat_template(chat)
    assert (after.bos_token, after.eos_token, after.pad_token) == (before.bos_token, END, before.pad_token)
    expected, found = (
        logits(AutoModelForCausalLM.from_pretrained(folder), before) for folder in (tiny, tmp_path / "out")
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_quantized_blocks_come_out_as_the_plain_weights_they_stand_for(tiny: Path, tmp_path: Path) -> None:
    import_gguf(write_gguf(tmp_path / "tiny.gguf", tiny, kind=Q8_0), tmp_path / "out", dtype="float32")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    name = "model.layers.1.mlp.down_proj.weight"
    original = load_file(tiny / "model.safetensors")[name].numpy()
    found = load_file(tmp_path / "out" / "model.safetensors")[name].numpy()
    np.testing.assert_array_equal(found, dequantize(quantize(original, Q8_0), Q8_0))
    assert np.abs(found - original).max() > 0  # the file was quantized, else this test sees nothing


def test_weights_are_bf16_unless_told_otherwise_and_both_end_tokens_end_a_completion(
    tiny: Path, tmp_path: Path
) -> None:
    import_gguf(write_gguf(tmp_path / "tiny.gguf", tiny), tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [SPECIAL.index(END), SPECIAL.index("<|user|>")]
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir() if path.name != "SHA256SUMS"}) == 1


def test_a_file_that_asks_for_single_digits_gets_them(tiny: Path, tmp_path: Path) -> None:
    """Runs of spaces before a digit show it: split after them there is no space left to lead the digit."""
    for pre in ("gpt-2", "smollm"):
        import_gguf(write_gguf(tmp_path / f"{pre}.gguf", tiny, pre=pre), tmp_path / pre)
    pieces = {
        pre: AutoTokenizer.from_pretrained(tmp_path / pre).backend_tokenizer.pre_tokenizer.pre_tokenize_str("in  12")
        for pre in ("gpt-2", "smollm")
    }
    assert [piece for piece, _ in pieces["gpt-2"]] == ["in", "\u0120", "\u012012"]
    assert [piece for piece, _ in pieces["smollm"]] == ["in", "\u0120\u0120", "1", "2"]


def test_a_split_that_nobody_knows_is_said(tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="selfplay.gguf"):
        import_gguf(write_gguf(tmp_path / "a.gguf", tiny, pre="gpt-2"), tmp_path / "a")
        assert not caplog.messages
        import_gguf(write_gguf(tmp_path / "b.gguf", tiny, pre="of-our-own"), tmp_path / "b")
    assert "of-our-own" in caplog.text


def test_a_folder_with_files_is_refused_and_an_empty_one_is_taken(tiny: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny)
    full, empty = tmp_path / "full", tmp_path / "empty"
    full.mkdir()
    empty.mkdir()
    (full / "mine.txt").write_text("mine")
    with pytest.raises(StorageError, match="already there"):
        import_gguf(path, full)
    assert [entry.name for entry in full.iterdir()] == ["mine.txt"]
    import_gguf(path, empty)
    assert (empty / "config.json").exists()


def test_what_is_no_whole_gguf_is_refused_by_name_and_nothing_is_left_behind(tiny: Path, tmp_path: Path) -> None:
    good = write_gguf(tmp_path / "good.gguf", tiny)
    text, cut, other = tmp_path / "text.gguf", tmp_path / "cut.gguf", tmp_path / "other.gguf"
    text.write_text("not a model")
    cut.write_bytes(good.read_bytes()[:3000])
    write_gguf(other, tiny, architecture="clip")
    for path, reason in (
        (tmp_path / "none.gguf", "no such file"),
        (text, "not a GGUF"),
        (cut, "cut short"),
        (other, "clip"),
    ):
        with pytest.raises(DataError, match=reason) as caught:
            import_gguf(path, tmp_path / "models" / "out")
        assert path.name in str(caught.value)
    assert not (tmp_path / "models").exists()
