"""train-reward: a reward model from preference rows, what it says of itself, and who is refused by it."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from rewards import group_of, make_reward_model
from scripted_run import write_recipe
from tiny import make_tiny_model

from selfplay import store, trust
from selfplay.cli import main
from selfplay.errors import DataError, NonFiniteError, RecipeError, StorageError
from selfplay.judges.reward_model import open_reward_model
from selfplay.progress import SILENT
from selfplay.protocols import JudgeContext
from selfplay.recipe_reward import RewardModelRecipe
from selfplay.train.reward import RewardTrainer, TokenPair, bradley_terry
from selfplay.train_reward import RewardInputs, reward_training, train_reward
from selfplay.trust import ACCURACY, known_accuracy

GOOD, BAD = ("a thing and the end", "the rain and the sea"), ("zzz qqq", "xx yy zz qq")
FAST = {"learning_rate": 1e-3, "batch_size": 8, "bf16": False, "heldout": 0.4}


def rows_of(count: int, *, flip: Any = lambda n: False) -> list[dict[str, str]]:
    rows = []
    for n in range(count):
        sides = [GOOD[n % 2], BAD[n // 2 % 2]]
        chosen, rejected = reversed(sides) if flip(n) else sides
        rows.append({"prompt": f"Ask {n}?", "chosen": f"{chosen} {n % 7}", "rejected": f"{rejected} {n % 5}"})
    return rows


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trained(tiny: Path, folder: Path, rows: list[dict[str, Any]], **flags: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    inputs = RewardInputs(str(tiny), str(jsonl(folder / "rows.jsonl", rows)))
    return train_reward(inputs, reward_training(**{**FAST, **flags}), folder / "model", SILENT)


@pytest.fixture(scope="module")
def good(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of separable rows."""
    folder = tmp_path_factory.mktemp("good")
    trained(tiny, folder, rows_of(60), num_train_epochs=2)
    return folder / "model"


@pytest.fixture(scope="module")
def coin(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of rows whose labels a coin gave."""
    folder = tmp_path_factory.mktemp("coin")
    flips = random.Random(3)
    trained(tiny, folder, rows_of(60, flip=lambda n: flips.random() < 0.5))
    return folder / "model"


def scores_of(model: Path) -> tuple[float | None, ...]:
    with open_reward_model(RewardModelRecipe(kind="reward_model", model=str(model))) as judge:
        return judge.judge([group_of("Something new?", *GOOD, *BAD)], JudgeContext())[0].scores


def test_separable_rows_are_learnt_and_the_held_out_interval_is_above_chance(good: Path) -> None:
    figures = known_accuracy(good)
    assert figures is not None
    assert figures["accuracy_interval"][0] > 0.5
    assert figures["loss_last"] < figures["loss_first"]
    assert (figures["num_train_prompts"], figures["num_heldout_prompts"]) == (36, 24)
    *better, third, fourth = scores_of(good)
    assert min(score for score in better if score is not None) > max(third or 0.0, fourth or 0.0)


def test_the_folder_is_a_classifier_of_transformers(good: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, report = AutoModelForSequenceClassification.from_pretrained(good, output_loading_info=True)
    assert not report["missing_keys"]
    assert (model.config.num_labels, model.config.pad_token_id) == (1, 2)
    assert AutoTokenizer.from_pretrained(good).chat_template
    store.check_folder(good)


def test_swapped_rows_flip_the_sign(tiny: Path, tmp_path: Path) -> None:
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows_of(60)]
    trained(tiny, tmp_path, swapped, num_train_epochs=2)
    first, second, *worse = scores_of(tmp_path / "model")
    assert max(first or 0.0, second or 0.0) < min(score for score in worse if score is not None)


def test_the_loss_of_a_swapped_pair_has_the_opposite_gradient() -> None:
    one, other = torch.tensor([0.3], requires_grad=True), torch.tensor([0.3], requires_grad=True)
    loss = bradley_terry(one, other, centering=0.0)
    assert loss.item() == pytest.approx(0.6931, abs=1e-4)
    loss.backward()
    assert one.grad is not None
    assert other.grad is not None
    assert one.grad.item() == pytest.approx(-0.5)
    assert other.grad.item() == pytest.approx(0.5)
    centred = bradley_terry(torch.tensor([2.0]), torch.tensor([1.0]), centering=0.1)
    assert centred.item() == pytest.approx(
        bradley_terry(torch.tensor([2.0]), torch.tensor([1.0]), centering=0.0).item() + 0.9
    )


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tiny: Path, tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trained(tiny, tmp_path / name, rows_of(10), seed=seed)
        found.append(store.weights_digest(tmp_path / name / "model"))
    assert found[0] == found[1] != found[2]


def test_small_batches_give_the_same_step(tiny: Path) -> None:
    pairs = [TokenPair(tuple(range(6, 9 + n)), tuple(range(30, 52 - n))) for n in range(8)]
    margins = []
    for budget in (8, 100_000):
        settings = reward_training(**FAST, max_batch_tokens=budget, warmup_steps=0)
        trainer = RewardTrainer(tiny, settings, num_pairs=len(pairs), bf16=False)
        (loss,) = trainer.train(pairs, SILENT)
        margins.append([loss, *trainer.margins(pairs)])
    assert margins[0] == pytest.approx(margins[1], abs=1e-4)


def test_bfloat16_learns_as_well_and_is_saved_as_asked(tiny: Path, tmp_path: Path) -> None:
    figures = trained(tiny, tmp_path, rows_of(60), bf16=True, save_dtype="bfloat16", num_train_epochs=2)
    assert figures["accuracy_interval"][0] > 0.5
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    *better, third, fourth = scores_of(tmp_path / "model")
    assert min(score for score in better if score is not None) > max(third or 0.0, fourth or 0.0)


def test_no_prompt_is_on_both_sides_and_many_pairs_of_one_prompt_count_once(tiny: Path, tmp_path: Path) -> None:
    rows = [{**row, "prompt": f"Ask {n % 10}?"} for n, row in enumerate(rows_of(60))]
    figures = trained(tiny, tmp_path, rows)
    assert (figures["num_train_prompts"], figures["num_heldout_prompts"]) == (6, 4)
    assert figures["num_train_pairs"] + figures["num_heldout_pairs"] == 60
    low, high = figures["accuracy_interval"]
    assert high - low > 0.3, "four prompts say little, however many pairs they have"


def test_length_alone_is_measured_in_the_direction_of_the_training_rows(tiny: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Ask {n}?", "chosen": "no", "rejected": "no, not at all"} for n in range(20)]
    figures = trained(tiny, tmp_path, rows)
    assert figures["length_prefers"] == "shorter"
    assert figures["length_accuracy"] == 1.0


def test_a_model_without_a_pad_token_gets_one(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base", pad_token_id=None)
    trained(base, tmp_path, rows_of(10))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["pad_token_id"] == 2


def test_rows_that_say_nothing_or_do_not_fit_are_dropped_with_a_reason(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*rows_of(10), {"prompt": "Same?", "chosen": "a", "rejected": "a"}]
    rows += [
        {"prompt": "Long?", "chosen": "a " * 300, "rejected": "b"},
        {"prompt": "Empty?", "chosen": " ", "rejected": "b"},
    ]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    arguments = ["train-reward", "--model", str(tiny), "--pairs", str(path), "--no-bf16"]
    assert main([*arguments, "--out", str(tmp_path / "model")]) == 0
    said = capsys.readouterr()
    for reason in ("1 dropped: chosen equals rejected", "1 dropped: longer than 512 tokens", "1 dropped: empty chosen"):
        assert reason in said.err
    assert said.out.startswith("held-out accuracy")
    assert "  length alone" in said.out
    assert main([*arguments, "--out", str(tmp_path / "model")]) == 64
    assert "already there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--heldout", "1.5"], "--heldout"),
        (["--learning-rate", "0"], "--learning-rate"),
        (["--lr-scheduler-type", "linaer"], "--lr-scheduler-type"),
        (["--max-length", "9999"], "has 512 positions"),
        (["--heldout", "0.01"], "give more rows"),
        (["--model", "./none"], "no such folder"),
        (["--pairs", "none.jsonl"], "none.jsonl"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_wrong_flags_are_named_before_any_work(
    tiny: Path, tmp_path: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl(tmp_path / "rows.jsonl", rows_of(10))
    out = tmp_path / "model"
    code = main(["train-reward", "--model", str(tiny), "--pairs", str(path), "--out", str(out), *flags])
    assert code in (64, 65)
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_an_interrupted_run_leaves_no_folder(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    step = RewardTrainer._step

    def interrupted(self: RewardTrainer, pairs: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(RewardTrainer, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(tiny, tmp_path, rows_of(10))
    assert not (tmp_path / "model").exists()
    monkeypatch.setattr(RewardTrainer, "_step", step)
    fault("store.folder.digest@1=enospc")
    with pytest.raises(StorageError):
        trained(tiny, tmp_path, rows_of(10))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    fault(None)
    trained(tiny, tmp_path, rows_of(10))
    store.check_folder(tmp_path / "model")


def test_a_loss_that_is_no_number_stops_with_nothing_written(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="learning-rate"):
        trained(tiny, tmp_path, rows_of(40), learning_rate=1e30, warmup_steps=0)
    assert not (tmp_path / "model").exists()


# --- who is trusted -----------------------------------------------------------------------------------------------


def recipe_with(folder: Path, tiny: Path, **judge: Any) -> Path:
    return write_recipe(folder, tiny, judge={"kind": "reward_model", **judge}, rounds=1)


def test_a_judge_at_chance_is_refused_before_anything_is_sampled(
    coin: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = known_accuracy(coin)
    assert figures is not None
    assert figures["includes_chance"]
    path, out = recipe_with(tmp_path, tiny, model=str(coin)), tmp_path / "run"
    for command in (["validate", str(path)], ["iterate", str(path), "--out", str(out)]):
        assert main(command) == 64
        said = capsys.readouterr().err
        assert "not shown to be better than a coin" in said
        assert "judge.allow_chance" in said
    assert main(["iterate", str(path), "--out", str(out), "--dry-run"]) == 64
    assert not (out / "recipe.yaml").exists()
    assert not list(out.rglob("groups"))


def test_a_judge_at_chance_plays_where_the_recipe_allows_it(coin: Path, tiny: Path, tmp_path: Path) -> None:
    path = recipe_with(tmp_path, tiny, model=str(coin), allow_chance=True)
    assert main(["validate", str(path)]) == 0
    assert main(["iterate", str(path), "--out", str(tmp_path / "run")]) == 0


def test_a_trusted_judge_plays_and_its_calibration_is_in_the_rounds(
    good: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled = jsonl(tmp_path / "labelled.jsonl", rows_of(24))
    path = recipe_with(tmp_path, tiny, model=str(good), calibration=str(labelled))
    out = tmp_path / "run"
    assert main(["iterate", str(path), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "judge: accuracy 1.000" in said.err
    assert f"judge on {labelled}: accuracy 1.000" in " ".join(said.out.split("\n"))
    (figures,) = store.read_json(out / "round-000" / "round.json")["audit"]["calibration"]
    assert (figures["accuracy"], figures["num_pairs"]) == (1.0, 24)
    (row,) = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    assert row["audit"]["calibration"] == [figures]
    assert all(
        isinstance(j, float)
        for r in store.read_json_lines(out / "round-000/judgements/00000.jsonl")
        for j in r["scores"]
    )


def test_a_calibration_file_decides_over_the_models_own_figures(
    good: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flips = random.Random(5)
    labelled = jsonl(tmp_path / "labelled.jsonl", rows_of(24, flip=lambda n: flips.random() < 0.5))
    path = recipe_with(tmp_path, tiny, model=str(good), calibration="labelled.jsonl")
    assert main(["iterate", str(path), "--out", str(tmp_path / "run")]) == 64
    assert str(labelled) in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("groups"))
    # the same folder then takes another judge, and the measurement isn't made twice
    opened = list((tmp_path / "run").rglob("figures.json"))
    assert len(opened) == 1
    assert main(["iterate", str(path), "--out", str(tmp_path / "run"), "--set", "judge.allow_chance=true"]) == 0
    assert list((tmp_path / "run").rglob("figures.json")) == opened


def test_a_downloaded_model_without_figures_is_said_to_be_unknown(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_with(tmp_path, tiny, model=str(make_reward_model(tmp_path / "other")))
    assert main(["iterate", str(path), "--out", str(tmp_path / "run")]) == 0
    assert "is unknown" in " ".join(capsys.readouterr().err.split())
    assert store.read_json(tmp_path / "run" / "round-000" / "round.json")["audit"]["calibration"] is None


def test_the_judge_of_the_panel_is_asked_for_its_accuracy_too(
    coin: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = {"kind": "reward_model", "model": str(coin)}
    path = write_recipe(tmp_path, tiny, evaluate={"judge": judge})
    assert main(["iterate", str(path), "--out", str(tmp_path / "run")]) == 64
    assert "evaluate.judge.model" in capsys.readouterr().err


def test_of_several_reward_models_each_shows_its_accuracy(
    good: Path, coin: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [jsonl(tmp_path / f"{name}.jsonl", rows_of(24)) for name in ("one", "two")]
    members = [
        {"kind": "reward_model", "model": str(model), "calibration": str(file), "allow_chance": True}
        for model, file in zip((good, coin), files, strict=True)
    ]
    judge = {"kind": "combine", "how": "weighted_mean", "normalize": "rank", "judges": members}
    path = write_recipe(tmp_path, tiny, rounds=1, judge=judge)
    assert main(["iterate", str(path), "--out", str(tmp_path / "run")]) == 0
    said = " ".join(capsys.readouterr().out.split("\n"))
    assert f"judge {good} on {files[0]}: accuracy 1.000" in said
    assert f"judge {coin} on {files[1]}: accuracy" in said


@pytest.mark.parametrize("key", ["judge", "evaluate.judge"])
def test_a_panel_alone_refuses_a_judge_at_chance(
    coin: Path, tiny: Path, tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write_recipe(tmp_path, tiny), tmp_path / "panel"
    judge = f"{{kind: reward_model, model: {coin}}}"
    evaluate = ["evaluate", str(path), "--model", str(tiny), "--out", str(out), "--set", f"{key}={judge}"]
    assert main(evaluate) == 64
    assert f"{key}.model: {coin} is not shown to be better than a coin" in capsys.readouterr().err
    assert not (out / "heldout").exists()
    assert main([*evaluate, "--set", f"{key}.allow_chance=true"]) == 0


def test_judging_alone_refuses_and_calibrating_does_not(
    coin: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from selfplay.types import Group

    path = recipe_with(tmp_path, tiny, model=str(coin))
    store.write_records(tmp_path / "groups" / "00000.jsonl", [group_of("Ask?", *GOOD)], Group)
    judged = ["judge", str(path), "--groups", str(tmp_path / "groups"), "--out", str(tmp_path / "judged")]
    assert main(judged) == 64
    assert "better than a coin" in capsys.readouterr().err
    assert main([*judged, "--set", "judge.allow_chance=true"]) == 0
    labelled = jsonl(tmp_path / "labelled.jsonl", rows_of(12))
    assert main(["calibrate", str(path), "--pairs", str(labelled)]) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": "0" * 64}, "of other weights"),
        ({"accuracy_interval": [0.9, 0.6]}, "are no shares"),
        ({"accuracy_interval": None}, "not what selfplay train-reward writes"),
        ({"accuracy": "high"}, "not what selfplay train-reward writes"),
    ],
    ids=["other weights", "turned round", "no interval", "no number"],
)
def test_figures_that_are_not_the_models_own_are_refused(
    good: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    for file in good.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / ACCURACY).unlink()
    (tmp_path / ACCURACY).write_text(json.dumps({**(known_accuracy(good) or {}), **change}))
    with pytest.raises(DataError, match=said):
        trust.known_accuracy(tmp_path)


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ({"model": "./none"}, "judge.model"),
        ({"calibration": "none.jsonl"}, "judge.calibration"),
        ({"max_length": 513}, "judge.max_length"),
        ({"max_lenght": 12}, 'did you mean "max_length"'),
        ({"model": "CAUSAL"}, "a reward model has one label"),
        ({"chat_template": "none.jinja"}, "judge.chat_template"),
    ],
    ids=["no model", "no calibration file", "too long", "misspelt", "a causal model", "no template"],
)
def test_validate_shows_the_faults_of_a_reward_model(
    good: Path, tiny: Path, tmp_path: Path, judge: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"model": str(good), **judge}
    fields["model"] = str(tiny) if fields["model"] == "CAUSAL" else fields["model"]
    assert main(["validate", str(recipe_with(tmp_path, tiny, **fields))]) in (64, 65)
    assert said in capsys.readouterr().err


def test_raw_rewards_are_no_win_rates(tiny: Path, tmp_path: Path) -> None:
    from selfplay.recipe_file import load_recipe

    judge = {"kind": "reward_model", "model": str(tiny)}
    path = write_recipe(tmp_path, tiny, judge=judge, pairs={"kind": "win_rates", "win_rate_from": "scores"})
    with pytest.raises(RecipeError, match="are no win rates"):
        load_recipe(path)


def test_the_files_of_a_reward_model_are_copied_with_the_recipe(tiny: Path, tmp_path: Path) -> None:
    from selfplay.commands.recipes import files_of
    from selfplay.recipe_file import load_recipe

    for name in ("template.jinja", "labelled.jsonl"):
        (tmp_path / name).write_text("x")
    path = recipe_with(tmp_path, tiny, model=str(tiny), chat_template="template.jinja", calibration="labelled.jsonl")
    assert {file.name for file in files_of(load_recipe(path), tmp_path)} == {
        "prompts.jsonl",
        "template.jinja",
        "labelled.jsonl",
    }
