"""The benchmarks' own arithmetic, without timing anything."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
PROGRAM = 'import json, sys; print(json.dumps({"seconds": 1.0, "peer": sys.argv[1]}))'


def ask(code: str) -> str:
    """What code prints that sees the benchmarks' modules, which write to a folder of their own."""
    with tempfile.TemporaryDirectory() as out:
        before = f"import machine, pathlib; machine.OUT = pathlib.Path({out!r})\n"
        command = [sys.executable, "-c", before + code, PROGRAM]
        done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_peers_run_in_turn_and_what_time_does_not_allow_is_named_in_one_line() -> None:
    code = (
        "import sys; from measured import interleaved\n"
        "commands = {name: ['-c', sys.argv[1], name] for name in 'abc'}\n"
        "out = []\n"
        "for seconds in (1e9, 0):\n"
        "    found, left = interleaved(commands, 3, seconds=seconds, extra='c')\n"
        "    out.append([{k: len(v) for k, v in found.items()}, left])\n"
        "print(out)"
    )
    left = ["runs 2 and 3 of a and b; runs 1, 2 and 3 of c (no time)"]
    assert ask(code) == str([[{"a": 3, "b": 3, "c": 3}, []], [{"a": 1, "b": 1}, left]])


def test_what_a_headline_needs_is_repeated_first_and_an_extra_peer_counts_as_the_longest() -> None:
    code = (
        "import measured\n"
        "now, asked = [0.0], []\n"
        "measured.time.monotonic = lambda: now[0]\n"
        "def once(name, command, *, device):\n"
        "    asked.append(name); now[0] += 10.0 if name == 'a' else 1.0\n"
        "    return {'seconds': 1.0}\n"
        "measured.once = once\n"
        "left = [measured.interleaved({'a': [], 'b': [], 'c': []}, 2, seconds=s, extra='c')[1] for s in (23.0, 20.0)]\n"
        "print(''.join(asked), left)"
    )
    # 23 seconds: a, b and c take 12, so a and b fit once more, and c does not; of 20 c might take 10 from 11 on
    left = [["run 2 of c (no time)"], ["run 2 of a; runs 1 and 2 of c (no time)"]]
    assert ask(code) == f"abcababb {left}"


def test_the_seconds_of_the_set_are_below_half_an_hour_with_what_is_around_them() -> None:
    code = (
        "from bench import IDS, SECONDS, shares, the_set; from training import HEADLINE, OTHERS, SAME_WORK\n"
        "from peers import PEERS; from work import make_work\n"
        "ids = the_set(full=False, is_random=False)\n"
        "print(set(IDS) == set(SECONDS), set(IDS) - set(ids), 26 * 60 < sum(shares(ids).values()) <= 27 * 60,\n"
        "      shares(['memory']) == {'memory': SECONDS['memory']}, shares(ids)['memory'] == 0,\n"
        "      all(name in PEERS for names in OTHERS.values() for name in (*HEADLINE, *names)),\n"
        "      all(make_work(id) == make_work(same) for id, same in SAME_WORK.items()))"
    )
    assert ask(code) == "True {'memory-double'} True True True True True"


def test_memory_is_read_off_the_runs_of_train_pair_where_they_are_known() -> None:
    code = (
        "import measured, peers, training\n"
        "from flops import Size\n"
        "asked = []\n"
        "def once(name, command, *, device):\n"
        "    asked.append(name)\n"
        "    return {'seconds': 2.0, 'peak_bytes': 8 if name == 'selfplay' else 12}\n"
        "measured.once = once\n"
        "training.gradient_check = lambda id, setup: 0.0\n"
        "training.model_size = lambda setup: Size(100, 10)\n"
        "def run(id, before=()): return training.measure(id, 1, 1e9, budget=1e9, full=False, before=before)\n"
        "pair = run('train-pair'); of_pair = len(asked)\n"
        "known = run('memory', [pair]); again = len(asked)\n"
        "alone = run('memory')\n"
        "print(of_pair, again, asked[again:], [(r['ratio_tuned'], r['measures'], r['counts']) for r in (pair, known, alone)])"
    )
    rows = [(1.0, "seconds", True), (1.5, "peak_bytes", True), (1.5, "peak_bytes", True)]
    assert ask(code) == f"5 5 ['selfplay', 'trl tuned', 'trl default'] {rows}"


def test_a_peer_that_can_not_run_is_asked_once_and_named_with_the_reason() -> None:
    code = (
        "import measured\n"
        "asked = []\n"
        "def once(name, command, *, device):\n"
        "    asked.append(name)\n"
        "    return {'left_out': 'vllm not installed'} if name == 'b' else {'seconds': 1.0}\n"
        "measured.once = once\n"
        "found, left = measured.interleaved({'b': [], 'a': []}, 2, seconds=1e9)\n"
        "print({k: len(v) for k, v in found.items()}, left, asked)"
    )
    assert ask(code) == "{'a': 2} ['b: vllm not installed'] ['b', 'a', 'a']"


def test_a_peer_that_fails_is_asked_once_and_loses_neither_the_others_nor_the_runs_before_it(tmp_path: Path) -> None:
    log = tmp_path / "new" / "runs.jsonl"
    code = (
        "import pathlib, sys; from measured import interleaved\n"
        "commands = {'a': ['-c', sys.argv[1], 'a'], 'b': ['-c', 'raise ValueError(7)'], 'c': ['-c', sys.argv[1], 'c']}\n"
        f"found, left = interleaved(commands, 2, seconds=1e9, log=pathlib.Path({str(log)!r}))\n"
        "print({k: len(v) for k, v in found.items()}, left)"
    )
    assert ask(code) == "{'a': 2, 'c': 2} ['b: failed: ValueError: 7']"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(row["peer"], row["run"]) for row in rows] == [("a", 1), ("b", 1), ("c", 1), ("a", 2), ("c", 2)]
    assert [row.get("left_out") for row in rows] == [None, "failed: ValueError: 7", None, None, None]


def test_nothing_is_begun_after_the_seconds_of_a_slice_and_a_failure_is_in_the_exit_code(tmp_path: Path) -> None:
    code = (
        "import argparse, pathlib, sys, bench\n"
        "from machine import Setup\n"
        "now, budgets = [0.0], []\n"
        "bench.time.monotonic = lambda: now[0]\n"
        f"bench.OUT = pathlib.Path({str(tmp_path)!r})\n"
        "bench.make_setup = lambda device, size, optim: Setup('m', device, size, optim or 'adamw_torch')\n"
        "bench.gemm_rate = lambda device: 1e9\n"
        "for name in ('print_training', 'print_others', 'print_left_out'): setattr(bench, name, lambda *given: None)\n"
        "def measured(id, *given, budget, **others):\n"
        "    budgets.append(budget); now[0] += 300.0\n"
        "    return {'id': id, 'left_out': ['naive: failed: it'] if id == 'memory-double' else []}\n"
        "bench.measured = measured\n"
        "def run(*given):\n"
        "    sys.argv = ['bench.py', *given, '--full', '--size', 'tiny', '--optim', 'rmsprop']\n"
        "    try: bench.main()\n"
        "    except SystemExit as end: return bool(end.code)\n"
        "ends = [run('train-pair', 'memory-double', 'scale', '--seconds', '500'), run('train-pair')]\n"
        "print(budgets, ends)"
    )
    assert ask(code) == "[500.0, 200.0, inf] [True, False]"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["memory-double-tiny.json", "train-pair-tiny.json"]
    assert json.loads((tmp_path / "train-pair-tiny.json").read_text())["setup"]["optim"] == "rmsprop"


def test_gradients_are_compared_without_the_package_of_an_optimizer() -> None:
    code = (
        "import machine\n"
        "machine.model_folder = lambda size, **given: size\n"
        "setup = machine.make_setup('cuda', '8b')\n"
        "print(setup.optim, machine.checked(setup).optim, machine.make_setup('cuda', '8b', 'adamw_torch').optim)"
    )
    assert ask(code) == "adamw_bnb_8bit adamw_torch adamw_torch"


def test_the_packages_that_a_peer_needs_are_known_before_it_runs() -> None:
    code = (
        "from machine import Setup, missing; from peers import PEERS, needs, peers_on\n"
        "eight = Setup('m', 'cuda', '8b', 'adamw_bnb_8bit')\n"
        "print(needs('trl default', Setup('m')), needs('selfplay', eight), missing(('json', 'no_such_package')), \n"
        "      all(name in PEERS for device in ('cpu', 'cuda') for name in peers_on(device)))"
    )
    assert ask(code) == "('trl', 'datasets') ('bitsandbytes',) no_such_package not installed True"


def test_a_gpu_gets_more_pairs_a_step_and_the_least_work_grows_with_them() -> None:
    code = (
        "from work import make_work, one_step; from flops import Size, shared_flops, padded_flops\n"
        "size = Size(100, 10)\n"
        "def least(work): return shared_flops(size, work.pairs, reference_pass=True)\n"
        "once, twice = (make_work('train-group-m6', times=n) for n in (1, 2))\n"
        "print(len(once.pairs), len(twice.pairs), twice.pairs_per_step, len(one_step(twice).pairs),\n"
        "      once.pairs[0] == twice.pairs[0], least(twice) == 2 * least(once),\n"
        "      least(once) == 8.0 * (100 * 3 * (256 + 4 * 128) + 10 * 3 * 4 * 128),\n"
        "      padded_flops(size, once.pairs, batch_size=1, reference_pass=True) == 8.0 * 110 * 18 * 2 * 384)"
    )
    assert ask(code) == "18 36 12 12 True True True True"


def test_the_round_benchmark_pairs_as_selfplay_does() -> None:
    code = (
        "import random; from rules import MAX_PAIRS, choose, score\n"
        "from selfplay.pairs import TopKVsBottomK; from selfplay.types import Completion, Group, Judgement, Message, Prompt\n"
        "draw, same = random.Random(0), []\n"
        "for _ in range(50):\n"
        "    texts = ['x' * n for n in draw.sample(range(1, 1000), 4)]\n"
        "    scores = [score(text) for text in texts]\n"
        "    group = Group(Prompt('p', (Message('user', 'q'),)), (1,), tuple(Completion(t, (len(t), 2)) for t in texts))\n"
        "    pairs = TopKVsBottomK(2, 0.0, MAX_PAIRS).select(group, Judgement('p', tuple(scores)))\n"
        "    edges = [(p.chosen_index, p.rejected_index) for p in pairs]\n"
        "    same.append(len(edges) == 2 and edges == choose(scores, max_pairs=MAX_PAIRS))\n"
        "print(all(same))"
    )
    assert ask(code) == "True"


def test_a_scale_is_flat_and_linear_or_says_that_it_is_not() -> None:
    code = (
        "from wholes import scaled\n"
        "def row(seconds, mib): return [{'cpu_seconds': seconds, 'peak_bytes': mib * 2**20}]\n"
        "good = scaled({'100 prompts': row(50.0, 120), '10 prompts': row(5.0, 100)})\n"
        "bad = scaled({'10 prompts': row(5.0, 100), '100 prompts': row(60.0, 200)})\n"
        "print([(r['is_flat'], r['is_linear'], r['ratios']) for r in (good, bad)])"
    )
    assert ask(code) == "[(True, True, {'100 prompts': 1.0}), (False, False, {'100 prompts': 1.2})]"


def test_every_result_has_the_same_keys_and_a_peer_that_was_left_out_has_no_ratio() -> None:
    code = (
        "import io, bench, measured, tables, training, wholes\n"
        "from flops import Size\n"
        "from rich.console import Console\n"
        "row = {'seconds': 2.0, 'cpu_seconds': 2.0, 'peak_bytes': 8, 'tokens': 4, 'stages': {'train': 1.0, 'sample': 0.5}}\n"
        "row['work'] = [{'least_flops': 1.0, 'padded_flops': 2.0}]\n"
        "absent = set()\n"
        "def once(name, command, *, device): return {'left_out': 'not installed'} if name in absent else dict(row)\n"
        "measured.once = once\n"
        "training.gradient_check = lambda id, setup: 0.0\n"
        "training.model_size = lambda setup: Size(100, 10)\n"
        "def every(budget):\n"
        "    return [training.measure('train-pair', 2, 1e9, budget=budget),\n"
        "            wholes.measure_engines('judge', 2, budget=budget), wholes.measure_round(2, 1e9, budget=budget),\n"
        "            wholes.measure_scale(1, budget=budget, full=False)]\n"
        "kept = {'ratio_tuned', 'ratio_default', 'bound', 'percent_of_limit', 'gradient_check', 'id', 'measures'}\n"
        "kept |= {'peers', 'versions', 'left_out'}\n"
        "whole, short = every(1e9), every(0)\n"
        "absent |= {'selfplay', 'judge', '10000 prompts', '100000 prompts'}\n"
        "without = every(1e9)\n"
        "text = io.StringIO()\n"
        "for results in (whole, short, without):\n"
        "    console = Console(file=text, width=200)\n"
        "    tables.print_training(results[:1], console)\n"
        "    tables.print_others(results[1:], console)\n"
        "    tables.print_left_out(results, console)\n"
        "results = [*whole, *short, *without]\n"
        "shown = text.getvalue()\n"
        "print(all(kept <= set(r) for r in results), [r['ratio_tuned'] for r in results],\n"
        "      [r['ratio_default'] for r in results], whole[2]['bound'],\n"
        "      'left out: selfplay: not installed' in shown, 'Traceback' in shown)"
    )
    ratios = [1.0, 1.0, 1.0, None, 1.0, 1.0, 1.0, None, *[None] * 4]  # what a headline needs is run without time too
    others = [1.0, None, 1.0, None, *[None] * 8]
    assert ask(code) == f"True {ratios} {others} {2.0 / 1.5} True False"


@pytest.mark.slow
def test_the_smallest_size_runs_through_every_trainer_on_the_cpu(tmp_path: Path) -> None:
    """The code path of a GPU's random weights, each peer's own program, in one process to import once."""
    code = (
        "import contextlib, io, json, pathlib, machine, measured, peer, training\n"
        f"machine.OUT = pathlib.Path({str(tmp_path)!r})\n"
        "def once(name, command, *, device):\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as printed:\n"
        "        peer.main(*command[1:])\n"
        "    return json.loads(printed.getvalue().splitlines()[-1])\n"
        "measured.once = once\n"
        "import peers; peers.peers_on = lambda device: ('selfplay', 'trl tuned, batch 4', 'trl default', 'naive')\n"
        "found = training.measure('train-group-m3', 1, 1e9, budget=1e9, setup=machine.make_setup('cpu', 'tiny'))\n"
        "print(found['counts'], found['tuned'], list(found['peers']), found['left_out'])"
    )
    assert ask(code) == "True trl tuned, batch 4 ['selfplay', 'trl tuned, batch 4', 'trl default', 'naive'] []"
