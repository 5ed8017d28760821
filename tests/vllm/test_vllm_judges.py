"""Judges on the real vLLM: constrained verdicts on the engine, and the api judge on vLLM's own OpenAI server on loopback."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from selfplay.chat import Chat
from selfplay.generators.engine import EngineSettings
from selfplay.generators.environment import child_environment
from selfplay.generators.generator import EngineGenerator
from selfplay.judges.api import ApiJudge
from selfplay.judges.llm import LLMJudge, expected_score
from selfplay.judges.template import JudgeTemplate, parse_template
from selfplay.protocols import JudgeContext
from selfplay.recipe_judges import ApiJudgeRecipe
from selfplay.types import Completion, Group, Message, Prompt, prompt_id

pytestmark = pytest.mark.vllm

START_SECONDS = 300.0
SCALE = 'parse: {line: "Score: <n>", min: 0, max: 3}'
BODY = "[user]\nGrade.\n{completion}"


def template_of(keys: str) -> JudgeTemplate:
    return parse_template(f"---\nname: t\nversion: 1\nmode: pointwise\n{keys}\n---\n{BODY}", where="t", digest="d")


def group_of(*texts: str) -> Group:
    messages = (Message("user", "Name a bird."),)
    return Group(Prompt(prompt_id(messages), messages), (1,), tuple(Completion(text) for text in texts))


GROUP = group_of("a wren", "no idea", "")
CHOICES = {0.0, 1.0, 2.0, 3.0}


def test_constrained_verdicts_on_the_engine_are_choices_and_the_same_again(engine: EngineGenerator) -> None:
    judge = LLMJudge(template_of(SCALE), verdict="constrained", num_verdicts=8, temperature=1.0, max_tokens=24)
    context = JudgeContext(seed=3, generator=engine)
    (judgement,) = judge.judge([GROUP], context)
    assert all(len(drawn) == 8 and {*drawn} <= CHOICES for drawn in judgement.verdicts)
    assert len({value for drawn in judgement.verdicts for value in drawn}) > 1
    assert judge.judge([GROUP], context) == [judgement]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


def wait_until_up(server: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    """Returns when the server answers; fails where it ends first or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def endpoint(model: Path, settings: EngineSettings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of vLLM's OpenAI server on the test model; the server and all its processes end with the module."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "judge", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "256", "--generation-config", "vllm", "--enforce-eager"]
    # JSON may have any white space between its parts, and a model of random weights would write nothing else
    command += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    if not torch.cuda.is_available():
        # as generators/vllm.py starts it: a seeded request whose prefill is chunked kills the CPU engine
        command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "16384", "--block-size", "32"]
        command += ["--kv-cache-memory-bytes", str(2**29)]
    with log.open("wb") as stream:
        server = subprocess.Popen(
            command,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            env=child_environment(settings, 0, os.environ),
        )
    try:
        wait_until_up(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            os.killpg(server.pid, signal.SIGKILL)  # the engine is a process of its own
        server.wait()


def judge_at(url: str, template: JudgeTemplate, **fields: Any) -> ApiJudge:
    recipe = ApiJudgeRecipe.model_validate({"kind": "api", "base_url": url, "model": "judge"} | fields)
    return ApiJudge(template, recipe)


def test_a_real_server_is_asked_for_texts_and_its_tokens_are_counted(endpoint: str, tmp_path: Path) -> None:
    judge = judge_at(endpoint, template_of(SCALE), max_tokens=16)
    notes: list[str] = []
    with judge.stage(tmp_path, notes.append):
        (judgement,) = judge.judge([GROUP], JudgeContext(seed=1))
    # a model of random weights writes no verdict: None with the reason, and all was read and counted
    assert all((score is None) == bool(note) for score, note in zip(judgement.scores, judgement.notes, strict=True))
    assert "3 calls (0 retries, 0 failed)" in notes[0]
    again = judge_at(endpoint, template_of(SCALE), max_tokens=16)
    assert again.judge([GROUP], JudgeContext(seed=1)) == [judgement]


@pytest.mark.parametrize("constraint", ["response_format", "structured_outputs"])
def test_a_real_server_keeps_to_the_choices(endpoint: str, constraint: str) -> None:
    judge = judge_at(
        endpoint,
        template_of(SCALE),
        verdict="constrained",
        constraint=constraint,
        num_verdicts=4,
        temperature=1.0,
        max_tokens=100,
    )
    (judgement,) = judge.judge([GROUP], JudgeContext(seed=2))
    drawn = [value for row in judgement.verdicts for value in row]
    assert len(drawn) == 12
    assert {*drawn} <= CHOICES
    assert len({*drawn}) > 1


def test_label_scores_from_a_real_server_are_those_of_the_models_own_probabilities(
    endpoint: str, model: Path, chat: Chat
) -> None:
    (question,) = template_of("labels: {a: 1, b: 0}").fill(GROUP.prompt, GROUP.completions[0])
    ids = chat.encode_messages([question])
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        logps_V = hf(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
    texts = {int(i): chat.tokenizer.decode([int(i)]) for i in logps_V.topk(20).indices}
    names = [
        (i, text)
        for i, text in texts.items()
        if text.isascii() and text.isalnum() and list(texts.values()).count(text) == 1
    ]
    labels = {text: float(n) for n, (_, text) in enumerate(names[:3])}
    assert len(labels) == 3
    wanted = expected_score([float(logps_V[i]) for i, _ in names[:3]], list(labels.values())).score
    written = ", ".join(f"'{text}': {value}" for text, value in labels.items())
    judge = judge_at(endpoint, template_of(f"labels: {{{written}}}"), verdict="labels")
    (judgement,) = judge.judge([group_of("a wren")], JudgeContext())
    assert judgement.scores[0] == pytest.approx(wanted, abs=5e-3)


def test_a_label_that_a_real_server_does_not_list_gives_no_verdict(endpoint: str) -> None:
    judge = judge_at(endpoint, template_of("labels: {neverwritten: 1, noritthis: 0}"), verdict="labels")
    (judgement,) = judge.judge([GROUP], JudgeContext())
    assert judgement.scores == (None,) * 3
    assert all(note for note in judgement.notes)
