"""One process works on a run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from selfplay.errors import LockedError
from selfplay.lock import locked


def test_a_second_process_is_refused_with_the_first_ones_number(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom selfplay.lock import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    run = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=rf"process {holder.pid} works on this run"), locked(run):
            pass
        holder.communicate()
    with locked(run):
        assert (run / ".lock").read_text() == str(os.getpid())
        with pytest.raises(LockedError, match=str(os.getpid())), locked(run):
            pass
    with locked(run):
        pass
