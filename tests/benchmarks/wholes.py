"""The benchmarks that are no training alone: engines, a whole round, and how a round grows with its prompts."""

import statistics
from pathlib import Path

from machine import MODEL, OUT, Setup
from measured import Result, interleaved, medians, ratio, ratio_range, versions

HERE = Path(__file__).parent
# id -> (peers, ours first; what is compared: tokens per second, or seconds)
ENGINES: dict[str, tuple[tuple[str, ...], str]] = {
    "generate": (("vllm", "transformers", "transformers.generate"), "tokens_per_second"),
    "hand-off": (("hand-off",), "seconds"),
    "judge": (("judge", "judge, rubric last"), "seconds"),
}
ROUND = ("selfplay", "rival", "spin-shaped")  # the headline is of the first two
SCALE, SCALE_FULL = (10_000, 100_000), (10_000, 100_000, 1_000_000)
FLAT_BYTES, LINEAR = 50 * 2**20, 0.1  # the goals: memory may grow by this, CPU seconds per prompt by this share
# no trainer is compared, so there is no gradient to check and no count of FLOPs
NOTHING = dict.fromkeys(("ratio_tuned", "ratio_default", "bound", "percent_of_limit", "gradient_check"))


def measure_engines(id: str, runs: int, *, budget: float, setup: Setup | None = None) -> Result:
    """Times the peers of a benchmark of engines; ratios are to the last peer, above 1 where ours is faster."""
    names, measured = ENGINES[id]
    setup = setup or Setup(str(MODEL))
    print(f"{id}:", flush=True)
    # the last peer is the one that ratios are to: it comes second
    order = (names[0], *names[:0:-1])
    commands = {name: [str(HERE / "generation.py"), name, setup.as_argument()] for name in order}
    log = OUT / f"{id}-runs.jsonl"
    found, left_out = interleaved(commands, runs, seconds=budget, device=setup.device, extra=names[1:-1], log=log)
    rows = {name: [r | {"tokens_per_second": r["tokens"] / r["seconds"]} for r in peer] for name, peer in found.items()}
    middle = medians(rows, measured)
    last = middle.get(names[-1])
    compared = [n for n in names[:-1] if n in middle and last is not None]
    ratios = {n: middle[n] / last if measured == "tokens_per_second" else last / middle[n] for n in compared}
    return {
        **NOTHING,
        "id": id,
        "measures": measured,
        "ratio_tuned": ratios.get(names[0]),
        "ratios": ratios,
        "left_out": left_out,
        "peers": rows,
        "versions": versions(),
    }


def measure_round(runs: int, rate: float, *, budget: float, setup: Setup | None = None) -> Result:
    """Times whole rounds, processes and engines included. `bound` is what the ratio to the rival would be if only training
    were faster than its own, by as much as counting FLOPs allows; percent of the limit is of our stage of training.
    """
    setup = setup or Setup(str(MODEL))
    print("round:", flush=True)
    commands = {name: [str(HERE / "whole_round.py"), name, setup.as_argument()] for name in ROUND}
    log = OUT / "round-runs.jsonl"
    found, left_out = interleaved(commands, runs, seconds=budget, device=setup.device, extra=ROUND[2:], log=log)
    middle = medians(found, "seconds")
    own = middle.get("selfplay")
    ratios = {n: theirs / own for n, theirs in middle.items() if n != "selfplay" and own is not None}
    seconds = {name: [row["seconds"] for row in rows] for name, rows in found.items()}
    spans = {name: ratio_range(seconds[name], seconds["selfplay"]) for name in ratios}
    stages = {name: _stages(rows) for name, rows in found.items()}
    work = [one for row in found.get("selfplay", ()) for one in row["work"]]
    least, padded = (
        (statistics.median(one[k] for one in work) for k in ("least_flops", "padded_flops")) if work else (0, 0)
    )
    rival, theirs = middle.get("rival"), stages.get("rival")
    return {
        **NOTHING,
        "id": "round",
        "measures": "seconds",
        "ratio_tuned": ratio(rival, own),
        "ratio_default": ratio(middle.get("spin-shaped"), own),
        "bound": rival / (rival - theirs["train"] * (1 - least / padded)) if work and rival and theirs else None,
        "percent_of_limit": 100 * least / (stages["selfplay"]["train"] * rate) if work else None,
        "ratios": ratios,
        "ratio_ranges": spans,
        "left_out": left_out,
        "peers": found,
        "stages": stages,
        "notes": [
            f"{name}: seconds of " + ", ".join(f"{k} {v:.1f}" for k, v in s.items()) for name, s in stages.items()
        ],
        "versions": versions(),
    }


def _stages(rows: list[Result]) -> dict[str, float]:
    """Median seconds of every stage, and of what lies between and around them: starting Python, importing, opening the run."""
    names = list(rows[0]["stages"])
    found = {name: statistics.median(row["stages"][name] for row in rows) for name in names}
    rest = statistics.median(row["seconds"] - sum(row["stages"].values()) for row in rows)
    return found | {"the rest": rest}


def measure_scale(runs: int, *, budget: float, full: bool) -> Result:
    """Rounds of ten times as many prompts: does memory stay, and does time grow tenfold?"""
    print("scale:", flush=True)
    sizes = SCALE_FULL if full else SCALE
    commands = {f"{size} prompts": [str(HERE / "scale.py"), str(size)] for size in sizes}
    found, left_out = interleaved(commands, runs, seconds=budget, log=OUT / "scale-runs.jsonl")
    if not full:
        left_out.append(f"{SCALE_FULL[-1]} prompts: with --full only")
    return {"versions": versions(), **scaled(found), "left_out": left_out}


def scaled(found: dict[str, list[Result]]) -> Result:
    """The figures of runs by size, the smallest first: CPU seconds per prompt over the smallest's, bytes above the smallest's.
    Seconds that pass also tell what else the machine does.
    """
    counts = {name: int(name.split()[0]) for name in found}
    seconds, bytes_ = medians(found, "cpu_seconds"), medians(found, "peak_bytes")
    in_order = sorted(found, key=counts.__getitem__)
    first, larger = in_order[:1], in_order[1:]
    ratios = {n: seconds[n] / counts[n] / (seconds[first[0]] / counts[first[0]]) for n in larger}
    growth = {name: bytes_[name] - bytes_[first[0]] for name in larger}
    notes = [
        f"{name}: {growth[name] / 2**20:+.0f} MiB ({'flat' if growth[name] <= FLAT_BYTES else 'NOT flat'}), CPU seconds per "
        f"prompt {ratios[name] - 1:+.0%} ({'linear' if ratios[name] <= 1 + LINEAR else 'NOT linear'})"
        for name in larger
    ]
    return {
        **NOTHING,
        "id": "scale",
        "measures": "cpu_seconds",
        "ratios": ratios,
        "growth_bytes": growth,
        "is_flat": all(value <= FLAT_BYTES for value in growth.values()) if growth else None,
        "is_linear": all(value <= 1 + LINEAR for value in ratios.values()) if ratios else None,
        "notes": notes,
        "peers": found,
    }
