"""The benchmark `round`: from nothing to the next policy, imports and engine start included; one run of one peer.

    python whole_round.py PEER SETUP      prints one JSON line

16 prompts x 4 completions of up to 96 tokens, judged by rules.py, two pairs a prompt, one epoch in steps of 8 pairs.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from flops import padded_flops, shared_flops
from generation import PROMPTS
from machine import Setup, missing, write_weights
from rules import BATCH_SIZE, MAX_PAIRS, MAX_TOKENS, NUM_COMPLETIONS, NUM_PROMPTS
from work import BETA, LEARNING_RATE

from selfplay import store
from selfplay.types import PreferencePair

HERE = Path(__file__).parent
PEERS = {"selfplay": (), "rival": ("vllm", "trl", "datasets"), "spin-shaped": ("trl", "datasets")}
KINDS = {"rival": "tuned", "spin-shaped": "spin"}


def ours(setup: Setup, prompts: Path, folder: Path) -> dict[str, Any]:
    """`selfplay iterate` with a recipe of one round and no panel."""
    recipe = {
        "model": setup.model,
        "rounds": 1,
        "prompts": {"source": str(prompts), "num_prompts": NUM_PROMPTS},
        "generator": {"num_completions": NUM_COMPLETIONS, "max_tokens": MAX_TOKENS},
        "judge": {"kind": "python", "target": f"{HERE / 'rules.py'}:shorter"},
        "pairs": {
            "kind": "top_k_vs_bottom_k",
            "k": NUM_COMPLETIONS // 2,
            "max_pairs_per_prompt": MAX_PAIRS,
            "truncated": "judged",
        },
        "train": {
            "learning_rate": LEARNING_RATE,
            "beta": BETA,
            "batch_size": BATCH_SIZE,
            "lr_scheduler_type": "constant",
            "optim": setup.optim,
            "bf16": setup.bf16,
            "save_dtype": "bfloat16" if setup.is_random else "float32",
        },
    }
    path, run = folder / "recipe.yaml", folder / "run"
    path.write_text(json.dumps(recipe))  # which is YAML as well
    _program(["-m", "selfplay", "iterate", str(path), "--out", str(run), "--allow-code"])
    played = run / "round-000"
    pairs = store.read_records(played / "pairs.jsonl", PreferencePair)
    return {
        "stages": store.read_json(played / "seconds.json"),
        "num_pairs": len(pairs),
        "generator": store.read_bytes(run / "recipe.yaml").decode().partition("generator:\n  kind: ")[2].split()[0],
        "pairs": pairs,
    }


def work_of(setup: Setup, pairs: list[PreferencePair]) -> dict[str, float]:
    """The FLOPs that training on these pairs needs, and those of a trainer of padded rows."""
    from training import model_size

    size = model_size(setup)
    return {
        "least_flops": shared_flops(size, pairs, reference_pass=True),
        "padded_flops": padded_flops(size, pairs, batch_size=1, reference_pass=True),
    }


def theirs(kind: str, setup: Setup, prompts: Path, folder: Path) -> dict[str, Any]:
    """One of rival.py."""
    printed = _program([str(HERE / "rival.py"), kind, setup.as_argument(), str(prompts), str(folder)])
    result: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return result


def _program(arguments: list[str]) -> str:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


def main(peer: str, told: str) -> None:
    """Times one peer, from the start of its process to its end."""
    setup = Setup(**json.loads(told))
    if reason := missing(PEERS[peer]):
        print(json.dumps({"left_out": reason}))
        return
    write_weights(setup)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = folder / "prompts.jsonl"
        rows = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()[:NUM_PROMPTS]]
        prompts.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
        started = time.perf_counter()
        found = ours(setup, prompts, folder) if peer == "selfplay" else theirs(KINDS[peer], setup, prompts, folder)
        seconds = time.perf_counter() - started
        # counting FLOPs builds the model's shapes: seconds that are no part of a round
        work = [work_of(setup, found.pop("pairs"))] if "pairs" in found else []
        print(json.dumps({"seconds": seconds, **found, **({"work": work} if work else {})}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
