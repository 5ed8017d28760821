"""The training benchmarks: selfplay against TRL and a naive loop, on the same pairs, weights and steps."""

import gc
import math
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from flops import Size, padded_flops, shared_flops
from machine import MODEL, OUT, Setup, checked, release
from measured import Result, interleaved, medians, ratio, ratio_range, versions
from work import make_work, one_step

TRAINING = ("train-pair", "train-long-prompt", "train-group-m3", "train-group-m6")
MEMORY = ("memory", "memory-double")
# What its headline needs, and what else a benchmark has time for; the other peers are left to --full.
HEADLINE = ("selfplay", "trl tuned")
OTHERS = {
    "train-pair": ("selfplay, engine logps", "trl default", "naive"),
    "train-long-prompt": ("selfplay, engine logps",),
    "train-group-m3": ("selfplay, engine logps",),
    "train-group-m6": ("selfplay, engine logps",),
    "memory": ("trl default",),
    "memory-double": (),
}
SAME_WORK = {"memory": "train-pair"}  # whose runs tell the bytes too
GRADIENT_BOUND = 1e-4  # relative L2, fp32
PROGRAM = Path(__file__).with_name("peer.py")
SIDES = {"cpu": 1536, "cuda": 8192}  # of the matrices that a device's rate is measured on


def measure(
    id: str,
    runs: int,
    rate: float,
    *,
    budget: float,
    full: bool = True,
    setup: Setup | None = None,
    before: Sequence[Result] = (),
) -> Result:
    """Times the peers of a benchmark: all, or those that there is time for unless `full`. Where the same work is among the
    results of `before`, nothing is run again. Ratios are of seconds (of peak bytes for memory): theirs / ours, of TRL tuned
    where that is best. `rate` is that of bf16 matrix products here, FLOPs per second.
    """
    setup = setup or Setup(str(MODEL))
    same = next((one for one in before if one["id"] == SAME_WORK.get(id)), None)
    if same is None:
        check, found, left_out = _run(id, runs, budget=budget, full=full, setup=setup)
    else:
        print(f"{id}: the runs of {same['id']}", flush=True)
        check, found, left_out = same["gradient_check"], same["peers"], same["left_out"]
    key = "peak_bytes" if id in MEMORY else "seconds"
    middle, seconds = medians(found, key), medians(found, "seconds").get("selfplay")
    own, tuned = middle.get("selfplay"), best_tuned(middle)
    size, work = model_size(setup), make_work(id, times=setup.times)
    least = shared_flops(size, work.pairs, reference_pass=True)
    theirs = padded_flops(size, work.pairs, batch_size=1, reference_pass=True)
    sides = [[row[key] for row in found.get(name or "", ())] for name in (tuned, "selfplay")]
    return {
        "id": id,
        "measures": key,
        "tuned": tuned,
        "ratio_tuned": ratio(middle.get(tuned or ""), own),
        "ratio_tuned_range": ratio_range(*sides),
        "ratio_tuned_engine_logps": ratio(middle.get(tuned or ""), middle.get("selfplay, engine logps")),
        "ratio_default": ratio(middle.get("trl default"), own),
        "ratio_naive": ratio(middle.get("naive"), own),
        "left_out": left_out,
        "bound": theirs / least if id not in MEMORY else None,
        "percent_of_limit": None if seconds is None else 100 * least / (seconds * rate),
        "gemm_flops_per_second": rate,
        "gradient_check": check,
        "counts": check <= GRADIENT_BOUND,
        "peers": found,
        "versions": versions(),
    }


def _run(
    id: str, runs: int, *, budget: float, full: bool, setup: Setup
) -> tuple[float, dict[str, list[Result]], list[str]]:
    """(the gradient check, what the peers printed, what was left out); the check counts for the seconds as well."""
    from peers import peers_on

    started = time.monotonic()
    try:
        check = gradient_check(id, setup)
    except RuntimeError:  # torch's: the peers have processes of their own, and their times are still worth having
        traceback.print_exc()
        check = math.inf
    said = "ok" if check <= GRADIENT_BOUND else "FAILED: ratios do not count"
    print(f"{id}: gradient check {check:.1e} ({said})", flush=True)
    names = peers_on(setup.device)
    asked = names if full else [name for name in names if name in (*HEADLINE, *OTHERS[id])]
    commands = {name: [str(PROGRAM), name, id, setup.as_argument()] for name in asked}
    extra = [name for name in asked if name not in HEADLINE]
    seconds = budget - (time.monotonic() - started)
    found, left_out = interleaved(
        commands, runs, seconds=seconds, device=setup.device, extra=extra, log=OUT / f"{id}-runs.jsonl"
    )
    late = [name for name in names if name not in asked]
    return check, found, [*left_out, *([f"{' and '.join(late)}: with --full only"] if late else [])]


def best_tuned(middle: Mapping[str, float]) -> str | None:
    """The peer whose settings suit TRL best; None where none was run."""
    return min((name for name in middle if name.startswith("trl tuned")), key=middle.__getitem__, default=None)


def gradient_check(id: str, setup: Setup) -> float:
    """Relative L2 distance of the first step's gradient from that of plain rows and two models, fp32."""
    from peers import gradient_of_naive, gradient_of_ours

    setup, work = checked(setup), one_step(make_work(id))
    own, plain = gradient_of_ours(setup, work), gradient_of_naive(setup, work)
    distance = float((own - plain).norm() / plain.norm())
    # the peers that come next want the device for themselves
    del own, plain
    gc.collect()
    release(setup)
    return distance


def model_size(setup: Setup) -> Size:
    """Of the setup's model: decoder weights without embeddings, and the head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(setup.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = config.vocab_size * config.hidden_size
    embeddings = head if config.tie_word_embeddings else 2 * head
    return Size(sum(p.numel() for p in model.parameters()) - embeddings, head)


def gemm_rate(device: str) -> float:
    """FLOPs per second of bf16 matrix products, the best of several: the limit to be judged by."""
    side = SIDES[device]
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))

    def once() -> float:
        started = _now(device)
        for _ in range(10):
            left @ right
        return 10 * 2 * side**3 / (_now(device) - started)

    once()
    return max(once() for _ in range(5))


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
