"""The real vLLM engine against transformers on the same weights."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from processes import processes_of
from transformers import AutoModelForCausalLM

from selfplay.chat import Chat
from selfplay.errors import GeneratorError
from selfplay.generators.engine import EngineSettings, Request
from selfplay.generators.environment import child_environment
from selfplay.generators.generator import EngineGenerator
from selfplay.generators.isolated import IsolatedEngine
from selfplay.types import Group, Message, Prompt, Sampling, prompt_id

pytestmark = pytest.mark.vllm

TEXTS = (
    "Name a bird.",
    "What is the sea?",
    "Hi",
    "Tell me of the moon and the tide, in two lines or three, and of the sand that the tide moves along the shore.",
    "And then?",
    "Write about the rain.",
)
NEAR_TIE = 1e-2  # nats between the two most probable ids


def prompt_of(text: str) -> Prompt:
    messages = (Message("user", text),)
    return Prompt(prompt_id(messages), messages)


PROMPTS = tuple(prompt_of(text) for text in TEXTS)


@pytest.fixture(scope="module")
def hf(model: Path) -> "torch.nn.Module":
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def logps_after(hf: "torch.nn.Module", prompt: Sequence[int], completion: Sequence[int]) -> "torch.Tensor":
    """Raw logps (nats) of the whole vocabulary at each place of a completion."""
    with torch.inference_mode():
        logits = hf(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1)


def logp_errors(hf: "torch.nn.Module", groups: Sequence[Group]) -> "torch.Tensor":
    """|engine - transformers| of every sampled token."""
    errors = []
    for group in groups:
        for completion in group.completions:
            logps_TV = logps_after(hf, group.prompt_token_ids, completion.token_ids)
            expected = logps_TV.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            errors.append((expected - torch.tensor(completion.logps)).abs())
    return torch.cat(errors)


def ids_of(groups: Sequence[Group]) -> list[tuple[int, ...]]:
    return [completion.token_ids for group in groups for completion in group.completions]


def all_gone(group: int) -> bool:
    """Whether nothing of a group runs, waiting up to 2 s."""
    deadline = time.monotonic() + 2
    while processes_of(group):
        if time.monotonic() > deadline:
            return False
    return True


def test_the_same_seeds_give_the_same_completions_and_other_seeds_others(engine: EngineGenerator) -> None:
    sampling = Sampling(num_completions=4, max_tokens=48, seed=1)
    first = engine.generate(PROMPTS, sampling)
    assert engine.generate(PROMPTS, sampling) == first
    other = engine.generate(PROMPTS, replace(sampling, seed=2))
    # A real model may greet twice in the same words.
    assert len({*ids_of(first), *ids_of(other)}) > 1.5 * 4 * len(PROMPTS)


def test_groups_come_in_the_order_of_the_prompts(engine: EngineGenerator, chat: Chat) -> None:
    groups = engine.generate(PROMPTS[::-1], Sampling(num_completions=2, max_tokens=4))
    assert [group.prompt.id for group in groups] == [prompt.id for prompt in PROMPTS[::-1]]
    assert [group.prompt_token_ids for group in groups] == [chat.encode_prompt(prompt) for prompt in PROMPTS[::-1]]


def test_greedy_ids_equal_those_of_transformers_or_differ_at_a_near_tie(
    engine: EngineGenerator, settings: EngineSettings, chat: Chat, hf: "torch.nn.Module"
) -> None:
    sampling = Sampling(temperature=0.0, max_tokens=32)
    with EngineGenerator(replace(settings, kind="transformers"), chat, isolate=False) as plain:
        expected = plain.generate(PROMPTS, sampling)
    equal = 0
    for group, other in zip(engine.generate(PROMPTS, sampling), expected, strict=True):
        ids, wanted = group.completions[0].token_ids, other.completions[0].token_ids
        place = next((n for n, (a, b) in enumerate(zip(ids, wanted, strict=False)) if a != b), None)
        equal += ids == wanted
        if place is None:
            assert ids == wanted
        else:
            best = logps_after(hf, group.prompt_token_ids, wanted)[place].topk(2).values
            assert best[0] - best[1] < NEAR_TIE
    assert equal > len(PROMPTS) // 2


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.7, top_p=0.9), Sampling(top_k=4, min_p=0.02), Sampling(top_k=40, top_p=0.8)],
    ids=["plain", "top_p", "top_k-min_p", "top_k-top_p"],
)
def test_logps_are_raw_at_temperature_one_whatever_the_sampling(
    engine: EngineGenerator, hf: "torch.nn.Module", sampling: Sampling
) -> None:
    groups = engine.generate(PROMPTS, replace(sampling, num_completions=3, max_tokens=32))
    assert logp_errors(hf, groups).max() < 2e-3


def test_top_p_draws_nothing_outside_the_nucleus(engine: EngineGenerator, hf: "torch.nn.Module") -> None:
    settings = Sampling(num_completions=8, max_tokens=32, top_p=0.3, seed=2)
    # some end before others, so that requests change places in the batch
    for group in engine.generate(PROMPTS, settings):
        for completion in group.completions:
            probs_TV = logps_after(hf, group.prompt_token_ids, completion.token_ids).exp()
            drawn_T = probs_TV.gather(1, torch.tensor(completion.token_ids)[:, None])
            before_T = torch.where(probs_TV > drawn_T, probs_TV, 0.0).sum(-1)
            assert (before_T < 0.3 + 1e-3).all()


def test_requests_with_and_without_top_p_share_a_batch(
    engine: EngineGenerator, chat: Chat, hf: "torch.nn.Module"
) -> None:
    prompt = chat.encode_prompt(PROMPTS[0])
    cut = Sampling(max_tokens=24, top_p=0.01)  # the most probable id alone
    free = Sampling(max_tokens=8)
    requests = [Request(f"{'cut' if n % 2 else 'free'}/{n}", prompt, n, cut if n % 2 else free) for n in range(12)]
    found = engine.complete(requests)
    greedy = engine.complete([Request("greedy", prompt, 0, replace(cut, temperature=0.0, top_p=1.0))])["greedy"]
    assert {found[r.id].token_ids for r in requests if r.id.startswith("cut")} == {greedy.token_ids}
    assert len({found[r.id].token_ids for r in requests if r.id.startswith("free")}) > 1


def test_bfloat16_logps_stay_near_those_of_float32(settings: EngineSettings, chat: Chat, hf: "torch.nn.Module") -> None:
    with EngineGenerator(replace(settings, dtype="bfloat16"), chat) as generator:
        groups = generator.generate(PROMPTS, Sampling(num_completions=4, max_tokens=32))
        (child,) = generator.engine.process_ids
        assert processes_of(child)
    assert all_gone(child)
    assert logp_errors(hf, groups).mean() < 0.05


def test_a_stop_token_ends_a_completion_and_stays_in_its_ids(engine: EngineGenerator, chat: Chat) -> None:
    groups = engine.generate(PROMPTS, Sampling(num_completions=16, max_tokens=64, seed=3))
    completions = [completion for group in groups for completion in group.completions]
    stopped = [c for c in completions if c.finish_reason == "stop"]
    assert stopped
    assert all(c.token_ids[-1] == c.stop_reason and c.stop_reason in chat.stop_token_ids for c in stopped)
    assert all(not {*c.token_ids[:-1]} & {*chat.stop_token_ids} for c in completions)
    assert all(len(c.token_ids) == 64 and c.stop_reason is None for c in completions if c.finish_reason == "length")


def test_a_stop_string_cuts_the_text_and_never_the_ids(engine: EngineGenerator, chat: Chat) -> None:
    sampling = Sampling(max_tokens=48, seed=5)
    (free,) = engine.generate(PROMPTS[:1], sampling)
    ids = free.completions[0].token_ids
    stop = free.completions[0].text[10:12]
    (group,) = engine.generate(PROMPTS[:1], replace(sampling, stop=("never written", stop)))
    completion = group.completions[0]
    assert completion.token_ids == ids[: len(completion.token_ids)]
    assert len(completion.token_ids) < len(ids)
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert stop in chat.tokenizer.decode(list(completion.token_ids))
    assert stop not in completion.text
    assert len(completion.logps) == len(completion.token_ids)


def test_score_labels_are_the_logps_of_the_next_token(engine: EngineGenerator, hf: "torch.nn.Module") -> None:
    prompts = [engine.chat.encode_prompt(prompt) for prompt in PROMPTS]
    labels = [40, 41, 42, 200, 201, 40]
    for prompt, row in zip(prompts, engine.score_labels(prompts, labels), strict=True):
        expected = logps_after(hf, prompt, [0])[0, labels]
        torch.testing.assert_close(torch.tensor(row), expected, atol=2e-3, rtol=0)


def test_a_prompt_without_room_for_max_tokens_names_the_limit(engine: EngineGenerator) -> None:
    with pytest.raises(GeneratorError, match=r"max_tokens 256 .* max_model_len 256"):
        engine.generate(PROMPTS[:1], Sampling(max_tokens=256))
    assert engine.generate(PROMPTS[:1], Sampling(max_tokens=4))


def test_an_argument_that_vllm_refuses_reaches_the_user_with_the_log(settings: EngineSettings) -> None:
    with pytest.raises(GeneratorError, match=r"no_such_argument(.|\n)*the end of its log"):
        IsolatedEngine(replace(settings, engine_args={"no_such_argument": 1}))


def test_a_killed_parent_leaves_no_process_of_vllms_own(settings: EngineSettings) -> None:
    """vLLM's default layout, with its core and its worker in processes of their own."""
    program = (
        "import json, sys, threading\n"
        "from selfplay.generators.engine import settings_from_json\n"
        "from selfplay.generators.isolated import IsolatedEngine\n"
        "engine = IsolatedEngine(settings_from_json(json.loads(sys.argv[1])))\n"
        "print(engine.process_ids[0], flush=True)\n"
        "threading.Event().wait()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, json.dumps(asdict(settings))],
        stdout=subprocess.PIPE,
        text=True,
        env={**child_environment(settings, 0, os.environ), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert len(processes_of(child)) > 1
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert all_gone(child)
