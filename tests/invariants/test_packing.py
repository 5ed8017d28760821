"""Packed rows give the logps and the gradients of plain ones, on a small random model of every family.

The plain side is transformers' own forward: one row per completion, no padding, no mask, log-softmax of its logits.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import job_of, pair_of, random_pairs
from tiny import make_tiny_model
from torch import Tensor

from selfplay import store
from selfplay.losses import PairLogps, total_loss
from selfplay.train import attention
from selfplay.train import logps as logps_module
from selfplay.train.logps import TokenLogps
from selfplay.train.loop import run_training
from selfplay.train.model import can_share_prompts, load_model
from selfplay.train.optim import Masters
from selfplay.train.pack import build_packs
from selfplay.train.reference import ReferenceLogps, pair_logps
from selfplay.types import PreferencePair

CPU = torch.device("cpu")
WINDOW = 16  # shorter than the prompts below, so every completion crosses it
SHARING: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": WINDOW, "query_pre_attn_scalar": 32, "sliding_window_pattern": 2},
    "mistral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "gpt_neox": {"num_key_value_heads": 2},
    "olmo2": {},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.5},
    "phi": {"partial_rotary_factor": 0.5},  # its head has a bias
}
PLAIN: dict[str, dict[str, Any]] = {"mamba": {"state_size": 8}, "bloom": {"n_head": 2, "n_layer": 2}}
FAMILIES = SHARING | PLAIN


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: make_tiny_model(root / name, family=name, **config) for name, config in FAMILIES.items()}


@pytest.fixture(scope="module")
def many() -> list[PreferencePair]:
    """9 pairs of 3 prompts with 3 completions each, of unequal weights."""
    drawn = random_pairs(prompt_length=40, length=20)
    assert min(len(p.prompt_token_ids) for p in drawn) > WINDOW
    return [
        pair_of(p.prompt_token_ids, p.chosen_token_ids, p.rejected_token_ids, weight=0.5 + n)
        for n, p in enumerate(drawn)
    ]


def plain_sum(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """Summed logp of a completion from the model's own logits on one bare row."""
    logits_TV = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0].float()
    logps_TV = logits_TV[len(prompt) - 1 : -1].log_softmax(-1)
    return logps_TV.gather(1, torch.tensor(completion)[:, None]).sum()


def noisy_reference(pairs: Sequence[PreferencePair]) -> ReferenceLogps:
    """Any numbers near a tiny model's logps, so that no gradient is the same for all pairs."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.tensor([[len(p.chosen_token_ids), len(p.rejected_token_ids)] for p in pairs])
    values = -6.0 * lengths + torch.randn(lengths.shape, generator=draw) * 5
    return ReferenceLogps(values[:, 0].contiguous(), values[:, 1].contiguous())


def plain_loss(model: Any, pairs: Sequence[PreferencePair], reference: ReferenceLogps) -> Tensor:
    chosen = torch.stack([plain_sum(model, p.prompt_token_ids, p.chosen_token_ids) for p in pairs])
    rejected = torch.stack([plain_sum(model, p.prompt_token_ids, p.rejected_token_ids) for p in pairs])
    lengths = [
        torch.tensor([float(len(ids)) for ids in side]) for side in zip(*(_sides(p) for p in pairs), strict=True)
    ]
    logps = PairLogps(chosen, rejected, reference.chosen_B, reference.rejected_B, *lengths)
    return (_losses(logps) * torch.tensor([p.weight for p in pairs])).mean()


def packed_loss(
    module: TokenLogps,
    pairs: Sequence[PreferencePair],
    reference: ReferenceLogps,
    *,
    cap: int = 2048,
    length: int | None = None,
    shared: bool = True,
) -> Tensor:
    parts = []
    for pack in build_packs(pairs, range(len(pairs)), max_pack_tokens=cap, shared=shared, max_pack_length=length):
        weights = torch.tensor([pairs[i].weight for i in pack.pair_B])
        parts.append((_losses(pair_logps(pack, module(pack), reference)) * weights).sum())
    return torch.stack(parts).sum() / len(pairs)


def _sides(pair: PreferencePair) -> tuple[Sequence[int], Sequence[int]]:
    return pair.chosen_token_ids, pair.rejected_token_ids


def _losses(logps: PairLogps) -> Tensor:
    return total_loss(
        logps, names=("sigmoid", "sft"), weights=(1.0, 0.3), numbers={"beta": 0.1, "label_smoothing": 0.0}
    )


def gradient(model: Any, loss: Tensor) -> Tensor:
    """All gradients of the loss as one vector."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def relative(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted| in L2."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logps_and_gradients_equal_those_of_single_rows(
    family: str, folders: dict[str, Path], many: list[PreferencePair]
) -> None:
    from transformers import AutoModelForCausalLM

    model = load_model(str(folders[family]))
    # eager attention is the one that leaves nothing out: sdpa ignores soft-caps
    plain = AutoModelForCausalLM.from_pretrained(folders[family], attn_implementation="eager").eval()
    shared, _ = can_share_prompts(model, CPU)
    assert shared == (family in SHARING)
    module = TokenLogps(model)
    packs = build_packs(many, range(len(many)), max_pack_tokens=2048, shared=shared)
    assert len(packs) == 1
    assert packs[0].num_sequences == 9
    sum_S = packs[0].sum_per_sequence(module(packs[0])).detach()
    with torch.no_grad():
        for place, index in enumerate(packs[0].pair_B):
            pair = many[index]
            assert packs[0].rejected_B is not None
            for sequence, ids in zip((packs[0].chosen_B, packs[0].rejected_B), _sides(pair), strict=True):
                wanted = plain_sum(plain, pair.prompt_token_ids, ids)
                assert relative(sum_S[sequence[place]], wanted) < 1e-5
    reference = noisy_reference(many)
    wanted_gradient = gradient(plain, plain_loss(plain, many, reference))
    assert wanted_gradient.norm() > 0.1
    assert relative(gradient(model, packed_loss(module, many, reference, shared=shared)), wanted_gradient) < 1e-5


@pytest.mark.parametrize("cap", [1, 90, 200])
def test_the_cap_on_a_pack_changes_neither_loss_nor_gradient(
    cap: int, folders: dict[str, Path], many: list[PreferencePair]
) -> None:
    module = TokenLogps(load_model(str(folders["llama"])))
    reference = noisy_reference(many)
    assert len(build_packs(many, range(len(many)), max_pack_tokens=cap, shared=True)) > 1
    whole, cut = packed_loss(module, many, reference), packed_loss(module, many, reference, cap=cap)
    assert relative(cut.detach(), whole.detach()) < 1e-6
    assert relative(gradient(module.model, cut), gradient(module.model, whole)) < 1e-5


@pytest.mark.parametrize("family", SHARING)
def test_the_cap_on_a_row_changes_neither_loss_nor_gradient(
    family: str, folders: dict[str, Path], many: list[PreferencePair]
) -> None:
    module = TokenLogps(load_model(str(folders[family])))
    reference = noisy_reference(many)
    (pack,) = build_packs(many, range(len(many)), max_pack_tokens=2048, shared=True, max_pack_length=90)
    assert len(pack.input_ids_RT) > 1
    assert len(pack.lengths) > len({p.prompt_token_ids for p in many}), "some row is padded"
    whole, cut = packed_loss(module, many, reference), packed_loss(module, many, reference, length=90)
    assert relative(cut.detach(), whole.detach()) < 1e-6
    assert relative(gradient(module.model, cut), gradient(module.model, whole)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_both_ways_of_attending_to_blocks_are_the_same(
    family: str, folders: dict[str, Path], many: list[PreferencePair], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = TokenLogps(load_model(str(folders[family])))
    reference = noisy_reference(many)
    found = []
    for limit in (attention.MAX_STORED_KEYS, 0):
        monkeypatch.setattr(attention, "MAX_STORED_KEYS", limit)
        for length in (None, 90):
            loss = packed_loss(module, many, reference, length=length)
            found.append((loss.detach(), gradient(module.model, loss)))
    for value, vector in found[1:]:
        assert relative(value, found[0][0]) < 1e-6
        assert relative(vector, found[0][1]) < 1e-5


@pytest.mark.parametrize("family", SHARING)
def test_a_changed_completion_leaves_all_others_of_the_pack_exactly_as_they_were(
    family: str, folders: dict[str, Path], many: list[PreferencePair]
) -> None:
    module = TokenLogps(load_model(str(folders[family])))

    def logps(pairs: Sequence[PreferencePair]) -> tuple[Tensor, Tensor]:
        (pack,) = build_packs(pairs, range(len(pairs)), max_pack_tokens=2048, shared=True)
        with torch.no_grad():
            return module(pack), pack.sequence_N

    first = many[0].chosen_token_ids
    other = tuple(ids % 250 + 7 for ids in first)

    def changed(ids: tuple[int, ...]) -> tuple[int, ...]:
        return other if ids == first else ids

    before, sequence_N = logps(many)
    after, _ = logps(
        [pair_of(p.prompt_token_ids, changed(p.chosen_token_ids), changed(p.rejected_token_ids)) for p in many]
    )
    differs = {int(s) for s in sequence_N[before != after]}
    assert len(differs) == 1
    assert not torch.equal(before, after)


def test_the_head_in_chunks_gives_the_same_logps_and_gradient(
    folders: dict[str, Path], many: list[PreferencePair], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = TokenLogps(load_model(str(folders["gemma2"])))
    reference = noisy_reference(many)
    whole = packed_loss(module, many, reference)
    wanted = gradient(module.model, whole)
    (pack,) = build_packs(many, range(len(many)), max_pack_tokens=2048, shared=True)
    num_tokens = len(pack.target_N)
    monkeypatch.setattr(logps_module, "CHUNK_ELEMENTS", 7 * module.model.config.vocab_size)
    for stored in (logps_module.STORED_ELEMENTS, 0):
        monkeypatch.setattr(logps_module, "STORED_ELEMENTS", stored)
        seen: list[int] = []
        inner = logps_module.F.linear

        def spy(hidden: Tensor, *rest: Tensor, seen: list[int] = seen, inner: Any = inner) -> Tensor:
            seen.append(len(hidden))
            return inner(hidden, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(logps_module.F, "linear", spy)
            cut = packed_loss(module, many, reference)
            found = gradient(module.model, cut)
        assert seen.count(7) == num_tokens // 7 * (1 if stored else 2)  # the head is run anew where nothing is stored
        assert relative(cut.detach(), whole.detach()) < 1e-6
        assert relative(found, wanted) < 1e-5


@pytest.mark.parametrize("family", PLAIN)
def test_a_model_that_cannot_share_prompts_trains_on_plain_rows(
    family: str, folders: dict[str, Path], many: list[PreferencePair], tmp_path: Path
) -> None:
    job = job_of(tmp_path, folders[family], many, shuffle=False, batch_size=3)
    result = run_training(job)
    assert result["shared_prompts"] is False
    assert result["num_steps"] == 3
    rows = store.read_json_lines(tmp_path / "out" / "train" / "steps.jsonl")
    weight = sum(p.weight for p in many[:3]) / 3
    assert rows[0]["loss"] == pytest.approx(weight * 0.693147, rel=1e-5)
    assert rows[-1]["rewards/margins"] != 0
    assert load_model(str(tmp_path / "out" / "policy")).config.model_type == family


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bf16_copy_computes_what_the_checkpoint_loaded_in_bf16_does(family: str, folders: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = load_model(str(folders[family]))
    for param in model.parameters():
        bits = param.data.view(torch.int32)
        bits[bits & 0xFFFF == 0x8000] += 1  # a half between two of bf16's, which torch's cast rounds to the even one
    attention = model.config._attn_implementation
    path = folders[family]
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation=attention).eval()
    loaded.load_state_dict(model.state_dict())
    Masters(model, compute_dtype=torch.bfloat16)
    ids = torch.randint(6, 260, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)
