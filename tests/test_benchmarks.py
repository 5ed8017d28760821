"""The benchmarks' own arithmetic, without timing anything."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent / "benchmarks"
PROGRAM = 'import json, sys; print(json.dumps({"seconds": 1.0, "peer": sys.argv[1]}))'


def ask(code: str) -> str:
    """What code prints that sees the benchmarks' modules."""
    command = [sys.executable, "-c", code, PROGRAM]
    return subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=True).stdout.splitlines()[-1]


def test_peers_run_in_turn_and_what_time_does_not_allow_is_named() -> None:
    code = (
        "import sys; from runs import interleaved\n"
        "commands = {name: ['-c', sys.argv[1], name] for name in 'ab'}\n"
        "for seconds in (1e9, 0):\n"
        "    found, left = interleaved(commands, 2, seconds=seconds)\n"
        "    out = globals().setdefault('out', []); out.append([{k: len(v) for k, v in found.items()}, left])\n"
        "print(out)"
    )
    left = ["run 1 of b", "run 2 of a", "run 2 of b"]
    assert ask(code) == str([[{"a": 2, "b": 2}, []], [{"a": 1}, left]])


def test_every_benchmark_has_its_share_of_half_an_hour() -> None:
    assert (
        ask("from bench import IDS, SECONDS; print(set(IDS) == set(SECONDS), sum(SECONDS.values()) < 1700)")
        == "True True"
    )


def test_every_result_has_the_same_keys_and_a_peer_that_was_left_out_has_no_ratio() -> None:
    code = (
        "import io, bench, training, runs\n"
        "from flops import Size\n"
        "from rich.console import Console\n"
        "row = {'seconds': 2.0, 'peak_bytes': 8, 'tokens': 4}\n"
        "runs.once = lambda name, command: dict(row)\n"
        "training.gradient_check = lambda id: 0.0\n"
        "training.model_size = lambda: Size(100, 10)\n"
        "kept = {'ratio_tuned', 'ratio_default', 'bound', 'percent_of_limit', 'gradient_check'}\n"
        "kept |= {'peers', 'versions', 'left_out'}\n"
        "whole = [training.measure('train-pair', 2, 1e9, budget=1e9), bench.measure_engines('generate', 2, budget=1e9)]\n"
        "short = [training.measure('train-pair', 2, 1e9, budget=0), bench.measure_engines('judge', 1, budget=0)]\n"
        "text = io.StringIO()\n"
        "bench.print_training([whole[0], short[0]], Console(file=text, width=200))\n"
        "bench.print_engines([whole[1], short[1]], Console(file=text, width=200))\n"
        "ratios = [r['ratio_tuned'] for r in (*whole, *short)]\n"
        "print(all(kept <= set(r) for r in (*whole, *short)), ratios, 'left out' in text.getvalue())"
    )
    assert ask(code) == "True [1.0, 1.0, None, None] True"
