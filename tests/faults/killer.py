"""Kills training jobs with a real SIGKILL, at the points that stand in a file, and goes on with them.

    python killer.py SPEC.json RESULT.json

Each attempt runs in a fork of this process, which has torch loaded and has never run a backward pass: a fork costs
a third of a second where a new interpreter costs five. RESULT maps each fault to how its killed attempt ended (minus a signal,
or an exit code), how the one that went on ended, and the digests of all files then.
"""

import contextlib
import hashlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def main(spec_file: str, result_file: str) -> None:
    from selfplay.faults import InjectedError

    spec = json.loads(Path(spec_file).read_text())
    os.fsync = lambda handle: None  # what a killed process wrote stays in the system's cache
    with contextlib.suppress(InjectedError):  # imports all that a job imports, and computes what it computes before
        train(spec["job"], Path(spec["folder"]) / "imports", "train.pack@1=raise")
    results = {}
    for number, faults in enumerate(spec["faults"]):
        out = Path(spec["folder"]) / f"{number:03d}"
        codes = [attempt(spec["job"], out, fault) for fault in faults]
        results["+".join(faults)] = {"codes": [*codes, attempt(spec["job"], out, None)], "files": digests(out)}
    Path(result_file).write_text(json.dumps(results))


def attempt(job: dict[str, Any], out: Path, fault: str | None) -> int:
    """Exit code of one run of the job, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(job, out, fault)
            code = 0
        except BaseException:  # what a fork does not report is lost
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(job: dict[str, Any], out: Path, fault: str | None) -> None:
    from selfplay import faults, store
    from selfplay.train.loop import run_training
    from selfplay.train.settings import TrainJob, TrainSettings

    if fault is not None:
        os.environ[faults.VARIABLE] = fault
    store.sweep(out)
    if not (out / "policy").exists():
        settings = TrainSettings(**job["settings"])
        run_training(TrainJob(**{**job, "out": str(out), "groups": (), "settings": settings}))
    store.remove_folder(out / "train" / "checkpoints")


def digests(out: Path) -> dict[str, str]:
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
