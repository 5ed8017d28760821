"""A process that trains with others and meddles, in place of selfplay.train.rank: `python -m meddler JOB.json RESULT.json`.

MEDDLE says what it does in its second step: "int" sends the command that started all of them a Ctrl-C, and goes on when the
request to stop has come back; "kill" kills that command, and hangs; "hasty" loses patience with the others after 10 seconds.
"""

import os
import signal
import sys
from datetime import timedelta
from typing import Any

import psutil

from selfplay.train import rank, world
from selfplay.train.trainer import Trainer

step = Trainer.step


def meddle(trainer: Trainer, *arguments: Any, number: int, check_zero: bool) -> dict[str, float]:
    if number == 2 and trainer.world.is_first:
        command = psutil.Process(os.getppid()).ppid()  # the launcher's parent
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)  # whichever thread gets the signal
        os.kill(command, signal.SIGINT if os.environ["MEDDLE"] == "int" else signal.SIGKILL)
        os.read(read, 1)
        signal.set_wakeup_fd(-1)
    return step(trainer, *arguments, number=number, check_zero=check_zero)


if __name__ == "__main__":
    if os.environ["MEDDLE"] == "hasty":
        world.PATIENCE = timedelta(seconds=10)
    else:
        Trainer.step = meddle  # type: ignore[method-assign]
    sys.exit(rank.main(sys.argv[1], sys.argv[2]))
