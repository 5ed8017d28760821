"""A run goes on with a changed recipe where no finished file depends on what has changed."""

from pathlib import Path
from typing import Any

import pytest
from scripted_run import ok, write_recipe

from selfplay import faults, store
from selfplay.changes import refused
from selfplay.cli import main
from selfplay.recipe import Recipe
from selfplay.recipe_file import check_recipe

ROUND_0 = "round-000/groups/00000.jsonl"
PAIRS_0, REFERENCE_0 = "round-000/pairs.jsonl", "round-000/reference.safetensors"
CHECKPOINT_0, POLICY_0 = "round-000/train/checkpoints/step-000002/SHA256SUMS", "round-000/policy/model.safetensors"


def recipe(**sections: Any) -> Recipe:
    data: dict[str, Any] = {
        "model": "m",
        "prompts": {"source": "p.jsonl", "num_prompts": 8},
        "judge": {"kind": "coin"},
        "train": {"bf16": False},
    }
    return check_recipe({**data, **sections}, "test")


def train(**keys: Any) -> Recipe:
    return recipe(train={"bf16": False, **keys})


def pairs(**keys: Any) -> Recipe:
    return recipe(pairs={"kind": "best_vs_worst", **keys})


def combined(llm: dict[str, Any]) -> dict[str, Any]:
    judges = [{"kind": "llm", "model": "a", **llm}, {"kind": "coin"}]
    return {"kind": "combine", "how": "min", "normalize": "none", "judges": judges}


def holding(folder: Path, *names: str) -> Path:
    for name in ("recipe.yaml", *names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


OPEN = {
    "a margin before any pairs": ([ROUND_0], pairs(min_margin=0.1), pairs()),
    "another pairing before any pairs": ([ROUND_0], pairs(), recipe(pairs={"kind": "best_vs_random"})),
    "training before any": ([ROUND_0, PAIRS_0], train(), train(loss_type="ipo", batch_size=8, optim="rmsprop")),
    "a rate after the reference pass": ([PAIRS_0, REFERENCE_0, "pack_budget.json"], train(), train(learning_rate=1.0)),
    "a rate of a round to come": ([POLICY_0], train(learning_rate=0.5), train(learning_rate=[0.5, 0.1])),
    "a margin of a round to come": ([PAIRS_0], pairs(min_margin=0.5), pairs(min_margin=[0.5, 0.1])),
    "gradient checkpointing": ([POLICY_0], train(), train(gradient_checkpointing=True)),
    "determinism on CUDA": ([POLICY_0], train(), train(full_determinism=True)),
    "where a reward model is measured, and how it is shown conversations": (
        [POLICY_0],
        recipe(judge={"kind": "reward_model", "model": "a", "chat_template": "x.jinja"}),
        recipe(judge={"kind": "reward_model", "model": "b", "chat_template": "y.jinja", "calibration": "p.jsonl"}),
    ),
    "a revision, whose weights run.json knows": (
        [POLICY_0],
        recipe(judge={"kind": "reward_model", "model": "a"}),
        recipe(model_revision="v1", judge={"kind": "reward_model", "model": "a", "model_revision": "v2"}),
    ),
    "where the template of a judge's own model lies": (
        [POLICY_0],
        recipe(judge={"kind": "llm", "model": "a", "chat": {"chat_template": "x.jinja"}}),
        recipe(judge={"kind": "llm", "model": "b", "chat": {"chat_template": "y.jinja"}}),
    ),
    "a template for a judge's own model, by which its identity knows it": (
        [POLICY_0],
        recipe(judge={"kind": "llm", "model": "a"}, evaluate={"judge": combined({})}),
        recipe(
            judge={"kind": "llm", "model": "a", "chat": {"chat_template": "x.jinja"}},
            evaluate={"judge": combined({"chat": {"chat_template": "x.jinja"}})},
        ),
    ),
    "the bound of the audit": ([POLICY_0], train(), train(max_audit_difference=0.5)),
    "how much of a machine vLLM takes": (
        [ROUND_0],
        recipe(generator={"kind": "vllm"}),
        recipe(
            generator={
                "kind": "vllm",
                "gpu_memory_utilization": 0.8,
                "tensor_parallel_size": 2,
                "data_parallel_size": 4,
                "max_batch_size": 64,
            }
        ),
    ),
}
CLOSED = {
    "a margin": ([PAIRS_0], pairs(min_margin=0.1), pairs(), "pairs.min_margin", PAIRS_0),
    "gold answers, which are in the groups": (
        [ROUND_0],
        pairs(),
        recipe(pairs={"kind": "gold_vs_completion"}, judge=None),
        "pairs.kind",
        "",
    ),
    "a batch after the reference pass": ([REFERENCE_0], train(), train(batch_size=8), "train.batch_size", REFERENCE_0),
    "a rate with a checkpoint": (
        [CHECKPOINT_0],
        train(),
        train(learning_rate=1.0),
        "train.learning_rate",
        "delete the folder of checkpoints",
    ),
    "the audit's bound, which a checkpoint holds": (
        [CHECKPOINT_0],
        train(),
        train(max_audit_difference=0.5),
        "train.max_audit_difference",
        "delete the folder of checkpoints",
    ),
    "a rate of a finished round": (
        [POLICY_0],
        train(learning_rate=0.5),
        train(learning_rate=[0.4, 0.5]),
        "train.learning_rate",
        "round-000/policy",
    ),
    "a rate of a schedule that spans the run": (
        [POLICY_0],
        train(learning_rate=0.5, max_steps=4, schedule_scope="run"),
        train(learning_rate=[0.5, 0.4], max_steps=4, schedule_scope="run"),
        "train.learning_rate",
        "round-000/policy",
    ),
    "an adapter": ([], train(), train(lora={"r": 4}), "train.lora.r", ""),
    "another reference model": ([], train(), train(reference="./m"), "train.reference", ""),
    "how a judge's own model is asked": (
        [],
        recipe(judge={"kind": "llm", "model": "a"}),
        recipe(judge={"kind": "llm", "model": "a", "chat": {"chat_template_kwargs": {"quiet": True}}}),
        "judge.chat.chat_template_kwargs",
        "",
    ),
    "sampling": ([], recipe(), recipe(generator={"temperature": 0.5}), "generator.temperature", ""),
    "the batches of a generator that gives the same bytes": (
        [],
        recipe(generator={"kind": "transformers"}),
        recipe(generator={"kind": "transformers", "max_batch_size": 8}),
        "generator.max_batch_size",
        "",
    ),
    "the length of vLLM's sequences, which prompts must fit": (
        [],
        recipe(generator={"kind": "vllm"}),
        recipe(generator={"kind": "vllm", "max_model_len": 512}),
        "generator.max_model_len",
        "",
    ),
    "the seed": ([], recipe(), recipe(seed=1), "seed", ""),
}


@pytest.mark.parametrize(("names", "old", "new"), OPEN.values(), ids=OPEN.keys())
def test_what_no_file_depends_on_may_change(names: list[str], old: Recipe, new: Recipe, tmp_path: Path) -> None:
    assert old != new
    assert refused(old, new, holding(tmp_path, *names)) == []


@pytest.mark.parametrize(("names", "old", "new", "key", "why"), CLOSED.values(), ids=CLOSED.keys())
def test_what_a_file_depends_on_is_refused_by_its_key_with_that_file(
    names: list[str], old: Recipe, new: Recipe, key: str, why: str, tmp_path: Path
) -> None:
    found = refused(old, new, holding(tmp_path, *names))
    assert any(line.startswith(f"{key}: ") and why in line for line in found)


def test_a_round_without_pairs_goes_on_with_another_margin_as_if_it_had_begun_so(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run, clean = write_recipe(tmp_path, tiny, rounds=1), tmp_path / "run", tmp_path / "clean"
    assert main(["iterate", str(path), "--out", str(run), "--set", "pairs.min_margin=9.0"]) == 76
    said = capsys.readouterr().err
    assert "lower pairs.min_margin" in said
    assert "with other `pairs` while no round has pairs" in said
    sampled = (run / ROUND_0).stat().st_mtime_ns
    ok("iterate", path, "--out", run)
    ok("iterate", path, "--out", clean)
    assert (run / ROUND_0).stat().st_mtime_ns == sampled
    assert "recipe: changed on this run: pairs.min_margin: 9.0 -> 0.0" in capsys.readouterr().err
    for name in (PAIRS_0, REFERENCE_0, POLICY_0, "recipe.yaml"):
        assert store.file_digest(run / name) == store.file_digest(clean / name)
    for also in ([], ["--dry-run"]):
        assert main(["iterate", str(path), "--out", str(run), "--set", "pairs.min_margin=0.1", *also]) == 64
        assert f"pairs.min_margin: 0.0 -> 0.1 ({PAIRS_0} depends on it)" in capsys.readouterr().err


def test_a_training_that_broke_goes_on_with_another_rate_as_if_it_had_begun_so(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run, clean = write_recipe(tmp_path, tiny, rounds=1), tmp_path / "run", tmp_path / "clean"
    faults.forget()
    with monkeypatch.context() as broken:
        broken.setenv("SELFPLAY_FAULT", "train.gradient@2=nan")
        assert main(["iterate", str(path), "--out", str(run), "--set", "train.learning_rate=0.1"]) == 76
    assert (run / REFERENCE_0).exists()
    ok("iterate", path, "--out", run)
    ok("iterate", path, "--out", clean)
    for name in (PAIRS_0, REFERENCE_0, POLICY_0, "round-000/train/steps.jsonl", "recipe.yaml"):
        assert store.file_digest(run / name) == store.file_digest(clean / name)


def test_a_filter_of_the_users_own_may_join_or_change_until_a_round_has_pairs(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run, clean = write_recipe(tmp_path, tiny, rounds=1), tmp_path / "run", tmp_path / "clean"
    (tmp_path / "mine.py").write_text("def all_but_one(pairs, context):\n    return pairs[1:]\n")
    filtered = ("--allow-code", "--set", "pairs.filters=[{kind: python, target: 'mine.py:all_but_one'}]")
    assert main(["iterate", str(path), "--out", str(run), "--set", "pairs.min_margin=9.0"]) == 76
    ok("iterate", path, "--out", run, *filtered)
    ok("iterate", path, "--out", clean, *filtered)
    for name in (PAIRS_0, POLICY_0, "run.json", "recipe.yaml"):
        assert store.file_digest(run / name) == store.file_digest(clean / name)
    (tmp_path / "mine.py").write_text("def all_but_one(pairs, context):\n    return pairs[:-1]\n")
    capsys.readouterr()
    assert main([str(part) for part in ("iterate", path, "--out", run, *filtered)]) == 64
    assert "was started with another filters" in capsys.readouterr().err
