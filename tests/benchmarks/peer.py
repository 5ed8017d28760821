"""One timed run of one peer, in a process of its own: `python peer.py PEER WORK MODEL DTYPE` prints one JSON line."""

import json
import os
import sys
import warnings
from pathlib import Path

import torch

KIB = 1024


def main(peer: str, name: str, model: str, dtype: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    from peers import PEERS
    from work import make_work

    before = _resident()
    seconds = PEERS[peer](model, make_work(name), dtype == "bf16")
    # what importing took is no peer's doing
    print(json.dumps({"seconds": seconds, "peak_bytes": _peak() - before}))


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * KIB


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


if __name__ == "__main__":
    main(*sys.argv[1:])
