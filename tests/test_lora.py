"""LoRA policies: the adapter alone trains, goes on from round to round, and every reader sees the same policy."""

import json
from pathlib import Path

import pytest
import torch
from jobs import greedy, job_of, logps_of, random_pairs, steps
from scripted_run import write_recipe
from tiny import make_tiny_model

from selfplay import store
from selfplay.adapters import adapter_rank, base_folder, check_lora, is_adapter, served_rank
from selfplay.cli import main
from selfplay.errors import DataError, RecipeError
from selfplay.generators.engine import EngineSettings
from selfplay.plan_models import facts_in
from selfplay.recipe_train import LoraRecipe, TrainRecipe
from selfplay.train.logps import TokenLogps
from selfplay.train.loop import run_training
from selfplay.train.model import load_model
from selfplay.train.pack import build_packs
from selfplay.train.settings import require_packages
from selfplay.types import PreferencePair

LORA = {"r": 4, "lora_alpha": 8}
PAIRS = random_pairs(num_prompts=4, num_completions=2, prompt_length=20, length=12)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("lora") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter, of rank 4; tests read it."""
    folder = tmp_path_factory.mktemp("first")
    run_training(job_of(folder, base, PAIRS, lora=LORA, learning_rate=5e-3, num_train_epochs=3))
    return folder / "out" / "policy"


def logps(model: Path, pairs: list[PreferencePair] = PAIRS) -> torch.Tensor:
    """Per-token logps of all completions in one pack, fp32."""
    return logps_of(load_model(str(model)), pairs)


def test_training_changes_the_adapter_and_nothing_else(base: Path, adapter: Path, tmp_path: Path) -> None:
    before = store.weights_digest(base)
    rows = steps(adapter.parent.parent)
    assert rows[0]["audit/zero_logratio"] == 0  # a fresh adapter is its base to the last bit
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert store.weights_digest(base) == before
    assert is_adapter(adapter)
    assert base_folder(adapter) == base
    assert sum(f.stat().st_size for f in adapter.glob("*.safetensors")) < sum(
        f.stat().st_size for f in base.glob("*.safetensors")
    )
    assert (logps(adapter) - logps(base)).abs().max() > 1e-2


def test_peft_itself_reads_the_policy_as_we_do(base: Path, adapter: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter))
    pair = PAIRS[0]
    ids = [*pair.prompt_token_ids, *pair.chosen_token_ids]
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    start = len(pair.prompt_token_ids)
    wanted = sum(float(logits_TV[start + n - 1, token]) for n, token in enumerate(pair.chosen_token_ids))
    (pack,) = build_packs([pair], [0], max_pack_tokens=4096, shared=True)
    with torch.no_grad():
        found = pack.sum_per_sequence(TokenLogps(load_model(str(adapter)))(pack))[pack.chosen_B[0]]
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_the_gradient_of_the_adapter_is_that_of_plain_rows(adapter: Path) -> None:
    def gradient(shared: bool) -> torch.Tensor:
        model = load_model(str(adapter), lora=LoraRecipe(**LORA).model_dump())
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all(".lora_" in name for name in trained)
        for pack in build_packs(PAIRS, range(len(PAIRS)), max_pack_tokens=4096, shared=shared):
            sums = pack.sum_per_sequence(TokenLogps(model)(pack))
            torch.nn.functional.logsigmoid(sums[pack.chosen_B] - sums[pack.rejected_B]).sum().backward()
        return torch.cat([p.grad.flatten() for p in trained.values() if p.grad is not None])

    packed, plain = gradient(True), gradient(False)
    assert plain.norm() > 0
    assert (packed - plain).norm() / plain.norm() < 1e-5


def test_the_next_round_goes_on_from_the_adapter_and_takes_it_as_its_reference(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    run_training(job_of(tmp_path, adapter, PAIRS, lora=LORA, learning_rate=1e-6))
    rows = steps(tmp_path)
    assert rows[0]["audit/zero_logratio"] == 0  # never the bare base
    policy = tmp_path / "out" / "policy"
    assert base_folder(policy) == base
    near, far = (logps(policy) - logps(adapter)).abs().max(), (logps(policy) - logps(base)).abs().max()
    assert 0 < near < far / 100


def test_with_the_initial_policy_as_reference_the_bare_base_is_scored(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    run_training(job_of(tmp_path, adapter, PAIRS, lora=LORA, job={"reference": str(base)}))
    assert steps(tmp_path)[0]["loss"] != pytest.approx(0.6931, abs=1e-3)


def test_bf16_trains_fp32_masters_of_the_adapter_alone(base: Path, tmp_path: Path) -> None:
    run_training(job_of(tmp_path, base, PAIRS, lora=LORA, learning_rate=1e-3, bf16=True))
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "out" / "policy" / "adapter_model.safetensors")
    assert all(w.dtype == torch.float32 for w in weights.values())
    trained = [w for name, w in weights.items() if "lora_B" in name]
    assert any((w != w.bfloat16().float()).any() for w in trained)


def test_merging_keeps_a_head_that_is_not_tied(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base", tie_word_embeddings=False)
    run_training(job_of(tmp_path, base, PAIRS, lora=LORA, learning_rate=5e-3))
    adapter, merged = tmp_path / "out" / "policy", tmp_path / "merged"
    assert main(["merge", str(adapter), str(merged), "--dtype", "float32"]) == 0
    torch.testing.assert_close(logps(merged), logps(adapter), rtol=1e-4, atol=1e-5)


def test_the_generator_samples_from_the_adapter_and_the_merged_model_is_the_same_policy(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    assert main(["merge", str(adapter), str(merged), "--dtype", "float32"]) == 0
    assert not is_adapter(merged)
    torch.testing.assert_close(logps(merged), logps(adapter), rtol=1e-4, atol=1e-5)
    common = {"kind": "transformers", "dtype": "float32", "stop_token_ids": (1,)}
    served = EngineSettings(model=str(base), adapter=str(adapter), adapter_rank=4, **common)  # type: ignore[arg-type]
    whole = EngineSettings(model=str(merged), **common)  # type: ignore[arg-type]
    bare = EngineSettings(model=str(base), **common)  # type: ignore[arg-type]
    (served_ids, served_logps), (whole_ids, whole_logps), (_, bare_logps) = (
        greedy(one, PAIRS[0].prompt_token_ids) for one in (served, whole, bare)
    )
    assert served_ids == whole_ids
    torch.testing.assert_close(served_logps, whole_logps, rtol=1e-4, atol=1e-5)
    assert (served_logps - bare_logps).abs().max() > 1e-2


def test_a_whole_run_trains_an_adapter_over_two_rounds(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base)
    changes = (
        "train.lora={r: 4, lora_alpha: 8}",
        "generator.kind=transformers",
        "generator.dtype=float32",
        "judge={kind: coin}",
        "pairs.truncated=judged",
    )
    arguments = [word for change in changes for word in ("--set", change)]
    assert main(["iterate", str(recipe), "--out", str(tmp_path / "run"), *arguments]) == 0
    first, second = (tmp_path / "run" / f"round-00{n}" / "policy" for n in range(2))
    assert base_folder(first) == base_folder(second) == base
    done = store.read_json(second.parent / "round.json")
    assert done["init"] == store.weights_digest(first)
    assert done["train"]["audit/mean_difference"] < 1e-3
    assert done["policy"] != done["init"]


def test_an_adapter_that_the_recipe_does_not_fit_is_refused(adapter: Path, base: Path) -> None:
    check_lora(adapter, LoraRecipe(**LORA))
    check_lora(base, None)
    with pytest.raises(RecipeError, match="is a LoRA adapter"):
        check_lora(adapter, None)
    with pytest.raises(RecipeError, match="r 4 -> 16"):
        check_lora(adapter, LoraRecipe(lora_alpha=8))


def test_unknown_target_modules_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="target_modules"):
        run_training(job_of(tmp_path, base, PAIRS, lora={**LORA, "target_modules": ["query"]}))


def test_an_adapter_without_its_base_says_where_it_should_be(adapter: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/gone"}
    (moved / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="/gone is no model folder"):
        base_folder(moved)


def test_missing_peft_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"train\.lora needs peft.*selfplay-dpo\[peft\]"):
        require_packages(TrainRecipe(lora=LoraRecipe()))
    require_packages(TrainRecipe())


def test_merge_refuses_what_is_no_adapter(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(base), str(tmp_path / "out")]) == 65
    assert "no LoRA adapter" in capsys.readouterr().err


def test_the_plan_counts_what_an_adapter_trains(base: Path, adapter: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(adapter / "adapter_model.safetensors")
    assert facts_in(base).num_trained(LoraRecipe(**LORA)) == sum(w.numel() for w in weights.values())
    assert facts_in(base).num_trained(None) == facts_in(base).num_parameters
    only = LoraRecipe(r=4, target_modules=["q_proj"])
    assert facts_in(base).num_trained(only) == 2 * 4 * (64 + 64)  # two layers of a 64 x 64 matrix


def test_an_engine_is_asked_for_the_smallest_rank_that_serves() -> None:
    assert [served_rank(r) for r in (1, 8, 9, 64)] == [8, 8, 16, 64]
    with pytest.raises(DataError, match="merge it"):
        served_rank(1000)


def test_the_rank_of_an_adapter_is_its_largest(adapter: Path, tmp_path: Path) -> None:
    assert adapter_rank(adapter) == 4
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"rank_pattern": {"q_proj": 12}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert adapter_rank(tmp_path) == 12
