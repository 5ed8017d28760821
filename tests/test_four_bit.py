"""QLoRA: the trainer holds a base of 4 bits, and everyone else plays the very policy that it trains."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import greedy, job_of, logps_of, random_pairs, steps
from scripted_run import write_recipe
from tiny import make_tiny_model

from selfplay import store
from selfplay.adapters import base_folder, check_lora, four_bit_source
from selfplay.cli import main
from selfplay.errors import DataError, RecipeError
from selfplay.generators.engine import EngineSettings
from selfplay.plan import make_plan
from selfplay.plan_models import facts_in
from selfplay.recipe_file import load_recipe
from selfplay.recipe_train import LoraRecipe, TrainRecipe
from selfplay.train.four_bit import BASE, load_quantized, playable, write_base
from selfplay.train.logps import TokenLogps
from selfplay.train.loop import run_training
from selfplay.train.model import load_model
from selfplay.train.optim import cast_parameters
from selfplay.train.pack import build_packs
from selfplay.train.settings import require_packages

if importlib.util.find_spec("bitsandbytes") is None:
    pytest.skip("bitsandbytes is not installed on this system", allow_module_level=True)

LORA = {"r": 4, "lora_alpha": 8, "load_in_4bit": True}
PAIRS = random_pairs(num_prompts=4, num_completions=2, prompt_length=20, length=12)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "original")


@pytest.fixture(scope="module")
def base(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = TrainRecipe(lora=LoraRecipe(**LORA), bf16=False)
    return playable(original, tmp_path_factory.mktemp("run"), recipe)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on `base`; tests read it."""
    folder = tmp_path_factory.mktemp("first")
    run_training(job_of(folder, base, PAIRS, lora=LORA, learning_rate=5e-3, num_train_epochs=3))
    return folder / "out" / "policy"


def logps(model: Any) -> torch.Tensor:
    return logps_of(model, PAIRS)


def quantized(model: Any) -> list[Any]:
    from bitsandbytes.nn import Linear4bit

    return [m for m in model.modules() if isinstance(m, Linear4bit)]


def test_the_base_of_a_run_has_the_values_of_4_bits_and_is_an_ordinary_model(original: Path, base: Path) -> None:
    assert base.name == BASE
    assert four_bit_source(base) == original
    held, plain = load_model(str(base), load_in_4bit=True), load_model(str(base))
    assert len(quantized(held)) == 14
    assert quantized(plain) == []
    torch.testing.assert_close(logps(held), logps(plain), rtol=1e-5, atol=1e-5)
    assert (logps(plain) - logps(load_model(str(original)))).abs().max() > 1e-2
    layer = plain.model.layers[0].mlp.up_proj.weight
    for block in layer.detach().flatten().split(64):
        assert len(block.unique()) <= 16, "a block of 64 weights has the values of 4 bits"
    assert sum(m.weight.nbytes for m in quantized(held)) * 8 == sum(
        plain.get_submodule(name).weight.nbytes
        for name, m in held.named_modules()
        if any(m is one for one in quantized(held))
    )


def test_the_scales_are_quantized_as_well_and_the_head_is_not_touched(base: Path) -> None:
    held = load_model(str(base), load_in_4bit=True)
    assert all(m.weight.quant_state.nested and m.weight.quant_state.quant_type == "nf4" for m in quantized(held))
    assert held.get_output_embeddings().weight.dtype == torch.float32


def test_the_4_bits_compute_in_bf16_where_training_does(base: Path) -> None:
    held = load_model(str(base), load_in_4bit=True)
    bits = [m.weight.data.clone() for m in quantized(held)]
    cast_parameters(held, torch.bfloat16)
    assert all(torch.equal(m.weight.data, old) for m, old in zip(quantized(held), bits, strict=True))
    seen: set[torch.dtype] = set()
    quantized(held)[3].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    logps(held)
    assert seen == {torch.bfloat16}
    assert {m.compute_dtype for m in quantized(held)} == {torch.bfloat16}


def test_training_changes_the_adapter_and_nothing_else(original: Path, base: Path, adapter: Path) -> None:
    rows = steps(adapter.parent.parent)
    assert rows[0]["audit/zero_logratio"] < 1e-6
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    assert base_folder(adapter) == base
    store.check_folder(base)
    assert (logps(load_model(str(adapter))) - logps(load_model(str(base)))).abs().max() > 1e-2


def test_the_gradient_is_that_of_the_same_adapter_on_the_values_of_the_4_bits(base: Path, adapter: Path) -> None:
    lora = LoraRecipe(**LORA).model_dump()

    def gradient(*, load_in_4bit: bool) -> torch.Tensor:
        model = load_model(str(adapter), lora=lora, load_in_4bit=load_in_4bit)
        module = TokenLogps(model)
        (pack,) = build_packs(PAIRS, range(len(PAIRS)), max_pack_tokens=4096, shared=True)
        with torch.no_grad():
            module(pack)  # as the reference pass comes before the first step
        sums = pack.sum_per_sequence(module(pack))
        torch.nn.functional.logsigmoid(sums[pack.chosen_B] - sums[pack.rejected_B]).sum().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 28
        return torch.cat([p.grad.flatten() for p in trained if p.grad is not None])

    held, plain = gradient(load_in_4bit=True), gradient(load_in_4bit=False)
    assert plain.norm() > 0
    assert (held - plain).norm() / plain.norm() < 1e-4


def test_the_engine_samples_from_the_policy_that_was_trained(base: Path, adapter: Path) -> None:
    common = {"kind": "transformers", "dtype": "float32", "stop_token_ids": (1,)}
    served = EngineSettings(model=str(base_folder(adapter)), adapter=str(adapter), adapter_rank=4, **common)  # type: ignore[arg-type]
    ids, engine_logps = greedy(served, PAIRS[0].prompt_token_ids)
    trainer = load_model(str(adapter), load_in_4bit=True)
    assert quantized(trainer)
    prompt = PAIRS[0].prompt_token_ids
    with torch.no_grad():
        logits_TV = trainer(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    wanted = logits_TV.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    torch.testing.assert_close(engine_logps, wanted, rtol=1e-4, atol=1e-4)


def test_the_next_round_goes_on_from_the_adapter_and_takes_it_as_its_reference(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    run_training(job_of(tmp_path, adapter, PAIRS, lora=LORA, learning_rate=1e-6))
    assert steps(tmp_path)[0]["audit/zero_logratio"] < 1e-6
    policy = tmp_path / "out" / "policy"
    assert base_folder(policy) == base
    near = (logps(load_model(str(policy))) - logps(load_model(str(adapter)))).abs().max()
    assert 0 < near < 1e-2


def test_with_the_initial_policy_as_reference_the_4_bits_are_scored(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import selfplay.train.reference_pass as reference_pass

    loaded = []

    def spy(*arguments: Any, **named: Any) -> Any:
        loaded.append(load_model(*arguments, **named))
        return loaded[-1]

    monkeypatch.setattr(reference_pass, "load_model", spy)
    run_training(job_of(tmp_path, adapter, PAIRS, lora=LORA, job={"reference": str(base)}))
    assert [len(quantized(model)) for model in loaded] == [14]
    assert steps(tmp_path)[0]["loss"] != pytest.approx(0.6931, abs=1e-3)


def test_two_rounds_play_and_train_one_policy(original: Path, tmp_path: Path) -> None:
    (tmp_path / "rig").mkdir()
    recipe = write_recipe(tmp_path / "rig", original)
    generator = {"kind": "transformers", "max_tokens": 12, "dtype": "float32"}
    sets = [f"train.lora={json.dumps(LORA)}", f"generator={json.dumps(generator)}", "judge={kind: coin}"]
    sets += [
        "train.max_audit_difference=0.001",
        "pairs.truncated=judged",
        "evaluate={num_completions: 1, num_prompts: 2}",
    ]
    run = tmp_path / "run"
    assert main(["iterate", str(recipe), "--out", str(run), *(part for one in sets for part in ("--set", one))]) == 0
    for n in range(2):
        assert base_folder(run / f"round-00{n}" / "policy") == run / BASE
        done = store.read_json(run / f"round-00{n}" / "round.json")
        assert done["train"]["audit/mean_difference"] < 1e-4
    moved = tmp_path / "moved"
    run.rename(moved)
    assert base_folder(moved / "round-001" / "policy") == moved / BASE


def test_an_adapter_keeps_to_the_bits_that_it_was_trained_on(base: Path, adapter: Path) -> None:
    check_lora(adapter, LoraRecipe(**LORA))
    with pytest.raises(RecipeError, match="load_in_4bit True -> False"):
        check_lora(adapter, LoraRecipe(r=4, lora_alpha=8))


def test_merging_gives_the_policy_and_onto_the_original_it_warns(
    original: Path, base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same, other = tmp_path / "same", tmp_path / "other"
    assert main(["merge", str(adapter), str(same), "--dtype", "float32"]) == 0
    assert "warning" not in capsys.readouterr().err
    torch.testing.assert_close(logps(load_model(str(same))), logps(load_model(str(adapter))), rtol=1e-4, atol=1e-5)
    assert main(["merge", str(adapter), str(other), "--dtype", "float32", "--base", str(original)]) == 0
    assert "will not be the policy that was trained" in capsys.readouterr().err
    assert (logps(load_model(str(other))) - logps(load_model(str(same)))).abs().max() > 1e-2
    narrow = make_tiny_model(tmp_path / "narrow", hidden_size=32)
    assert main(["merge", str(adapter), str(tmp_path / "no"), "--base", str(narrow)]) == 65
    assert not (tmp_path / "no").exists()


def test_a_base_is_written_once_and_only_where_it_is_asked_for(original: Path, base: Path, adapter: Path) -> None:
    recipe = TrainRecipe(lora=LoraRecipe(**LORA), bf16=False)
    before = (base / "model.safetensors").stat().st_mtime_ns
    assert playable(original, base.parent, recipe) == base
    assert (base / "model.safetensors").stat().st_mtime_ns == before
    assert playable(adapter, base.parent, recipe) == adapter
    assert playable(original, base.parent, TrainRecipe(lora=LoraRecipe())) == original
    assert playable(original, base.parent, TrainRecipe()) == original


def test_a_base_in_bf16_has_the_values_that_training_computes_with(original: Path, tmp_path: Path) -> None:
    base = playable(original, tmp_path, TrainRecipe(lora=LoraRecipe(**LORA), bf16=True))
    held, plain = load_model(str(base), load_in_4bit=True), load_model(str(base))
    for model in (held, plain):
        cast_parameters(model, torch.bfloat16)
    assert (logps(held) - logps(plain)).abs().mean() < 2e-2
    assert json.loads((base / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_plan_counts_the_base_that_a_run_writes(original: Path, tmp_path: Path) -> None:
    def needed(**lora: Any) -> int:
        recipe = load_recipe(write_recipe(tmp_path, original, train={"bf16": False, "lora": {"r": 4, **lora}}))
        return make_plan(recipe, tmp_path / "run").bytes_needed or 0

    assert needed(load_in_4bit=True) - needed() == 4 * facts_in(original).num_parameters


@pytest.mark.parametrize("change", ["gone", "changed"])
def test_a_quantized_model_that_is_gone_or_changed_is_refused(change: str, tmp_path: Path) -> None:
    original = make_tiny_model(tmp_path / "original")
    write_base(original, tmp_path / "base", "float32")
    if change == "gone":
        original.rename(tmp_path / "elsewhere")
    else:
        make_tiny_model(original, seed=1)
    load_model(str(tmp_path / "base"))
    with pytest.raises(DataError, match=f"is {change}"):
        load_model(str(tmp_path / "base"), load_in_4bit=True)


def test_a_model_without_linear_layers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.integrations

    monkeypatch.setattr(transformers.integrations, "replace_with_bnb_linear", lambda model, **_: model)
    with pytest.raises(RecipeError, match="no linear layer"):
        load_quantized(make_tiny_model(tmp_path), {})


def test_missing_bitsandbytes_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(RecipeError, match=r"load_in_4bit needs bitsandbytes.*selfplay-dpo\[bnb\]"):
        require_packages(TrainRecipe(lora=LoraRecipe(**LORA)))
    require_packages(TrainRecipe(lora=LoraRecipe()))
