"""accelerate's launcher in a process that ends with the one that trains: its own processes watch it and end with it.

    python -m selfplay.train.ranks PARENT_PID FAILED.json [arguments of accelerate launch]

Under srun, one on each machine: which machine it is says SLURM. FAILED.json, which is written where a process failed, names
it: {"rank": ..., "code": its exit code, or minus the signal that ended it}.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from selfplay.generators.child import die_with

LAUNCHER = "SELFPLAY_LAUNCHER"  # the environment variable that tells a process the id of its launcher


def main(failed: Path, arguments: list[str]) -> int:
    """The exit code: 1 where a process failed."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    machine = ["--machine_rank", os.environ["SLURM_NODEID"]] if "--main_process_ip" in arguments else []
    sys.argv = ["accelerate-launch", *machine, *arguments]  # accelerate looks there for what was given
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ["PYTHONSAFEPATH"] = "1"  # it starts them with -m, which would import from the user's folder
    try:
        launch_command(launch_command_parser().parse_args([*machine, *arguments]))
    except (ChildFailedError, subprocess.CalledProcessError) as error:
        if isinstance(error, ChildFailedError):
            # a process that was killed comes first, since those that lost it fail in the same moment; one that was
            # terminated last, since the launcher does that to those that are left
            ended = [(found.exitcode, rank) for rank, found in error.failures.items()]
            code, rank = min(ended, key=lambda one: (one[0] == -signal.SIGTERM, one))
        else:  # the only one
            code, rank = error.returncode, 0
        with (
            contextlib.suppress(FileExistsError),
            failed.open("x") as file,
        ):  # of several machines the first one names it
            json.dump({"rank": rank, "code": code}, file)
        return 1
    return 0


if __name__ == "__main__":
    if "--main_process_ip" not in sys.argv:  # with SLURM the parent may be on another machine, and SLURM ends us
        threading.Thread(target=die_with, args=(int(sys.argv[1]),), daemon=True).start()
    sys.exit(main(Path(sys.argv[2]), sys.argv[3:]))
