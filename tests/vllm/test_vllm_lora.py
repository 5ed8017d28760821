"""vLLM serves a LoRA policy: what it samples from is what the trainer trains."""

import dataclasses
from pathlib import Path

import pytest
from jobs import ALONE, job_of, random_pairs

from selfplay.adapters import adapter_rank
from selfplay.chat import Chat
from selfplay.errors import AuditError
from selfplay.generators.engine import EngineSettings
from selfplay.generators.generator import EngineGenerator
from selfplay.train.logps import TokenLogps
from selfplay.train.loop import run_training
from selfplay.train.model import load_model
from selfplay.train.reference import audit_engine
from selfplay.types import Message, Prompt, Sampling, prompt_id

pytestmark = pytest.mark.vllm


def test_the_engine_samples_from_the_adapter_that_was_trained(
    settings: EngineSettings, model: Path, chat: Chat, tmp_path: Path
) -> None:
    pairs = random_pairs(num_prompts=4, num_completions=2)
    job = job_of(tmp_path, model, pairs, lora={"r": 4, "lora_alpha": 8}, learning_rate=5e-2, num_train_epochs=3)
    run_training(job)
    adapter = tmp_path / "out" / "policy"
    served = dataclasses.replace(settings, adapter=str(adapter), adapter_rank=adapter_rank(adapter))
    messages = (Message("user", "Say a number."),)
    with EngineGenerator(served, chat) as generator:
        groups = generator.generate([Prompt(prompt_id(messages), messages)], Sampling(max_tokens=24))
    found = audit_engine(TokenLogps(load_model(str(adapter))), groups, bound=0.1, world=ALONE)
    assert found is not None
    assert found["audit/mean_difference"] < 2e-3
    with pytest.raises(AuditError):  # the bare base is another policy
        audit_engine(TokenLogps(load_model(str(model))), groups, bound=0.1, world=ALONE)
