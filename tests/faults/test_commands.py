"""Commands that are stopped in training, or fail in it: exit codes, messages, and that the same command then goes on."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import random_pairs
from killer import digests
from mixed_run import write_mixed
from scripted_run import ok, write_recipe

from selfplay import faults, store
from selfplay.cli import main
from selfplay.types import PreferencePair

CHANGING = ("seconds.json", "metrics.jsonl", ".lock", "round.json", "round.json.sha256", "stage.json")
Fault = Callable[[str | None], None]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    train = {"learning_rate": 1e-3, "batch_size": 2, "bf16": False, "max_steps": 4}
    return write_recipe(tmp_path_factory.mktemp("recipe"), tiny, rounds=1, train=train)


def artifacts(run: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(run).items() if Path(name).name not in CHANGING}


def test_a_run_stopped_and_broken_in_training_ends_as_an_undisturbed_one(
    recipe: Path, tmp_path: Path, fault: Fault, capsys: pytest.CaptureFixture[str]
) -> None:
    ok("iterate", recipe, "--out", tmp_path / "whole")
    run = tmp_path / "run"
    command = ["iterate", str(recipe), "--out", str(run)]
    checkpoints = run / "round-000" / "train" / "checkpoints"
    capsys.readouterr()

    fault("train.pack@2=term")
    assert main(command) == 75
    assert "after training step 2 of 4" in capsys.readouterr().err
    assert [f.name for f in checkpoints.iterdir()] == ["step-000002"]
    assert store.read_json(run / "round-000" / "seconds.json")["train"] > 0

    fault("train.loss@1=nan")
    assert main(command) == 76
    assert "no update was made" in capsys.readouterr().err

    fault("store.folder.temporary@1=enospc")  # the policy
    assert main(command) == 74
    assert "same command" in capsys.readouterr().err
    assert not (run / "round-000" / "policy").exists()

    fault("store.folder.digest@1=raise")
    with pytest.raises(SystemExit, match="70"):
        main(command)
    assert (run / "round-000" / f"policy{store.TEMPORARY}").is_dir()

    fault("store.remove@1=raise")  # between the policy and the end of the checkpoints
    capsys.readouterr()
    with pytest.raises(SystemExit, match="70"):
        main(command)
    said = " ".join(capsys.readouterr().err.split())
    assert f"round-000/policy{store.TEMPORARY}: left unfinished when it was stopped; removed" in said
    assert checkpoints.is_dir()

    fault(None)
    ok(*command)
    assert not checkpoints.exists()
    assert artifacts(run) == artifacts(tmp_path / "whole")
    ours, theirs = (json.loads((folder / "round-000/round.json").read_text()) for folder in (run, tmp_path / "whole"))
    assert ours["train"] == theirs["train"]


def test_training_on_its_own_stops_and_goes_on(recipe: Path, tiny: Path, tmp_path: Path, fault: Fault) -> None:
    pairs = tmp_path / "pairs.jsonl"
    store.write_records(pairs, random_pairs(num_prompts=4), PreferencePair)
    command = ["train", str(recipe), "--model", str(tiny), "--pairs", str(pairs)]
    ok(*command, "--out", tmp_path / "whole")
    fault("train.pack@3=term")
    assert main([*command, "--out", str(tmp_path / "out")]) == 75
    fault("train.update@1=raise")
    with pytest.raises(SystemExit, match="70"):
        main([*command, "--out", str(tmp_path / "out"), "--set", "train.save_steps=1"])
    fault(None)
    ok(*command, "--out", tmp_path / "out")
    assert artifacts(tmp_path / "out") == artifacts(tmp_path / "whole")


def test_how_often_checkpoints_are_written_may_change_in_a_run_and_nothing_else_of_training(
    recipe: Path, tmp_path: Path, fault: Fault, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["iterate", str(recipe), "--out", str(tmp_path / "run")]
    fault("train.pack@1=term")
    assert main(command) == 75
    assert main([*command, "--set", "train.learning_rate=2e-3"]) == 64
    fault("train.boundary@2=raise")
    with pytest.raises(SystemExit, match="70"):
        main([*command, "--set", "train.save_steps=1"])
    names = sorted(f.name for f in (tmp_path / "run/round-000/train/checkpoints").iterdir())
    assert names == ["step-000001", "step-000002"]


@pytest.mark.slow
def test_a_run_of_several_sources_that_is_killed_ends_as_an_undisturbed_one(
    tiny: Path, tmp_path: Path, fault: Fault
) -> None:
    mixed = write_mixed(tmp_path, tiny)
    listing = tmp_path / "points"
    fault(f"list={listing}")
    ok("iterate", mixed, "--out", tmp_path / "whole")
    fault(None)
    files = Counter(listing.read_text().split())["store.file.temporary"]
    command = [sys.executable, "-m", "selfplay", "iterate", str(mixed), "--out", str(tmp_path / "run")]
    # thrice in the first half, where panel, groups and judgements of the sources are written, each time further on
    for share in (0.15, 0.2, 0.25):
        environment = {**os.environ, faults.VARIABLE: f"store.file.temporary@{int(files * share)}=kill9"}
        assert subprocess.run(command, check=False, env=environment).returncode == -signal.SIGKILL
    ok("iterate", mixed, "--out", tmp_path / "run")
    assert artifacts(tmp_path / "run") == artifacts(tmp_path / "whole")
    assert any("judgements/open/member-1" in name for name in artifacts(tmp_path / "whole"))
