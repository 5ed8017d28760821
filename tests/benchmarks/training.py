"""The training benchmarks: selfplay against TRL and a naive loop, on the same pairs, weights and steps."""

import statistics
import time
from pathlib import Path

import torch
from flops import Size, padded_flops, shared_flops
from runs import MODEL, Result, interleaved, ratio, versions
from work import make_work

TRAINING = ("train-pair", "train-long-prompt", "train-group-m3", "train-group-m6")
MEMORY = ("memory", "memory-double")
# what matters most comes first: the last ones are left out where time runs short
PEERS = ("selfplay", "trl tuned", "selfplay, engine logps", "trl default", "naive")
GRADIENT_BOUND = 1e-4  # relative L2, fp32
PROGRAM = Path(__file__).with_name("peer.py")


def measure(id: str, runs: int, rate: float, *, budget: float) -> Result:
    """Times all peers of a benchmark. Ratios are of seconds (of peak bytes for memory): theirs / ours. `rate` is that of
    bf16 matrix products here, FLOPs per second.
    """
    check = gradient_check(id)
    print(f"{id}: gradient check {check:.1e} ({'ok' if check <= GRADIENT_BOUND else 'FAILED: ratios do not count'})")
    commands = {name: [str(PROGRAM), name, id, str(MODEL), "bf16"] for name in PEERS}
    found, left_out = interleaved(commands, runs, seconds=budget)
    key = "peak_bytes" if id in MEMORY else "seconds"
    middle = {name: statistics.median(r[key] for r in rows) for name, rows in found.items()}
    size, work = model_size(), make_work(id)
    least = shared_flops(size, work.pairs, reference_pass=True)
    theirs = padded_flops(size, work.pairs, batch_size=1, reference_pass=True)
    seconds = statistics.median(r["seconds"] for r in found["selfplay"])
    return {
        "id": id,
        "measures": key,
        "ratio_tuned": ratio(middle.get("trl tuned"), middle["selfplay"]),
        "ratio_tuned_engine_logps": ratio(middle.get("trl tuned"), middle["selfplay, engine logps"])
        if "selfplay, engine logps" in middle
        else None,
        "ratio_default": ratio(middle.get("trl default"), middle["selfplay"]),
        "ratio_naive": ratio(middle.get("naive"), middle["selfplay"]),
        "left_out": left_out,
        "bound": theirs / least if id not in MEMORY else None,
        "percent_of_limit": 100 * least / (seconds * rate),
        "gemm_flops_per_second": rate,
        "gradient_check": check,
        "counts": check <= GRADIENT_BOUND,
        "peers": found,
        "versions": versions(),
    }


def gradient_check(id: str) -> float:
    """Relative L2 distance of the first step's gradient from that of plain rows and two models, fp32."""
    from peers import gradient_of_naive, gradient_of_ours

    work = make_work(id)
    own, plain = gradient_of_ours(str(MODEL), work), gradient_of_naive(str(MODEL), work)
    return float((own - plain).norm() / plain.norm())


def model_size() -> Size:
    """Of the benchmark's model: decoder weights without embeddings, and the head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(MODEL)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = config.vocab_size * config.hidden_size
    embeddings = head if config.tie_word_embeddings else 2 * head
    return Size(sum(p.numel() for p in model.parameters()) - embeddings, head)


def gemm_rate() -> float:
    """FLOPs per second of bf16 matrix products of this model's kind, the best of several: the limit to be judged by."""
    left, right = (torch.randn(1536, 1536).bfloat16() for _ in range(2))

    def once() -> float:
        started = time.perf_counter()
        for _ in range(10):
            left @ right
        return 10 * 2 * 1536**3 / (time.perf_counter() - started)

    once()
    return max(once() for _ in range(5))
