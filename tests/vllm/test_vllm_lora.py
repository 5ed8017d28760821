"""vLLM serves a LoRA policy: what it samples from is what the trainer trains."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
from jobs import ALONE, job_of, random_pairs

from selfplay.adapters import adapter_rank, base_folder
from selfplay.chat import Chat
from selfplay.errors import AuditError
from selfplay.generators.engine import EngineSettings
from selfplay.generators.generator import EngineGenerator
from selfplay.recipe_train import LoraRecipe, TrainRecipe
from selfplay.train.four_bit import playable
from selfplay.train.logps import TokenLogps
from selfplay.train.loop import run_training
from selfplay.train.model import load_model
from selfplay.train.reference import audit_engine
from selfplay.types import Message, Prompt, Sampling, prompt_id

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["lora", "qlora"])
def test_the_engine_samples_from_the_adapter_that_was_trained(
    settings: EngineSettings, model: Path, chat: Chat, tmp_path: Path, load_in_4bit: bool
) -> None:
    if load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed on this system")
    lora = {"r": 4, "lora_alpha": 8, "load_in_4bit": load_in_4bit}
    base = playable(model, tmp_path, TrainRecipe(lora=LoraRecipe(**lora), bf16=False))
    pairs = random_pairs(num_prompts=4, num_completions=2)
    run_training(job_of(tmp_path, base, pairs, lora=lora, learning_rate=5e-2, num_train_epochs=3))
    adapter = tmp_path / "out" / "policy"
    served = dataclasses.replace(
        settings, model=str(base_folder(adapter)), adapter=str(adapter), adapter_rank=adapter_rank(adapter)
    )
    messages = (Message("user", "Say a number."),)
    with EngineGenerator(served, chat) as generator:
        groups = generator.generate([Prompt(prompt_id(messages), messages)], Sampling(max_tokens=24))
    trained = TokenLogps(load_model(str(adapter), load_in_4bit=load_in_4bit))
    found = audit_engine(trained, groups, bound=0.1, world=ALONE)
    assert found is not None
    assert found["audit/mean_difference"] < 2e-3
    with pytest.raises(AuditError):  # the bare base is another policy
        audit_engine(TokenLogps(load_model(str(model))), groups, bound=0.1, world=ALONE)
