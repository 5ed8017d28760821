"""One timed run of one peer, in a process of its own: `python peer.py PEER WORK SETUP` prints one JSON line."""

import gc
import json
import os
import sys
import warnings
from pathlib import Path

import torch
from machine import Setup, missing, release

KIB = 1024


def main(peer: str, name: str, told: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    from peers import PEERS, needs
    from work import make_work, one_step

    setup = Setup(**json.loads(told))
    if reason := missing(needs(peer, setup)):
        print(json.dumps({"left_out": reason}))
        return
    run, work = PEERS[peer], make_work(name, times=setup.times)
    try:
        if setup.device == "cuda":
            run(setup, one_step(work))  # kernels are chosen and compiled at their first use
            gc.collect()
            release(setup)
            torch.cuda.reset_peak_memory_stats()
            seconds = run(setup, work)
            print(json.dumps({"seconds": seconds, "peak_bytes": torch.cuda.max_memory_allocated()}))
        else:
            before = resident()
            seconds = run(setup, work)
            # what importing took is no peer's doing
            print(json.dumps({"seconds": seconds, "peak_bytes": peak() - before}))
    except torch.OutOfMemoryError:
        print(json.dumps({"left_out": "out of memory"}))


def resident() -> int:
    """Bytes that this process holds."""
    return _status("VmRSS")


def peak() -> int:
    """The most that it has held."""
    return _status("VmHWM")


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * KIB


if __name__ == "__main__":
    main(*sys.argv[1:])
