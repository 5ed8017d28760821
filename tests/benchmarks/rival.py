"""A round as one would write it on well-known parts: sample, judge, pair, DPOTrainer, save. The peers of the benchmark `round`.

    python rival.py KIND SETUP PROMPTS OUT

KIND "tuned" is as good as we could make it: vLLM with the settings of our own engine, TRL with the reference's logps computed
beforehand and no checkpointing. KIND "spin" has the shape of SPIN's code (arXiv:2401.01335): transformers.generate on a padded
batch, a completion of each prompt at a time, and TRL with its defaults. Sampling has a process of its own.
"""

import json
import math
import subprocess
import sys
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

from machine import Setup, new_model
from rules import BATCH_SIZE, MAX_PAIRS, MAX_TOKENS, NUM_COMPLETIONS, choose, score
from work import BETA, LEARNING_RATE

TUNED = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
QUIET: dict[str, Any] = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
SPIN_BATCH = 16  # prompts, as in SPIN's generate.py


def main(kind: str, told: str, prompts: str, out: str) -> None:
    """The whole round; prints the seconds of its stages."""
    setup, times = Setup(**json.loads(told)), [time.perf_counter()]
    groups = Path(out) / "groups.json"
    command = [sys.executable, __file__, f"sample {kind}", told, prompts, str(groups)]
    subprocess.run(command, env=_engine_environment(setup, kind), check=True, stdout=sys.stderr)
    times.append(time.perf_counter())
    pairs = judge_and_pair(json.loads(groups.read_text()))
    times.append(time.perf_counter())
    train(setup, kind, pairs, out)
    times.append(time.perf_counter())
    stages = dict(zip(("sample", "judge", "train"), (b - a for a, b in pairwise(times)), strict=True))
    print(json.dumps({"stages": stages, "num_pairs": len(pairs)}))


def sample(kind: str, setup: Setup, prompts: list[str]) -> list[dict[str, Any]]:
    """The token ids of each prompt, and the ids and texts of its completions."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(setup.model, padding_side="left")
    told = [[{"role": "user", "content": prompt}] for prompt in prompts]
    ids = [tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False) for one in told]
    drawn = (_by_vllm if kind == "tuned" else _by_transformers)(setup, tokenizer, ids)
    read = [[tokenizer.decode(one, skip_special_tokens=True).strip() for one in group] for group in drawn]
    return [{"prompt": p, "ids": c, "texts": t} for p, c, t in zip(ids, drawn, read, strict=True)]


def _by_vllm(setup: Setup, tokenizer: Any, ids: list[list[int]]) -> list[list[list[int]]]:
    from vllm import LLM, SamplingParams

    from selfplay.generators.vllm import engine_arguments

    llm = LLM(**engine_arguments(_engine_settings(setup), on_cpu=setup.device == "cpu"))
    sampling = SamplingParams(n=NUM_COMPLETIONS, temperature=1.0, max_tokens=MAX_TOKENS, seed=1)
    found = llm.generate([{"prompt_token_ids": one} for one in ids], sampling, use_tqdm=False)
    return [[list(one.token_ids) for one in group.outputs] for group in found]


def _by_transformers(setup: Setup, tokenizer: Any, ids: list[list[int]]) -> list[list[list[int]]]:
    import torch

    torch.manual_seed(1)
    policy = new_model(setup, torch.bfloat16).eval()
    drawn: list[list[list[int]]] = [[] for _ in ids]
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": tokenizer.pad_token_id}
    for _ in range(NUM_COMPLETIONS):
        for first in range(0, len(ids), SPIN_BATCH):
            told = tokenizer.pad({"input_ids": ids[first : first + SPIN_BATCH]}, return_tensors="pt").to(setup.device)
            found = policy.generate(**told, max_new_tokens=MAX_TOKENS, **settings)
            for place, row in enumerate(found[:, told["input_ids"].shape[1] :].tolist(), first):
                ended = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
                drawn[place].append(row[:ended])
    return drawn


def judge_and_pair(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Preference pairs, as token ids as they were sampled."""
    from peers import ids_row

    pairs = []
    for group in groups:
        usable = {text: ids for text, ids in zip(group["texts"], group["ids"], strict=True) if text}
        completions = list(usable.values())
        for chosen, rejected in choose([score(text) for text in usable], max_pairs=MAX_PAIRS):
            pairs.append(ids_row(group["prompt"], completions[chosen], completions[rejected]))
    return pairs


def train(setup: Setup, kind: str, pairs: list[dict[str, Any]], out: str) -> None:
    """One epoch of DPO; the policy is saved under `out`."""
    import torch
    from datasets import Dataset
    from peers import same_ids_trainer
    from transformers import AutoTokenizer
    from trl import DPOConfig

    alone = 1 if setup.device == "cpu" else 8
    batch_size = math.gcd(alone, BATCH_SIZE) if kind == "tuned" else BATCH_SIZE
    args = DPOConfig(
        output_dir=out,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=BATCH_SIZE // batch_size,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        beta=BETA,
        max_length=None,
        **QUIET,
        use_cpu=setup.device == "cpu",
        bf16=setup.bf16,
        dataloader_pin_memory=setup.device == "cuda",
        **(TUNED if kind == "tuned" else {}),
        **({"optim": setup.optim} if setup.optim == "adamw_bnb_8bit" else {}),
    )
    policy, tokenizer = new_model(setup, torch.float32), AutoTokenizer.from_pretrained(setup.model)
    reference = new_model(setup, torch.float32) if setup.is_random and kind != "tuned" else None
    data = Dataset.from_list(pairs)
    trainer = same_ids_trainer()(policy, reference, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(Path(out) / "policy"))


def _engine_settings(setup: Setup) -> Any:
    from selfplay.generators.engine import EngineSettings

    return EngineSettings("vllm", setup.model, dtype="bfloat16")


def _engine_environment(setup: Setup, kind: str) -> dict[str, str] | None:
    from selfplay.generators.environment import child_environment

    return child_environment(_engine_settings(setup), 0) if kind == "tuned" else None


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    first, told, prompts, out = sys.argv[1:]
    if first.startswith("sample "):
        asked = [json.loads(line)["prompt"] for line in Path(prompts).read_text().splitlines()]
        Path(out).write_text(json.dumps(sample(first.split()[1], Setup(**json.loads(told)), asked)))
    else:
        main(first, told, prompts, out)
