"""One of several processes that train together on a CPU: `python tests/ranks.py TASKS.json`, by RANK and WORLD_SIZE.

TASKS.json is a list: {"job": a TrainJob, "fsdp": whether weights are sharded, "fault": SELFPLAY_FAULT or null, "rank": whose
fault it is, null for all}. Each task is run by all processes, in order. What it raised, and what was seen of the weights, is
written to ranks-N.json of the job's folder.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from selfplay import faults
from selfplay.errors import SelfplayError
from selfplay.train.loop import run_training
from selfplay.train.progress import SILENT
from selfplay.train.settings import TrainJob, TrainSettings
from selfplay.train.trainer import Trainer
from selfplay.train.world import Sharding, World, join_world, leave_world


def spawn(folder: Path, tasks: Sequence[dict[str, Any]]) -> None:
    """Runs such tasks, whose list is written to `folder`, on two processes."""
    (folder / "tasks.json").write_text(json.dumps(tasks))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = str(Path(__file__))
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(folder / "tasks.json")],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]


def job_from(data: dict[str, Any]) -> TrainJob:
    settings = TrainSettings(**data.pop("settings"))
    return TrainJob(**{**data, "groups": tuple(data["groups"]), "settings": settings})


def run(task: dict[str, Any], world: World) -> dict[str, Any]:
    seen: dict[str, Any] = {"error": None, "sharded": 0, "rows": 0, "elements": 0}
    update = Trainer._update

    def look(trainer: Trainer, *arguments: Any) -> float:
        params = list(trainer.module.parameters())
        seen["sharded"] = sum(isinstance(p, DTensor) for p in params)
        seen["parameters"] = len(params)
        seen["elements"] = sum(p.numel() for p in params)
        seen["own"] = sum(w.numel() for w in trainer.masters.weights)
        return update(trainer, *arguments)

    Trainer._update = look  # type: ignore[method-assign]
    faults.forget()
    os.environ.pop(faults.VARIABLE, None)
    if task["fault"] and task["rank"] in (None, world.rank):
        os.environ[faults.VARIABLE] = task["fault"]
    try:
        run_training(job_from(task["job"]), SILENT, world)
    except (SelfplayError, faults.InjectedError) as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    finally:
        Trainer._update = update  # type: ignore[method-assign]
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    here = join_world(use_cpu=True, sharding=None)
    for number, given in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        sharding = Sharding() if given["fsdp"] else None
        folder = Path(given["job"]["out"]).parent
        found = run(given, dataclasses.replace(here, sharding=sharding))
        (folder / f"ranks-{number}-{here.rank}.json").write_text(json.dumps(found))
    leave_world(here)
    os._exit(0)  # as selfplay.train.rank does, and for its reason
