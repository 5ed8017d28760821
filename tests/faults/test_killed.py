"""Training killed with a real SIGKILL, everywhere, ends with the bytes of an undisturbed run."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from jobs import job_of
from killer import digests
from tiny import make_tiny_model

from selfplay import faults
from selfplay.train.loop import run_training
from selfplay.types import PreferencePair

# 4 steps an epoch: the checkpoint after step 2 lies within one, that after step 4 at its end
RIG: dict[str, Any] = {
    "max_steps": 5,
    "batch_size": 3,
    "save_steps": 2,
    "warmup_steps": 2,
    "lr_scheduler_type": "cosine",
}
# Passed once in every step, where nothing is different from a kill at train.step.
SAME = ("train.pack", "train.loss", "train.gradient", "train.update", "store.append")


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, pairs: Sequence[PreferencePair]) -> Any:
    folder = tmp_path_factory.mktemp("killed")
    model = make_tiny_model(folder / "model", num_hidden_layers=1)
    return job_of(folder, model, pairs, job={"keep_optimizer_state": True}, **RIG)


@pytest.fixture(scope="module")
def passed(rig: Any, tmp_path_factory: pytest.TempPathFactory) -> Counter[str]:
    """How often an undisturbed run passes each point; its files lie in rig.out."""
    listing = tmp_path_factory.mktemp("points") / "list"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(faults.VARIABLE, f"list={listing}")
        run_training(rig)
    return Counter(listing.read_text().split())


def killed(rig: Any, plans: list[list[str]], folder: Path) -> dict[str, Any]:
    """What killer.py says of each plan, which is a list of faults, one for each attempt."""
    spec = {"job": asdict(rig), "faults": plans, "folder": str(folder / "runs")}
    (folder / "spec.json").write_text(json.dumps(spec))
    script = [sys.executable, str(Path(__file__).with_name("killer.py"))]
    roots = [str(Path(faults.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}
    subprocess.run([*script, str(folder / "spec.json"), str(folder / "result.json")], check=True, env=environment)
    results: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return results


def test_every_point_in_the_source_is_passed_by_a_small_run(passed: Counter[str]) -> None:
    source = Path(faults.__file__).parent
    points = {
        point for file in source.rglob("*.py") for point in re.findall(r'faults\.hit\("(.+?)"\)', file.read_text())
    }
    assert passed.keys() == points
    for point in ("train.step", "train.updated", "train.boundary", *SAME):
        assert passed[point] == 5


def test_training_killed_anywhere_ends_with_the_same_bytes(rig: Any, passed: Counter[str], tmp_path: Path) -> None:
    wanted = digests(Path(rig.out))
    assert {"policy/model.safetensors", "train/steps.jsonl", "train/result.json"} <= wanted.keys()
    plans = [[f"{point}@{n}=kill9"] for point in passed for n in range(1, 2 if point in SAME else passed[point] + 1)]
    # twice: while the second attempt writes its first checkpoint, and in its first step
    plans += [["train.step@3=kill9", "store.folder.temporary@1=kill9"], ["train.step@5=kill9", "train.updated@1=kill9"]]
    results = killed(rig, plans, tmp_path)
    assert len(results) == len(plans) > 40
    for fault, result in results.items():
        assert result["codes"] == [-9] * (len(result["codes"]) - 1) + [0], fault
        assert result["files"] == wanted, fault
