"""The stages of a round as separate commands over files: they write what a run writes, and reuse nothing of other inputs."""

import json
from pathlib import Path
from typing import Any

import pytest
from scripted_run import ok, write_recipe

from selfplay import store
from selfplay.chat import Chat
from selfplay.cli import main
from selfplay.single import read_groups
from selfplay.types import Demonstration, Drop, PreferencePair


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), tiny)


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 2 rounds; tests read it and leave it as it is."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert main(["iterate", str(recipe), "--out", str(folder)]) == 0
    return folder


def test_the_stages_one_by_one_write_the_bytes_of_a_round(run: Path, recipe: Path, tiny: Path, tmp_path: Path) -> None:
    groups, judgements, pairs = tmp_path / "groups", tmp_path / "judgements", tmp_path / "pairs.jsonl"
    ok("generate", recipe, "--model", tiny, "--out", groups)
    ok("judge", recipe, "--groups", groups, "--out", judgements)
    ok("pairs", recipe, "--groups", groups, "--judgements", judgements, "--out", pairs)
    ok("train", recipe, "--model", tiny, "--pairs", pairs, "--out", tmp_path / "train")
    first = run / "round-000"
    for ours, theirs in ((groups, first / "groups"), (judgements, first / "judgements")):
        assert (ours / "00000.jsonl").read_bytes() == (theirs / "00000.jsonl").read_bytes()
    assert pairs.read_bytes() == (first / "pairs.jsonl").read_bytes()
    assert store.weights_digest(tmp_path / "train" / "policy") == store.weights_digest(first / "policy")


def test_the_stages_of_a_later_round_take_its_prompts_seeds_and_settings(
    run: Path, recipe: Path, tmp_path: Path
) -> None:
    groups, policy = tmp_path / "groups", run / "round-000" / "policy"
    ok("generate", recipe, "--model", policy, "--out", groups, "--round", 1)
    second = run / "round-001"
    assert (groups / "00000.jsonl").read_bytes() == (second / "groups" / "00000.jsonl").read_bytes()
    pairs = second / "pairs.jsonl"
    ok("train", recipe, "--model", policy, "--pairs", pairs, "--out", tmp_path / "train", "--round", 1)
    assert store.weights_digest(tmp_path / "train" / "policy") == store.weights_digest(second / "policy")


def test_pairs_of_an_old_run_are_made_again_from_its_own_judgements(run: Path, recipe: Path, tmp_path: Path) -> None:
    first = run / "round-000"
    ok(
        "pairs",
        recipe,
        "--groups",
        first / "groups",
        "--judgements",
        first / "judgements",
        "--out",
        tmp_path / "p.jsonl",
    )
    assert (tmp_path / "p.jsonl").read_bytes() == (first / "pairs.jsonl").read_bytes()


MIX = ["--set", "pairs.filters=[{kind: mix_previous}]"]


def test_pairs_of_an_earlier_round_are_mixed_in_from_its_file(
    run: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, out = run / "round-000", run / "round-001", tmp_path / "p.jsonl"
    arguments = ["pairs", str(recipe), "--groups", str(second / "groups"), "--judgements", str(second / "judgements")]
    arguments += ["--out", str(out), "--round", "1", *MIX]
    assert main(arguments) == 64
    assert "the pairs of round 0: name its pairs.jsonl with --previous" in capsys.readouterr().err
    assert main([*arguments, "--previous", str(second / "pairs.jsonl")]) == 64
    assert main([*arguments, "--previous", str(second / "pairs.jsonl"), "--previous", str(first / "pairs.jsonl")]) == 0
    own, old = (store.read_records(folder / "pairs.jsonl", PreferencePair) for folder in (second, first))
    assert store.read_records(out, PreferencePair) == [*own, *old]
    said = f"filter mix_previous: {len(own)} pairs + {len(old)} of earlier rounds - 0 dropped = {len(own) + len(old)}"
    assert said in capsys.readouterr().out
    assert [p.origin_round for p in old] == [0] * len(old)


def test_a_filter_program_of_a_stage_runs_only_when_allowed(run: Path, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text("def two(pairs, context):\n    return pairs[:2]\n")
    first, target = run / "round-000", tmp_path / "my.py"
    arguments = ["pairs", str(recipe), "--groups", str(first / "groups"), "--judgements", str(first / "judgements")]
    arguments += [
        "--out",
        str(tmp_path / "p.jsonl"),
        "--set",
        f"pairs.filters=[{{kind: python, target: '{target}:two'}}]",
    ]
    assert main(arguments) == 77
    assert main([*arguments, "--allow-code"]) == 0
    assert len(store.read_records(tmp_path / "p.jsonl", PreferencePair)) == 2


def test_a_panel_alone_is_the_run_s_own(run: Path, recipe: Path, tiny: Path, tmp_path: Path) -> None:
    ok("evaluate", recipe, "--model", tiny, "--out", tmp_path)
    assert (tmp_path / "eval.json").read_bytes() == (run / "initial" / "eval.json").read_bytes()


def test_a_panel_alone_measures_how_far_a_policy_is_from_the_recipe_s_model(
    run: Path, recipe: Path, tmp_path: Path
) -> None:
    engine = [
        "--set",
        "generator.kind=transformers",
        "--set",
        "generator.dtype=float32",
        "--set",
        "generator.max_tokens=6",
    ]
    ok("evaluate", recipe, "--model", run / "round-001" / "policy", "--out", tmp_path, *engine)
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert figures["kl"] != 0
    assert figures["entropy"] > 0


def test_a_folder_with_the_work_of_other_inputs_is_refused(
    run: Path, recipe: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = ["--groups", str(run / "round-000" / "groups"), "--out", str(tmp_path / "judgements")]
    assert main(["judge", str(recipe), *groups]) == 0
    assert main(["judge", str(recipe), *groups]) == 0
    assert main(["judge", str(recipe), *groups, "--set", "judge={kind: coin}"]) == 64
    assert "judge: verifier" in capsys.readouterr().err


def test_a_pairs_file_with_other_pairs_is_left_alone(run: Path, recipe: Path, tmp_path: Path) -> None:
    first, out = run / "round-000", tmp_path / "p.jsonl"
    arguments = ["pairs", str(recipe), "--groups", str(first / "groups"), "--out", str(out)]
    arguments += ["--judgements", str(first / "judgements")]
    assert main(arguments) == 0
    before = out.read_bytes()
    assert main(arguments) == 0
    assert main([*arguments, "--set", "pairs.max_pairs_per_prompt=2"]) == 74
    assert out.read_bytes() == before


def test_judgements_of_other_prompts_are_refused(run: Path, recipe: Path, tmp_path: Path) -> None:
    arguments = ["--groups", run / "round-000" / "groups", "--judgements", run / "round-001" / "judgements"]
    assert main(["pairs", str(recipe), *map(str, arguments), "--out", str(tmp_path / "p.jsonl")]) == 65


@pytest.mark.parametrize(
    ("missing", "sections"),
    [("--judgements", {}), ("--model", {"judge": {"kind": "llm"}})],
)
def test_an_input_that_a_stage_needs_is_asked_for(
    missing: str, sections: dict[str, Any], run: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path, tiny, **sections)
    groups = ["--groups", str(run / "round-000" / "groups"), "--out", str(tmp_path / "out")]
    assert main(["pairs" if missing == "--judgements" else "judge", str(path), *groups]) == 64
    assert missing in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "unread"),
    [
        ("judge", "--model"),
        ("pairs", "--previous"),
        ("pairs", "--judgements"),
        ("train", "--optimizer-state"),
        ("train", "--name"),
        ("train", "--split"),
        ("calibrate", "--split"),
        ("train-reward", "--name"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    command: str, unread: str, run: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = {"judge": None, "pairs": {"kind": "gold_vs_completion"}} if unread == "--judgements" else {}
    recipe = [] if command == "train-reward" else [str(write_recipe(tmp_path, tiny, **sections))]
    groups, pairs = ["--groups", str(run / "round-000" / "groups")], ["--pairs", str(run / "round-000" / "pairs.jsonl")]
    judgements = [] if sections else ["--judgements", str(run / "round-000" / "judgements")]
    needed = {
        "judge": groups,
        "pairs": [*groups, *judgements],
        "train": ["--model", str(tiny), *pairs],
        "calibrate": pairs,
        "train-reward": ["--model", str(tiny), *pairs],
    }
    given = [command, *recipe, *needed[command], "--out", str(tmp_path / "out"), unread]
    assert main([*given, str(tiny if unread == "--model" else recipe[0] if recipe else "other")]) == 64
    assert unread in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_train_takes_any_preference_data(
    recipe: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Add {n}.", "chosen": f"It is {n}.", "rejected": "No."} for n in range(6)]
    rows.append({"prompt": "Same?", "chosen": "Yes.", "rejected": "Yes."})
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ok("train", recipe, "--model", tiny, "--pairs", data, "--out", tmp_path / "out")
    said = capsys.readouterr()
    assert "6 pairs (0 over max_length left out), 2 steps, loss 0.6931" in said.out
    assert "rows: 1 dropped: chosen equals rejected" in said.err
    assert len(store.read_records(tmp_path / "out" / "pairs.jsonl", PreferencePair)) == 6
    assert store.weights_digest(tmp_path / "out" / "policy") != store.weights_digest(tiny)


def test_train_needs_no_prompts_in_its_recipe_and_what_needs_them_says_so(
    run: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {tiny}\ntrain: {{learning_rate: 1e-3, batch_size: 4, bf16: false}}\n")
    ok("validate", path)
    assert "ok, without prompts" in capsys.readouterr().out
    pairs = run / "round-000" / "pairs.jsonl"
    ok("train", path, "--model", tiny, "--pairs", pairs, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "policy").is_dir()
    for command in (
        ["iterate"],
        ["iterate", "--dry-run"],
        ["generate", "--model", str(tiny)],
        ["evaluate", "--model", str(tiny)],
    ):
        name, *options = command
        assert main([name, str(path), "--out", str(tmp_path / name), *options]) == 64
        assert "prompts.source: missing; this command needs prompts" in capsys.readouterr().err


def test_generate_keeps_what_was_dropped_beside_its_shards(recipe: Path, tiny: Path, tmp_path: Path) -> None:
    ok("generate", recipe, "--model", tiny, "--out", tmp_path)
    assert {drop.reason for drop in store.read_records(tmp_path / "drops.jsonl", Drop)} == {"duplicate", "empty prompt"}
    assert len(read_groups(tmp_path)) == 8


def test_train_on_messages_is_sft(recipe: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = [{"role": "assistant", "content": "It is 3."}]
    rows = [[{"role": "user", "content": f"Add {n}."}, *answers[: n > 0]] for n in range(5)]
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    arguments = ["train", str(recipe), "--model", str(tiny), "--pairs", str(data), "--out", str(out)]
    assert main(arguments) == 65
    assert "train.loss_type: sft" in capsys.readouterr().err
    out = tmp_path / "sft"
    arguments = [*arguments[:-1], str(out), "--set", "train.loss_type=sft", "--set", "train.batch_size=1"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "4 completions (0 over max_length left out), 4 steps" in said.out
    assert "accuracy" not in said.out
    assert "rows: 1 dropped: no completion to imitate" in said.err
    assert len(store.read_records(out / "demonstrations.jsonl", Demonstration)) == 4
    assert not (out / "reference.safetensors").exists()
    losses = [row["loss"] for row in store.read_json_lines(out / "train" / "steps.jsonl")]
    assert losses[-1] < losses[0]


def test_train_with_sft_takes_the_chosen_completions_of_preference_rows(
    run: Path, recipe: Path, tiny: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Add {n}.", "chosen": f"It is {n}.", "rejected": "No."} for n in range(4)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ok("train", recipe, "--model", tiny, "--pairs", data, "--out", tmp_path / "out", "--set", "train.loss_type=sft")
    assert len(store.read_records(tmp_path / "out" / "pairs.jsonl", PreferencePair)) == 4
    assert "rewards/chosen" not in store.read_json_lines(tmp_path / "out" / "train" / "steps.jsonl")[0]


@pytest.mark.parametrize(
    ("sets", "arguments", "said"),
    [
        (["reference=initial"], ["--round", "1"], "the initial policy: name it with --reference"),
        (["reference=ema"], ["--round", "1"], "mixed from that of the round before: name it with --reference"),
        (["loss_type=simpo"], ["--reference", "MODEL"], "loss_type simpo reads no reference"),
        (["reference_logps=engine"], [], "name what the model sampled with --groups"),
    ],
    ids=["initial", "ema", "free", "engine"],
)
def test_a_reference_that_train_can_t_know_is_asked_for(
    sets: list[str],
    arguments: list[str],
    said: str,
    run: Path,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_recipe(tmp_path, tiny, generator={"kind": "transformers"})
    called = ["train", str(path), "--model", str(tiny), "--pairs", str(run / "round-000" / "pairs.jsonl")]
    called += ["--out", str(tmp_path / "out"), *(word.replace("MODEL", str(tiny)) for word in arguments)]
    assert main([*called, *(word for text in sets for word in ("--set", f"train.{text}"))]) == 64
    assert said in capsys.readouterr().err


def test_train_takes_another_reference(run: Path, recipe: Path, tiny: Path, tmp_path: Path) -> None:
    policy, pairs = run / "round-000" / "policy", run / "round-001" / "pairs.jsonl"
    ok("train", recipe, "--model", policy, "--pairs", pairs, "--reference", tiny, "--out", tmp_path, "--round", 1)
    assert store.weights_digest(tmp_path / "policy") != store.weights_digest(run / "round-001" / "policy")


def test_a_judge_program_runs_only_when_allowed(
    run: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my.py").write_text("def shorter(prompt, completion):\n    return -len(completion.text)\n")
    path = write_recipe(tmp_path, tiny, judge={"kind": "python", "target": "my.py:shorter"})
    arguments = ["judge", str(path), "--groups", str(run / "round-000" / "groups"), "--out", str(tmp_path / "j")]
    assert main(arguments) == 77
    assert main([*arguments, "--allow-code"]) == 0
    assert "32 completions, mean score -" in capsys.readouterr().out


def test_groups_sampled_without_gold_answers_are_no_food_for_a_pairing_with_them(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny)
    rows = [{"prompt": f"question {n}", "gold": f"answer {n}"} for n in range(32)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spin = ["--set", "pairs={kind: gold_vs_completion}", "--set", "judge=null"]
    generate = ["generate", str(recipe), "--model", str(tiny), "--out", str(tmp_path / "groups")]
    assert main(generate) == 0
    pairs = ["pairs", str(recipe), "--groups", str(tmp_path / "groups"), "--out", str(tmp_path / "pairs.jsonl"), *spin]
    assert main(pairs) == 65
    assert "generate it anew" in " ".join(capsys.readouterr().err.split())
    assert main([*generate, *spin]) == 64
    assert "gold: False -> True" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "change", "named"),
    [
        ("generate", "generator.dtype=float16", "generator"),
        ("generate", "generator.engine_args={enforce_eager: true}", "generator"),
        ("evaluate", "evaluate.greedy=false", "greedy"),
        ("evaluate", "evaluate.kl=false", "kl"),
    ],
)
def test_half_done_work_does_not_go_on_with_another_engine_or_as_another_panel(
    command: str, change: str, named: str, recipe: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = [command, str(recipe), "--model", str(tiny), "--out", str(tmp_path / "out")]
    assert main(begun) == 0
    assert main([*begun, "--set", change]) == 64
    assert named in capsys.readouterr().err


def test_half_done_judging_by_a_model_does_not_go_on_with_another_engine_or_chat(
    run: Path, recipe: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "template.jinja").write_text(Chat.load(str(tiny)).tokenizer.chat_template + "{# other #}")
    judge = ["judge", str(recipe), "--groups", str(run / "round-000" / "groups"), "--model", str(tiny)]
    judge += ["--out", str(tmp_path / "judged"), "--set", "judge={kind: llm, max_tokens: 4}"]
    judge += ["--set", "generator={kind: transformers, dtype: float32}"]
    assert main(judge) == 0
    for change in ("generator.dtype=bfloat16", f"chat.chat_template={tmp_path / 'template.jinja'}"):
        assert main([*judge, "--set", change]) == 64
        assert f"{change.partition('.')[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize("change", ["prompts.turns=last", "prompts.gold_column=other"])
def test_training_on_other_turns_or_gold_answers_is_another_job(
    recipe: Path, tiny: Path, tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ("user", "assistant") * 2
    rows = [
        {"messages": [{"role": role, "content": f"{k} of {n}"} for k, role in enumerate(said)], "other": f"other {n}"}
        for n in range(4)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = ["train", str(recipe), "--model", str(tiny), "--pairs", str(tmp_path / "rows.jsonl")]
    train += ["--out", str(tmp_path / "out"), "--set", "train.loss_type=sft"]
    assert main(train) == 0
    assert main([*train, "--set", change]) == 64
    assert "rows" in capsys.readouterr().err
