"""vLLM and the trainer together: the audit between them, and a whole round."""

import json
from pathlib import Path

import pytest
import torch
from jobs import ALONE

import selfplay
from selfplay import store
from selfplay.chat import Chat
from selfplay.errors import AuditError
from selfplay.generators.engine import EngineSettings
from selfplay.generators.generator import EngineGenerator
from selfplay.recipe_file import check_recipe
from selfplay.rounds import iterate
from selfplay.train.logps import TokenLogps
from selfplay.train.model import load_model
from selfplay.train.reference import audit_engine
from selfplay.types import Completion, Message, Prompt, Sampling, prompt_id

pytestmark = pytest.mark.vllm


def test_the_audit_passes_on_the_engines_weights_and_fails_when_one_side_changes(
    engine: EngineGenerator, model: Path
) -> None:
    prompts = []
    for n in range(4):
        messages = (Message("user", f"Say the number {n}."),)
        prompts.append(Prompt(prompt_id(messages), messages))
    groups = engine.generate(prompts, Sampling(max_tokens=24))
    policy = load_model(str(model))
    found = audit_engine(TokenLogps(policy), groups, bound=0.1, world=ALONE)
    assert found is not None
    assert found["audit/mean_difference"] < 2e-3
    with torch.no_grad():
        policy.get_input_embeddings().weight.mul_(1.5)
    with pytest.raises(AuditError, match="Nothing was trained"):
        audit_engine(TokenLogps(policy), groups, bound=0.1, world=ALONE)


def test_a_whole_round_on_vllm_is_audited_and_an_over_long_prompt_is_dropped(
    settings: EngineSettings, chat: Chat, tmp_path: Path
) -> None:
    texts = [f"Say {n}." for n in range(6)] + ["word " * 200]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    recipe = check_recipe(
        {
            "model": settings.model,
            "rounds": 1,
            "prompts": {"source": str(tmp_path / "rows.jsonl"), "deal": "same", "max_prompt_length": 128},
            "generator": {
                "kind": "vllm",
                "dtype": "float32",
                "num_completions": 4,
                "max_tokens": 64,
                "max_model_len": 256,
            },
            "pairs": {"truncated": "judged"},
            "train": {"learning_rate": 1e-3, "bf16": False},
        },
        "recipe",
    )

    @selfplay.pointwise
    def ended_first(prompt: Prompt, completion: Completion) -> float:
        return 1.0 if completion.finish_reason == "stop" and completion.text else 0.0

    iterate(recipe, tmp_path / "run", judge=ended_first)
    done = store.read_json(tmp_path / "run" / "round-000" / "round.json")
    assert done["counts"]["num_prompts"] == 6
    assert done["train"]["audit/mean_difference"] < 2e-3
    assert done["policy"] != done["init"]
    over_long = {p.text for p in store.read_records(tmp_path / "run" / "round-000" / "prompts.jsonl", Prompt)} & {
        texts[-1]
    }
    assert not over_long
