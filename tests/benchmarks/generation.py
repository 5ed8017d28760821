"""The benchmarks of sampling, judging and the hand-off between trainer and engine; one run in a process of its own:

python generation.py PEER SETUP      prints one JSON line
"""

import gc
import json
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import Setup, missing, new_model, release, write_weights

from selfplay.chat import Chat
from selfplay.generators.engine import EngineSettings
from selfplay.generators.generator import EngineGenerator
from selfplay.judges.llm import LLMJudge
from selfplay.judges.template import load_template
from selfplay.protocols import JudgeContext
from selfplay.types import Group, Message, Prompt, Sampling, prompt_id

PROMPTS = Path(__file__).parents[2] / "recipes" / "data" / "quickstart_train.jsonl"
RUBRIC_LAST = Path(__file__).with_name("rubric_last.md")
NUM_PROMPTS, NUM_COMPLETIONS, MAX_TOKENS = 32, 4, 96
NUM_JUDGED = 16
Timed = dict[str, float]


def our_engine(kind: str) -> Callable[[Setup], Timed]:
    """One of our engines, started and warm."""

    def run(setup: Setup) -> Timed:
        with _generator(kind, setup.model) as generator:
            generator.generate(_prompts()[:1], Sampling(max_tokens=4))
            started = time.perf_counter()
            groups = generator.generate(_prompts(), _sampling())
            seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": sum(len(c.token_ids) for g in groups for c in g.completions)}

    return run


def hf_generate(setup: Setup) -> Timed:
    """transformers.generate over one left-padded batch with num_return_sequences, as published self-play code calls it."""
    import torch

    chat = Chat.load(setup.model)
    policy = new_model(setup, torch.bfloat16).eval()
    rows = [chat.encode_prompt(p) for p in _prompts()]
    longest = max(map(len, rows))
    ids = torch.tensor([[chat.stop_token_ids[0]] * (longest - len(r)) + list(r) for r in rows], device=setup.device)
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=setup.device)
    settings: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    settings |= {"eos_token_id": list(chat.stop_token_ids), "pad_token_id": chat.stop_token_ids[0]}
    policy.generate(ids[:1], attention_mask=mask[:1], max_new_tokens=4, **settings)
    started = time.perf_counter()
    found = policy.generate(
        ids, attention_mask=mask, max_new_tokens=MAX_TOKENS, num_return_sequences=NUM_COMPLETIONS, **settings
    )
    drawn = found[:, longest:].cpu()  # waits for the device
    seconds = time.perf_counter() - started
    ends = torch.isin(drawn, torch.tensor(chat.stop_token_ids))
    lengths = [int(row.nonzero()[0]) + 1 if row.any() else len(row) for row in ends]
    return {"seconds": seconds, "tokens": sum(lengths)}


def hand_off(setup: Setup) -> Timed:
    """From the last optimizer step to the first token of the new policy: checkpoint, a new engine, one token."""
    import torch

    from selfplay.train.model import load_model, save_policy
    from selfplay.train.optim import Masters

    loaded = load_model(setup.model).to(setup.device)
    masters = Masters(loaded, compute_dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        policy, dtype = Path(folder) / "policy", "bfloat16" if setup.is_random else "float32"
        started = time.perf_counter()
        save_policy(loaded, masters, setup.model, policy, dtype=dtype, chat_template=None)
        saved = time.perf_counter()
        del loaded, masters  # the engine wants the device
        gc.collect()
        release(setup)
        with _generator("vllm", str(policy)) as generator:
            generator.generate(_prompts()[:1], Sampling(max_tokens=1))
            done = time.perf_counter()
    return {"seconds": done - started, "save_seconds": saved - started, "tokens": 1}


def judge(template: str, engine_args: dict[str, Any]) -> Callable[[Setup], Timed]:
    """A pointwise rubric over 16 prompts x 4 completions, the policy judging itself on a warm engine."""

    def run(setup: Setup) -> Timed:
        with _generator("vllm", setup.model, engine_args) as generator:
            groups: list[Group] = generator.generate(_prompts()[:NUM_JUDGED], _sampling())
            asked = LLMJudge(load_template(template, Path()), max_tokens=64)
            started = time.perf_counter()
            judgements = asked.judge(groups, JudgeContext(generator=generator))
            seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": sum(len(j.scores) for j in judgements)}

    return run


PEERS: dict[str, Callable[[Setup], Timed]] = {
    "vllm": our_engine("vllm"),
    "transformers": our_engine("transformers"),
    "transformers.generate": hf_generate,
    "hand-off": hand_off,
    "judge": judge("additive", {}),
    "judge, rubric last": judge(str(RUBRIC_LAST), {"enable_prefix_caching": False}),
}
WITHOUT_VLLM = ("transformers", "transformers.generate")


def _generator(kind: str, model: str, engine_args: dict[str, Any] | None = None) -> EngineGenerator:
    chat = Chat.load(model)
    settings = EngineSettings(
        kind="vllm" if kind == "vllm" else "transformers",
        model=model,
        dtype="bfloat16",
        max_batch_size=NUM_PROMPTS * NUM_COMPLETIONS,
        engine_args=engine_args or {},
        stop_token_ids=chat.stop_token_ids,
    )
    return EngineGenerator(settings, chat, isolate=kind == "vllm")


def _prompts() -> list[Prompt]:
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()[:NUM_PROMPTS]]
    messages = [(Message("user", row["prompt"]),) for row in rows]
    return [Prompt(prompt_id(m), m) for m in messages]


def _sampling() -> Sampling:
    return Sampling(num_completions=NUM_COMPLETIONS, temperature=1.0, max_tokens=MAX_TOKENS, seed=1)


def main(peer: str, told: str) -> None:
    """Runs one peer and prints its figures."""
    setup = Setup(**json.loads(told))
    if reason := missing(() if peer in WITHOUT_VLLM else ("vllm",)):
        print(json.dumps({"left_out": reason}))
        return
    write_weights(setup)
    timed = PEERS[peer](setup)
    # of this process, imports included, or of the largest that it started: an engine lives in a child
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps(timed | {"peak_bytes": 1024 * max(peaks)}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
