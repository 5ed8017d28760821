"""What runs the checks of other packages: `python -m selfplay.judges.checks.child KIND...`. See elsewhere.py, which starts it.

A JSON line comes in for each text, {"kind", "args", "text", "gold"}, and one goes out: {"value"} or {"none": why}. Without
"text" the check's arguments and the gold answer are looked at, and {"fault"} goes out, empty where there is none. What a
package does beside that, loops or memory or an exception, ends this process and nothing else.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfplay.judges.checks.foreign import FOREIGN
from selfplay.judges.checks.verdict import NoVerdictError

# What the checks may take beside what the packages themselves take, so that a huge power doesn't take the machine down.
MEMORY_BYTES = 4 << 30


def main(kinds: list[str]) -> None:
    # Packages print; the pipe is for verdicts alone.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # Not Python's handler, which a long computation in C would keep waiting: the system ends the process.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for kind in kinds:
        FOREIGN[kind].load()
    _limit_memory()
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, asked["seconds"])
        reply = _reply(asked)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies, flush=True)


def _reply(asked: Mapping[str, Any]) -> dict[str, Any]:
    check = FOREIGN[asked["kind"]]
    if "text" not in asked:
        return {"fault": check.fault(asked["gold"], **asked["args"])}
    try:
        return {"value": float(check.value(asked["text"], asked["gold"], **asked["args"]))}
    except NoVerdictError as error:
        return {"none": str(error)}


def _limit_memory() -> None:
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        if most == resource.RLIM_INFINITY or limit < most:
            resource.setrlimit(resource.RLIMIT_AS, (limit, most))


if __name__ == "__main__":
    main(sys.argv[1:])
