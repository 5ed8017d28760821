"""Two processes that train together, of which one is killed or hangs, or whose command is stopped or killed: none of them is
left, the message says what happened, and the same command ends in the bytes of an undisturbed one.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jobs
import pytest
import yaml
from jobs import flat, job_of, random_pairs
from killer import digests
from scripted_run import ok, write_recipe

from selfplay import store
from selfplay.cli import main
from selfplay.progress import SILENT
from selfplay.train import launch
from selfplay.train.devices import Devices
from selfplay.train.loop import run_training
from selfplay.types import PreferencePair

pytestmark = pytest.mark.slow
CPU = {"distributed_type": "MULTI_CPU", "use_cpu": True, "num_processes": 2, "num_machines": 1, "mixed_precision": "no"}
MEDDLED = (
    "import sys\nfrom selfplay.cli import main\nfrom selfplay.train import launch\n"
    "launch.RANK = 'meddler'\nmain(sys.argv[1:])\n"
)
Fault = Callable[[str | None], None]


@pytest.fixture
def command(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`selfplay train` on two processes, but for its --out."""
    train = {"learning_rate": 1e-3, "batch_size": 2, "bf16": False, "max_steps": 4, "save_steps": 1}
    recipe = write_recipe(tmp_path, tiny, rounds=1, train=train)
    store.write_records(tmp_path / "pairs.jsonl", random_pairs(num_prompts=4), PreferencePair)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(CPU))
    roots = [str(Path(jobs.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(roots))
    files = ["--pairs", str(tmp_path / "pairs.jsonl"), "--accelerate-config", str(tmp_path / "two.yaml")]
    return ["train", str(recipe), "--model", str(tiny), *files, "--out"]


def test_whatever_befalls_the_processes_none_is_left_and_the_same_command_goes_on(
    command: list[str],
    tmp_path: Path,
    fault: Fault,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    ok(*command, tmp_path / "whole")
    out = tmp_path / "out"
    again = [*command, str(out)]
    checkpoints = out / "train" / "checkpoints"

    fault("train.update@1=kill9/1")
    assert main(again) == 70
    said = capfd.readouterr().err
    killed = "process 1 of the 2 that train was ended by signal 9 (SIGKILL), and the others with it"
    assert f"training: {killed}; going on from the start (restart 1 of at most 2)" in said
    assert f"error: {killed}" in said
    assert "The same command goes on from the last checkpoint" in said
    assert not checkpoints.exists()

    monkeypatch.setattr(launch, "RANK", "meddler")
    monkeypatch.setenv("MEDDLE", "hasty")
    fault("store.replace@1=hang/0")  # before its first step
    assert main(again) == 70
    said = capfd.readouterr().err
    assert "error: process 1 of the 2 that train ended with code 1, and the others with it" in said
    assert "Timed out" in said

    fault(None)
    monkeypatch.setenv("MEDDLE", "int")
    assert main(again) == 75
    said = capfd.readouterr().err
    assert "stopped after training step 2 of 4" in said
    assert sorted(f.name for f in checkpoints.iterdir()) == ["step-000001", "step-000002"]

    store.remove_folder(checkpoints)  # so that there is a second step once more
    monkeypatch.setenv("MEDDLE", "kill")
    ended = subprocess.run(
        [sys.executable, "-c", MEDDLED, *again], capture_output=True, text=True, check=False, timeout=600
    )
    # its output ends when the last process that could write to it has ended
    assert ended.returncode == -9, ended.stderr
    assert (out / f"processes{store.TEMPORARY}").is_dir()

    monkeypatch.undo()
    ok(*again)
    said = " ".join(capfd.readouterr().err.split())
    assert f"processes{store.TEMPORARY}: left unfinished when it was stopped; removed" in said
    assert "going on from the checkpoint of step 1" in said
    same_bytes(out, tmp_path / "whole")


def same_bytes(out: Path, whole: Path) -> None:
    ours, theirs = digests(out), digests(whole)
    for name in ("policy/model.safetensors", "train/steps.jsonl", "train/result.json", "reference.safetensors"):
        assert ours[name] == theirs[name], name


def test_a_process_that_is_killed_is_started_again_with_the_others_and_nobody_is_asked(
    command: list[str], tmp_path: Path, fault: Fault, capfd: pytest.CaptureFixture[str]
) -> None:
    ok(*command, tmp_path / "whole")
    fault("train.update@3=kill9/1")
    ok(*command, tmp_path / "out")
    assert "going on from the checkpoint of step 2 (restart 1 of at most 2)" in capfd.readouterr().err
    assert [row["step"] for row in store.read_json_lines(tmp_path / "out/train/restarts.jsonl")] == [2]
    same_bytes(tmp_path / "out", tmp_path / "whole")


def test_cut_weights_that_run_out_of_memory_go_on_in_smaller_packs(tmp_path: Path, tiny: Path, fault: Fault) -> None:
    pairs = random_pairs(num_prompts=8, num_completions=2)
    rig = {"batch_size": 8, "max_steps": 4, "save_steps": 1}
    job = job_of(tmp_path / "two", tiny, pairs, **rig)
    fault("train.pack@4=oom/1")  # a pack a step
    devices = Devices(tmp_path / "none.yaml", num_processes=2, use_cpu=True, sharded=True)
    result = launch.launch(job, SILENT, devices)
    assert [row["step"] for row in result["out_of_memory"]] == [3], "the step that was done before"
    assert result["out_of_memory"][0]["max_pack_tokens"] < result["max_pack_tokens"] / 4
    (record,) = store.read_json_lines(Path(job.out) / "train/restarts.jsonl")
    assert record["step"] == 3
    assert record["why"].startswith("process 1 of those that train ran out of memory, and packs hold at most")
    fault(None)
    run_training(job_of(tmp_path / "one", tiny, pairs, **rig))
    one, two = (flat(tmp_path / name / "out/policy") for name in ("one", "two"))
    assert (one - two).norm() <= 1e-5 * one.norm()
