"""KL to the initial policy."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from jobs import train

from selfplay import store
from selfplay.train.kl import KLJob, run_kl
from selfplay.train.model import load_model
from selfplay.types import Completion, Group, PreferencePair, Prompt


def quiet(what: str, done: int, total: int) -> None:
    pass


def test_kl_is_zero_for_the_initial_policy_and_positive_for_a_trained_one(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    train(tmp_path, tiny, pairs, num_train_epochs=4, learning_rate=3e-3)

    def kl(policy: Path) -> float:
        network = load_model(str(policy))
        groups = []
        draw = torch.Generator().manual_seed(0)
        for n in range(40):
            prompt = torch.tensor([pairs[n % len(pairs)].prompt_token_ids])
            ids, logps = prompt, []
            for _ in range(6):  # sampled from the policy itself: the estimate is an expectation under it
                with torch.no_grad():
                    logps_V = network(input_ids=ids).logits[0, -1].log_softmax(-1)
                token = torch.multinomial(logps_V.exp(), 1, generator=draw)
                logps.append(float(logps_V[token]))
                ids = torch.cat([ids, token[None]], 1)
            completion = Completion("x", tuple(ids[0, prompt.shape[1] :].tolist()), tuple(logps))
            groups.append(Group(Prompt(f"p{n}", ()), tuple(prompt[0].tolist()), (completion,)))
        store.write_records(tmp_path / "groups.jsonl", groups, Group)
        job = KLJob(str(tiny), (str(tmp_path / "groups.jsonl"),), bf16=False, max_pack_tokens=200)
        found: float = run_kl(job, quiet)["kl"]
        return found

    assert kl(tiny) == pytest.approx(0, abs=1e-5)
    assert kl(tmp_path / "out" / "policy") > 0.1
