"""The command line, from arguments to exit codes, on a model of 100,000 parameters and the scripted generator."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scripted_run import ok, write_recipe

from selfplay import cli, store
from selfplay.cli import main
from selfplay.recipe_file import flat, load_recipe, recipe_folder
from selfplay.types import Completion, Drop, Group, Judgement, Message, Prompt


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), tiny)


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 2 rounds; tests read it and leave it as it is."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert main(["iterate", str(recipe), "--out", str(folder)]) == 0
    return folder


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, **options)


def test_iterate_ends_with_a_row_for_every_policy_the_gain_and_six_prompts(
    run: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ok("iterate", recipe, "--out", run)  # goes on, with nothing left to do
    lines = capsys.readouterr().out.splitlines()
    for start in ("initial", "round 0", "round 1"):
        assert any(line.startswith(start) for line in lines)
    assert sum(line.startswith("gain over the initial policy") for line in lines) == 2
    assert sum(line.startswith("prompt: Tell me about thing") for line in lines) == 6
    assert max(map(len, lines)) <= 110
    assert lines[-1] == f"policy: {run / 'round-001' / 'policy'}"


def test_a_finished_run_is_left_as_it_is(run: Path, recipe: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    ok("iterate", recipe, "--out", run)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_status_prints_json_of_every_policy_and_the_gain(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ok("status", run, "--json")
    figures = json.loads(capsys.readouterr().out)
    rows = [figures["initial"], *figures["rounds"]]
    assert len(rows) == 3
    for row in rows:
        assert {
            "heldout_score",
            "heldout_interval",
            "heldout_greedy",
            "on_topic",
            "mean_length",
            "seconds",
        } <= row.keys()
    assert all("counts" in row for row in figures["rounds"])
    low, high = figures["gain_interval"]
    assert low <= figures["gain"] <= high


def test_what_was_dropped_when_the_prompts_were_read_is_in_status_and_in_a_file(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ok("status", run, "--json")
    read = json.loads(capsys.readouterr().out)["prompts"]
    assert read["dropped"] == {"empty prompt": 1, "duplicate": 1}
    assert read["num_rows"] == 34 == read["num_train"] + read["num_heldout"] + sum(read["dropped"].values())
    kept = store.read_records(run / "drops.jsonl", Drop)
    assert sorted(drop.source.rpartition(":")[2] for drop in kept) == ["33", "34"]
    ok("status", run)
    assert "reading  1 duplicate; 1 empty prompt" in capsys.readouterr().out


def test_compare_shows_a_row_for_each_run_and_their_mean_gain(
    run: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ok("status", run, "--json")
    alone = json.loads(capsys.readouterr().out)
    ok("compare", run, run, "--json")
    found = json.loads(capsys.readouterr().out)
    assert [row["gain"] for row in found["runs"]] == [alone["gain"]] * 2
    assert found["gain"] == pytest.approx(alone["gain"])
    assert found["greedy_gain"] == pytest.approx(alone["greedy_gain"])
    ok("compare", run, run)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("run, seed 0") for line in lines) == 2
    assert max(map(len, lines)) <= 110
    unplayed = tmp_path / "unplayed"
    unplayed.mkdir()
    shutil.copyfile(run / "recipe.yaml", unplayed / "recipe.yaml")
    assert main(["compare", str(run), str(unplayed)]) == 65
    assert "no judged panel" in capsys.readouterr().err


def test_status_tells_of_a_round_that_is_not_finished(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for name in ("round.json", "round.json.sha256", "eval.json", "eval.json.sha256"):
        (copy / "round-001" / name).unlink()
    ok("status", copy)
    assert "round 1: not finished, trained so far" in capsys.readouterr().out


def test_status_tells_how_many_of_a_rounds_prompts_are_sampled_and_judged(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    second = copy / "round-001"
    for name in ("round.json", "eval.json", "pairs.jsonl", "drops.jsonl"):
        (second / name).unlink()
    shutil.rmtree(second / "policy")

    def said(shard_prompts: int) -> str:
        monkeypatch.setattr("selfplay.metrics.SHARD_PROMPTS", shard_prompts)
        ok("status", copy)
        return capsys.readouterr().out

    assert "round 1: not finished, judging 5 of 8 prompts so far" in said(5)
    shutil.rmtree(second / "judgements")
    assert "round 1: not finished, sampling 5 of 8 prompts so far" in said(5)
    assert "round 1: not finished, sampled 8 of 8 prompts so far" in said(8)
    shutil.rmtree(second / "groups")
    assert "round 1: not finished, started so far" in said(8)


def test_show_prints_completions_scores_and_pairs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ok("show", run, "--round", 1, "--limit", 3)
    text = capsys.readouterr().out
    assert text.count("user: Tell me about thing") == 3
    assert text.count("completion ") >= 12
    assert "pair: chosen completion" in text


def test_show_neutralises_terminal_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = Prompt("p", (Message("user", "hi\x1b[2J"),), source="\x1b]0;x\x07rows")
    groups = [Group(prompt, (1,), (Completion("ok\x1b[31m\x9b1m\x00", (2,)),))]
    store.write_records(tmp_path / "round-000" / "groups" / "00000.jsonl", groups, Group)
    judgements = [Judgement("p", (1.0,), ("\x1b[1mnote",))]
    store.write_records(tmp_path / "round-000" / "judgements" / "00000.jsonl", judgements, Judgement)
    ok("show", tmp_path, "--round", 0)
    text = capsys.readouterr().out
    assert "completion 0, score 1.000: ok" in text
    assert not [char for char in text if ord(char) < 32 and char != "\n"]


def test_a_terminal_that_cannot_spell_a_completion_shows_the_rest(tmp_path: Path) -> None:
    prompt = Prompt("p", (Message("user", "hi"),))
    groups = [Group(prompt, (1,), (Completion("na\u00efve \u05d0 end", (2,)),))]
    store.write_records(tmp_path / "round-000" / "groups" / "00000.jsonl", groups, Group)
    done = process(
        "-m", "selfplay", "show", str(tmp_path), "--round", "0", env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0, done.stderr
    assert "na?ve ? end" in done.stdout


def test_a_round_that_is_not_there_is_an_error_that_lists_those_that_are(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(run), "--round", "5"]) == 65
    assert "rounds here: 0, 1" in capsys.readouterr().err
    assert main(["show", str(run.parent / "none"), "--round", "0"]) == 65
    assert "no rounds here. Name a run directory" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ok("iterate", recipe, "--out", tmp_path / "run", "--dry-run", "--set", "train.beta=0.3")
    assert not (tmp_path / "run").exists()
    text = capsys.readouterr().out
    assert "beta 0.3" in text
    assert "disk: about" in text


def test_the_run_directory_is_named_after_the_recipe(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def stop(loaded: Any, out: Path, **options: Any) -> None:
        seen.append(out)
        raise KeyboardInterrupt

    monkeypatch.setattr("selfplay.rounds.iterate", stop)
    assert main(["iterate", str(recipe)]) == 75
    assert seen == [Path("runs/recipe")]


def test_validate_lists_every_recipe_and_exits_with_the_first_fault(
    recipe: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_data, no_check, misspelt = (tmp_path / name for name in ("no_data", "no_check", "misspelt"))
    for folder in (no_data, no_check, misspelt):
        folder.mkdir()
    faults = [
        write_recipe(no_data, tiny),
        write_recipe(no_check, tiny, judge={"kind": "verifier", "checks": [{"kind": "word", "min": 1}]}),
        write_recipe(misspelt, tiny, evaluate={"num_completion": 2}),
    ]
    (no_data / "prompts.jsonl").unlink()
    assert main(["validate", *map(str, [recipe, *faults])]) == 65
    said = capsys.readouterr()
    assert said.out == f"{recipe}: ok\n"
    for part in ("no such file", "the nearest is 'words'", 'did you mean "num_completions"?'):
        assert part in said.err
    assert main(["validate", str(faults[2]), str(faults[0])]) == 64


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"judge": None}, "reads scores"),
        ({"model": "./none"}, "no such folder"),
        ({"judge": {"kind": "python", "target": "my.py:f"}}, "judge.target"),
        ({"judge": {"kind": "llm", "template": "no-such-template"}}, "no-such-template"),
        ({"judge": {"kind": "llm", "model": "./none"}}, "judge.model"),
        (
            {"evaluate": {"judge": {"kind": "verifier", "checks": [{"kind": "json", "key": 1}]}}},
            "evaluate.judge.checks",
        ),
        ({"prompts": {"source": "prompts.jsonl", "num_prompts": 8, "heldout": "held.jsonl"}}, "prompts.heldout"),
        ({"prompts": {"source": "./none", "num_prompts": 8}}, "prompts.source"),
        (
            {"prompts": {"source": "prompts.jsonl", "num_prompts": 8, "heldout": {"source": "./none"}}},
            "prompts.heldout",
        ),
        ({"chat": {"chat_template": "no.jinja"}}, "chat.chat_template: "),
        (
            {"judge": {"kind": "llm", "model": "a/b", "chat": {"chat_template": "no.jinja"}}},
            "judge.chat.chat_template: ",
        ),
        (
            {"evaluate": {"judge": {"kind": "llm", "model": "a/b", "chat": {"chat_template": "no.jinja"}}}},
            "evaluate.judge.chat.chat_template: ",
        ),
        ({"judge": {"kind": "reward_model", "model": "a/b", "chat_template": "no.jinja"}}, "judge.chat_template: "),
        ({"judge": {"kind": "llm", "verdict": "labels"}}, "judge: judge.template: additive has no `labels`"),
        ({"judge": {"kind": "llm", "template": "yes_no"}}, "yes_no has no `parse`"),
        ({"judge": {"kind": "llm", "num_verdicts": 2, "temperature": 0}}, "judge.num_verdicts is 2"),
        (
            {"evaluate": {"judge": {"kind": "api", "base_url": "http://x/v1", "model": "m", "template": "yes_no"}}},
            "evaluate.judge: judge.template: yes_no",
        ),
        ({"judge": {"kind": "python", "target": "recipe.yaml.py:f"}}, "no such file"),
        (
            {"pairs": {"filters": [{"kind": "python", "target": "no_such_module_here:f"}]}},
            "pairs.filters.0.target",
        ),
        ({"judge": {"kind": "verifier"}}, "nothing to check: none of 24 prompts has checks"),
    ],
    ids=str,
)
def test_validate_and_the_dry_run_find_what_a_run_would_stumble_over(
    sections: dict[str, Any], said: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_recipe(tmp_path, tiny, **sections))
    for command in (["validate", path], ["iterate", path, "--out", str(tmp_path / "run"), "--dry-run"]):
        assert main(command) in (64, 65)
        assert said in " ".join(capsys.readouterr().err.split())


def test_validate_reads_programs_and_runs_them_only_when_allowed(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "my.py"
    program.write_text("import no_such_module_here\n\ndef f(prompt, completion):\n    return 1.0\n")
    path = write_recipe(tmp_path, tiny, judge={"kind": "python", "target": "my.py:f"})
    ok("validate", path)
    assert main(["validate", str(path), "--allow-code"]) == 69
    assert "my.py failed on import: ModuleNotFoundError" in capsys.readouterr().err
    program.write_text("def f(prompt):\n    return 1.0\n")
    assert main(["validate", str(path), "--allow-code"]) == 64
    assert "a judge function takes" in capsys.readouterr().err


def test_validate_finds_a_row_whose_checks_can_not_be_run(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path, tiny)
    row = {"prompt": "Say it.", "checks": [{"kind": "words", "least": 3}]}
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert main(["validate", str(path)]) == 65
    assert "prompts.jsonl:35: checks: check 'words': no argument 'least'" in capsys.readouterr().err


def test_the_recipes_are_listed_and_a_copy_of_each_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ok("recipes")
    listed = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert "quickstart" in listed
    assert all(text.strip() for text in listed.values())
    inside = 0
    for name in listed:
        copied, own = tmp_path / name / "recipes", recipe_folder()
        ok("recipes", "copy", name, copied)
        copy, recipe = (flat(load_recipe(folder / f"{name}.yaml").model_dump()) for folder in (copied, own))
        assert copy.keys() == recipe.keys()
        for key, value in recipe.items():
            path = Path(value) if isinstance(value, str) else Path()
            if path.is_relative_to(own):  # a file that comes with the recipe
                inside += 1
                assert Path(copy[key]) == copied / path.relative_to(own)
                assert Path(copy[key]).read_bytes() == path.read_bytes()
            elif not path.is_absolute():
                assert copy[key] == value, key
    assert inside > 5
    ok("iterate", tmp_path / "quickstart/recipes/quickstart.yaml", "--dry-run", "--set", "model=someone/some-model")


def test_a_copy_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("mine")
    assert main(["recipes", "copy", "quickstart", str(tmp_path)]) == 74
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart.yaml"]
    assert (tmp_path / "quickstart.yaml").read_text() == "mine"
    assert main(["recipes", "copy", "quikstart", str(tmp_path)]) == 64


def test_import_gguf_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-gguf", str(tmp_path / "none.gguf"), str(tmp_path / "out")]) == 65
    assert capsys.readouterr().err.startswith("error: ")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    ok("--version")
    assert capsys.readouterr().out.startswith("selfplay 0.")


@pytest.mark.parametrize("arguments", [["iterate", "--nope"], ["nope"], ["iterate"], ["status", "a", "b"]])
def test_wrong_usage_exits_with_64(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 64
    assert "Usage" in capsys.readouterr().err


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    """The exit code of a command that ends by `error`."""

    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("selfplay.commands.show.status", fail)
    return main(["status", "run"])


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(monkeypatch, KeyboardInterrupt()) == 75
    assert "The same command goes on" in capsys.readouterr().err


def test_a_signal_to_terminate_stops_as_ctrl_c_does(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("selfplay.commands.show.status", lambda run: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["status", "run"]) == 75
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_disk_that_refuses_exits_with_74(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(monkeypatch, PermissionError(13, "Permission denied", "/full")) == 74
    assert capsys.readouterr().err.startswith("error: /full: Permission denied")


def test_what_nobody_expected_is_a_traceback_and_70(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        failing(monkeypatch, ZeroDivisionError("oh"))
    assert end.value.code == 70
    assert "Traceback" in capsys.readouterr().err


def test_an_error_message_carries_no_terminal_escapes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(monkeypatch, cli.RecipeError("bad \x1b[31mkey")) == 64
    assert capsys.readouterr().err == "error: bad key\n"


def test_python_that_drops_assertions_is_refused() -> None:
    done = process("-O", "-m", "selfplay", "--version")
    assert done.returncode == 64
    assert done.stderr.startswith("error: Python runs with -O")


def test_help_and_validate_load_no_torch(recipe: Path) -> None:
    code = (
        "import sys; from selfplay.cli import main; main(['--help']); main(['iterate', '--help']); "
        f"code = main(['validate', {str(recipe)!r}]); "
        "sys.exit(code or 'torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = process("-c", code)
    assert done.returncode == 0, done.stderr
    assert "ok" in done.stdout
