"""accelerate's launcher in a process that ends with the one that trains: its own processes watch it and end with it.

    python -m selfplay.train.ranks PARENT_PID [arguments of accelerate launch]

Under srun, one on each machine: which machine it is says SLURM.
"""

import os
import sys
import threading

from selfplay.generators.child import die_with


def main(arguments: list[str]) -> int:
    """The exit code: 1 where a process failed, which has said why."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    machine = ["--machine_rank", os.environ["SLURM_NODEID"]] if "--main_process_ip" in arguments else []
    sys.argv = ["accelerate-launch", *machine, *arguments]  # accelerate looks there for what was given
    try:
        launch_command(launch_command_parser().parse_args([*machine, *arguments]))
    except ChildFailedError:
        return 1
    return 0


if __name__ == "__main__":
    if "--main_process_ip" not in sys.argv:  # with SLURM the parent may be on another machine, and SLURM ends us
        threading.Thread(target=die_with, args=(int(sys.argv[1]),), daemon=True).start()
    sys.exit(main(sys.argv[2:]))
