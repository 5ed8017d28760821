"""The dry run: what it says is what a run does, and nothing heavy is loaded for it."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import make_tiny_model

from selfplay.errors import DataError, RecipeError
from selfplay.plan import Plan, make_plan, print_plan
from selfplay.plan_models import facts_in
from selfplay.recipe_file import check_recipe


def recipe_of(folder: Path, model: Path, **sections: Any) -> Any:
    rows = [{"prompt": f"Name thing {n}."} for n in range(20)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data: dict[str, Any] = {
        "model": str(model),
        "rounds": 2,
        "prompts": {"source": str(folder / "p.jsonl"), "num_prompts": [6, 4], "heldout": 0.2},
        "generator": {"kind": "scripted", "num_completions": [4, 2], "max_tokens": 10},
        "judge": {"kind": "coin"},
        "train": {"learning_rate": [1e-5, 2e-6], "batch_size": 4, "num_train_epochs": [2, 1]},
        "evaluate": {"num_completions": 3},
    }
    for name, keys in sections.items():
        data[name] = {**data.get(name, {}), **keys} if isinstance(keys, dict) else keys
    return check_recipe(data, "test")


def printed(plan: Plan) -> str:
    stream = io.StringIO()
    print_plan(plan, Console(file=stream, width=110))
    return stream.getvalue()


def test_parameters_are_counted_from_the_headers(tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert facts_in(tiny).num_parameters == sum(p.numel() for p in model.parameters())


def test_each_round_has_its_own_values_and_follows_the_one_before(tiny: Path, tmp_path: Path) -> None:
    first, second = make_plan(recipe_of(tmp_path, tiny), tmp_path / "run").rounds
    assert (first.init, second.init) == (str(tiny), "the policy of round 0")
    assert (first.reference, second.reference) == (str(tiny), "the policy of round 0")
    assert (first.settings.learning_rate, second.settings.learning_rate) == (1e-5, 2e-6)
    assert (first.sources[0].first_prompt, second.sources[0].first_prompt) == (1, 7)
    assert (first.tokens, second.tokens) == (6 * 4 * 10, 4 * 2 * 10)
    # at most a pair a prompt, in steps of 4 pairs
    assert (first.max_steps, second.max_steps) == (4, 1)


def test_it_says_which_prompts_every_round_gets(tiny: Path, tmp_path: Path) -> None:
    first = printed(make_plan(recipe_of(tmp_path, tiny), tmp_path / "run"))
    assert "prompts 1 to 6 in dealing order" in first
    assert "prompts 7 to 10 in dealing order" in first
    same = printed(make_plan(recipe_of(tmp_path, tiny, prompts={"deal": "same"}), tmp_path / "run"))
    assert "prompts the first 6 in dealing order" in same
    whole = recipe_of(tmp_path, tiny, prompts={"deal": "same", "num_prompts": 16})
    assert "prompts all in dealing order" in printed(make_plan(whole, tmp_path / "run"))


def test_pairs_are_counted_by_strategy_and_with_those_mixed_in(tiny: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tiny, rounds=3, prompts={"num_prompts": [6, 4, 5]}).model_dump(mode="json")

    def most(pairs: dict[str, Any]) -> list[int]:
        plan = make_plan(check_recipe({**recipe, "pairs": pairs}, "test"), tmp_path / "run")
        return [r.max_pairs for r in plan.rounds]

    assert most({}) == [6, 4, 5]
    # 4 completions of 6 prompts give 6 pairs each, 2 completions one
    assert most({"kind": "all_above_margin", "min_margin": 0.5}) == [36, 4, 5]
    assert most({"kind": "all_above_margin", "min_margin": 0.5, "max_pairs_per_prompt": 5}) == [30, 4, 5]
    assert most({"kind": "correct_vs_incorrect"}) == [24, 4, 5]
    assert most({"filters": [{"kind": "mix_previous"}]}) == [6, 10, 9]
    assert most({"filters": [{"kind": "mix_previous", "window": "all"}]}) == [6, 10, 15]
    assert most({"filters": [{"kind": "mix_previous", "window": "all", "share": 0.5}]}) == [6, 8, 10]
    recipe |= {"pairs": {"filters": [{"kind": "mix_previous"}]}}
    assert "best_vs_worst -> mix_previous" in printed(make_plan(check_recipe(recipe, "test"), tmp_path / "run"))


def test_an_initial_reference_stays_the_model(tiny: Path, tmp_path: Path) -> None:
    rounds = make_plan(recipe_of(tmp_path, tiny, train={"reference": "initial"}), tmp_path / "run").rounds
    assert [r.reference for r in rounds] == [str(tiny)] * 2


@pytest.mark.parametrize(
    ("train", "wanted"),
    [
        ({}, ["{model}; logps by the trainer", "the policy of round 0; logps by the trainer"]),
        ({"reference": "{other}"}, ["{other}; logps by the trainer"] * 2),
        (
            {"reference": "ema", "ref_model_mixup_alpha": 0.25},
            ["{model}; logps by the trainer", "0.25 x the policy of round 0 + 0.75 x {model}; logps by the trainer"],
        ),
        ({"loss_type": "simpo"}, ["none: loss_type simpo reads no reference"] * 2),
    ],
    ids=["prior", "path", "ema", "none"],
)
def test_the_reference_of_every_round_is_printed(
    train: dict[str, Any], wanted: list[str], tiny: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.symlink_to(tiny)
    names = {"model": str(tiny), "other": str(other)}
    told = {key: value.format(**names) if isinstance(value, str) else value for key, value in train.items()}
    text = printed(make_plan(recipe_of(tmp_path, tiny, train=told), tmp_path / "run"))
    found = [line.removeprefix("  reference  ") for line in text.splitlines() if line.startswith("  reference  ")]
    assert found == [line.format(**names) for line in wanted]


def test_a_reference_that_is_not_there_is_found_before_any_work(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        make_plan(recipe_of(tmp_path, tiny, train={"reference": str(tmp_path / "none")}), tmp_path / "run")


def test_an_ema_of_the_reference_takes_disk_from_round_1_on(tiny: Path, tmp_path: Path) -> None:
    plain, ema = (
        make_plan(recipe_of(tmp_path, tiny, train=train), tmp_path / "run").bytes_needed
        for train in ({}, {"reference": "ema"})
    )
    assert plain is not None
    assert ema is not None
    assert ema - plain == 4 * facts_in(tiny).num_parameters


def test_losses_are_printed_with_their_weights_and_numbers(tiny: Path, tmp_path: Path) -> None:
    train = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "label_smoothing": 0.1}
    text = printed(make_plan(recipe_of(tmp_path, tiny, train=train), tmp_path / "run"))
    assert "loss sigmoid + 0.5 x sft, beta 0.1, label_smoothing 0.1, batch_size 4" in text


def test_the_panels_of_all_policies_are_counted(tiny: Path, tmp_path: Path) -> None:
    plan = make_plan(recipe_of(tmp_path, tiny, evaluate={"num_completions_between": 1}), tmp_path / "run")
    # 4 held-out prompts; 3 completions for the first and the last policy, 1 between, a greedy one each
    assert plan.panel_completions == 4 * (3 + 3 + 1 + 3)


def test_disk_counts_a_policy_a_round_and_halves_in_bfloat16(tiny: Path, tmp_path: Path) -> None:
    whole = make_plan(recipe_of(tmp_path, tiny), tmp_path / "run")
    half = make_plan(recipe_of(tmp_path, tiny, train={"save_dtype": "bfloat16"}), tmp_path / "run")
    carried = make_plan(recipe_of(tmp_path, tiny, train={"optimizer_state": "carried"}), tmp_path / "run")
    parameters = facts_in(tiny).num_parameters
    assert whole.bytes_needed is not None
    assert half.bytes_needed is not None
    assert carried.bytes_needed is not None
    assert whole.bytes_needed - half.bytes_needed == 2 * 2 * parameters
    assert carried.bytes_needed - whole.bytes_needed == 2 * 8 * parameters
    assert whole.bytes_needed > 2 * 4 * parameters


def test_rounds_that_are_there_need_no_more_disk(tiny: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tiny)
    before = make_plan(recipe, tmp_path / "run").bytes_needed
    (tmp_path / "run" / "round-000" / "policy").mkdir(parents=True)
    after = make_plan(recipe, tmp_path / "run").bytes_needed
    assert before is not None
    assert after is not None
    assert before - after >= 4 * facts_in(tiny).num_parameters


def test_too_little_disk_is_a_warning(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path, tiny)
    assert "warning" not in printed(make_plan(recipe, tmp_path / "run"))
    monkeypatch.setattr("selfplay.plan._bytes_free", lambda out: 1000)
    assert "warning: the disk has too little room" in printed(make_plan(recipe, tmp_path / "run"))


def test_the_plan_shows_recipe_rounds_and_work(tiny: Path, tmp_path: Path) -> None:
    text = printed(make_plan(recipe_of(tmp_path, tiny), tmp_path / "run"))
    for part in ("kind: scripted", "16 for training, 4 held out", "prompts 7 to 10", "learning_rate 2e-06", "beta 0.1"):
        assert part in text


def test_a_pool_that_runs_out_is_found_before_any_work(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="round 1 needs prompts 7 to 26"):
        make_plan(recipe_of(tmp_path, tiny, prompts={"num_prompts": [6, 20]}), tmp_path / "run")


def test_a_model_that_is_not_there_or_cut_short_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        make_plan(recipe_of(tmp_path, tmp_path / "none"), tmp_path / "run")
    model = make_tiny_model(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(DataError, match=r"model\.safetensors"):
        make_plan(recipe_of(tmp_path, model), tmp_path / "run")


def test_a_hub_id_that_is_not_here_leaves_the_disk_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    plan = make_plan(recipe_of(tmp_path, Path("someone/some-model")), tmp_path / "run")
    assert plan.bytes_needed is None
    assert "disk: unknown: someone/some-model is not on this machine" in printed(plan)


def test_a_judge_that_compares_is_asked_for_both_orders_of_every_two_completions(tiny: Path, tmp_path: Path) -> None:
    judge = {"kind": "llm", "template": "pairwise_helpfulness", "num_verdicts": 3}
    rows = [{"prompt": f"Ask {n}?", "chosen": "a", "rejected": "b"} for n in range(2)]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_of(
        tmp_path, tiny, judge=judge, audit={"calibration": str(tmp_path / "labelled.jsonl"), "canaries": 1}
    )
    said = printed(make_plan(recipe, tmp_path / "run"))
    compared = "verdicts: every two completions of a prompt are compared, in both orders"
    # prompts x completions x other completions x verdicts; then 4 canaries and 2 labelled pairs, each of two completions
    assert f"judge      {6 * 4 * 3 * 3} {compared}" in said
    assert f"judge      {4 * 2 * 1 * 3} {compared}" in said
    assert "audit      4 canaries for each of 1 prompts and 2 labelled pairs, 36 verdicts, beside 216" in said
    assert compared not in printed(make_plan(recipe_of(tmp_path, tiny, judge={"kind": "llm"}), tmp_path / "run"))


def test_planning_loads_no_torch(tiny: Path, tmp_path: Path) -> None:
    recipe_of(tmp_path, tiny)
    lines = [
        "import sys, pathlib",
        "from selfplay.recipe_file import check_recipe",
        "from selfplay.plan import make_plan",
        f"recipe = check_recipe({{'model': {str(tiny)!r}, 'judge': {{'kind': 'coin'}},"
        f" 'prompts': {{'source': {str(tmp_path / 'p.jsonl')!r}, 'deal': 'same'}}}}, 'x')",
        f"make_plan(recipe, pathlib.Path({str(tmp_path / 'run')!r}))",
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)",
    ]
    assert subprocess.run([sys.executable, "-c", "\n".join(lines)], check=False).returncode == 0
