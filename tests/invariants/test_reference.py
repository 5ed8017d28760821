"""Whose weights the reference is, who computes its logps, and that logps of something else are never used."""

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import job_of, pair_of, random_pairs, steps, train, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM

from selfplay import store
from selfplay.errors import AuditError, DataError, StorageError
from selfplay.train import reference_pass
from selfplay.train.loop import run_training
from selfplay.train.model import load_model
from selfplay.train.reference import ReferenceLogps
from selfplay.types import Completion, Group, Message, PreferencePair, Prompt


def logp(model: Path, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    """Per-token logps of a completion from transformers' own forward."""
    network = load_model(str(model))
    with torch.no_grad():
        logits_TV = network(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return logits_TV.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def reference_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "out" / "reference.safetensors")


def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that the reference pass loads beside the policy."""
    loaded: list[str] = []

    def counted(path: str, **named: Any) -> Any:
        loaded.append(path)
        return load_model(path, **named)

    monkeypatch.setattr(reference_pass, "load_model", counted)
    return loaded


@pytest.fixture(scope="module")
def moved(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after a few steps."""
    folder = tmp_path_factory.mktemp("moved")
    run_training(job_of(folder, tiny, random_pairs(seed=5), learning_rate=3e-3))
    return folder / "out" / "policy"


def test_a_copy_of_the_policy_s_weights_is_the_policy(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, copy = loads(monkeypatch), tmp_path / "copy"
    shutil.copytree(tiny, copy)
    row = train(tmp_path, tiny, pairs, job={"reference": str(copy)}, max_steps=1)[0]
    assert loaded == []
    assert row["audit/zero_logratio"] == 0


def test_another_reference_is_loaded_once_and_its_logps_are_its_own(
    tiny: Path, moved: Path, pairs: Sequence[PreferencePair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loads(monkeypatch)
    row = train(tmp_path, moved, pairs, job={"reference": str(tiny)}, max_steps=1)[0]
    assert loaded == [str(tiny)]
    assert "audit/zero_logratio" not in row
    wanted = [logp(tiny, p.prompt_token_ids, p.rejected_token_ids).sum().item() for p in pairs]
    assert reference_of(tmp_path)["rejected"].tolist() == pytest.approx(wanted, rel=1e-5)


def test_a_reference_with_other_tokens_is_refused(tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    network.resize_token_embeddings(400)
    network.save_pretrained(tmp_path / "larger")
    with pytest.raises(DataError, match=r"has 400 tokens and the policy \d+"):
        train(tmp_path, tiny, pairs, job={"reference": str(tmp_path / "larger")})


@pytest.mark.parametrize("loss_type", ["simpo", "sft", ["simpo", "sft"]], ids=str)
def test_a_loss_without_reference_computes_and_loads_none(
    loss_type: Any,
    tiny: Path,
    moved: Path,
    pairs: Sequence[PreferencePair],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = loads(monkeypatch)
    rows = train(tmp_path, tiny, pairs, job={"reference": str(moved)}, loss_type=loss_type, num_train_epochs=3)
    assert loaded == []
    assert not (tmp_path / "out" / "reference.safetensors").exists()
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert ("rewards/margins" in rows[0]) == (loss_type != "sft")


def test_an_ema_mixes_policy_and_reference_saves_the_mix_and_is_scored_from_it(
    tiny: Path, moved: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    mixing = {"reference": str(tiny), "ref_model_mixup_alpha": 0.25}
    train(tmp_path, moved, pairs, job=mixing, reference="ema", max_steps=1, save_dtype="bfloat16")
    mixed = tmp_path / "out" / "reference"
    old, new, found = weights(tiny), weights(moved), weights(mixed)
    assert found.keys() == new.keys()
    for name in found:
        assert found[name].dtype == torch.float32
        assert torch.allclose(found[name], 0.25 * new[name] + 0.75 * old[name], atol=1e-6)
    assert any(not torch.allclose(found[name], new[name], atol=1e-4) for name in found)
    store.check_folder(mixed)
    wanted = [logp(mixed, p.prompt_token_ids, p.chosen_token_ids).sum().item() for p in pairs]
    assert reference_of(tmp_path)["chosen"].tolist() == pytest.approx(wanted, rel=1e-5)


def test_an_ema_that_is_there_is_not_mixed_again(
    tiny: Path, moved: Path, pairs: Sequence[PreferencePair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(
        tmp_path,
        moved,
        pairs,
        job={"reference": str(tiny), "ref_model_mixup_alpha": 0.25},
        reference="ema",
        max_steps=1,
    )
    run_training(job)
    before = store.weights_digest(tmp_path / "out" / "reference")
    shutil.rmtree(tmp_path / "out" / "policy")
    loaded = loads(monkeypatch)
    run_training(job)
    assert loaded == []
    assert store.weights_digest(tmp_path / "out" / "reference") == before


def test_the_mix_of_equal_weights_is_the_policy_to_the_last_bit(
    moved: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    mixing = {"reference": str(moved), "ref_model_mixup_alpha": 0.3}
    row = train(tmp_path, moved, pairs, job=mixing, reference="ema", max_steps=1)[0]
    assert row["audit/zero_logratio"] == 0
    assert store.weights_digest(tmp_path / "out" / "reference") == store.weights_digest(moved)


def identity_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["identity"])
    return found


def test_logps_of_other_weights_or_other_pairs_are_refused(
    tiny: Path, moved: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    run_training(job_of(tmp_path, tiny, pairs, max_steps=1))
    with pytest.raises(StorageError, match=r"reference\.safetensors.*\(weights differ\)"):
        run_training(job_of(tmp_path, moved, pairs, max_steps=1))
    with pytest.raises(StorageError, match=r"\(pairs differ\)"):
        run_training(job_of(tmp_path, tiny, [*pairs[1:], pairs[0]], max_steps=1))
    with pytest.raises(StorageError, match=r"\(bf16 differ\)"):
        run_training(job_of(tmp_path, tiny, pairs, max_steps=1, bf16=True))
    shutil.rmtree(tmp_path / "out" / "policy")
    run_training(job_of(tmp_path, tiny, pairs, max_steps=1))  # they still are this job's own


def test_logps_that_say_nothing_of_what_they_are_of_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    store.write_file(path, lambda temporary: save_file({"chosen": torch.ones(1), "rejected": torch.ones(1)}, temporary))
    with pytest.raises(StorageError, match="weights differ"):
        ReferenceLogps.load(path, {"weights": "w"})


# --- logps of the engine ----------------------------------------------------------------------------------------


def engine_groups(folder: Path, model: Path, pairs: Sequence[PreferencePair], *, shift: float = 0.0) -> dict[str, Any]:
    """Groups with the pairs' completions and the logps of `model`, `shift` nats a token too high; as fields of a job."""
    groups: dict[tuple[int, ...], list[Completion]] = {}
    for pair in pairs:
        for tokens in pair.completions:
            logps = (logp(model, pair.prompt_token_ids, tokens) + shift).tolist()
            groups.setdefault(pair.prompt_token_ids, []).append(Completion("x", tokens, tuple(logps)))
    records = [
        Group(Prompt(f"p{n}", (Message("user", "x"),)), prompt, tuple(completions))
        for n, (prompt, completions) in enumerate(groups.items())
    ]
    half = len(records) // 2
    store.write_records(folder / "0.jsonl", records[:half], Group)
    store.write_records(folder / "1.jsonl", records[half:], Group)
    return {"groups": (str(folder / "0.jsonl"), str(folder / "1.jsonl"))}


def test_engine_logps_are_those_of_the_groups_and_gold_answers_are_scored_by_the_trainer(
    tiny: Path, tmp_path: Path
) -> None:
    drawn = random_pairs(num_prompts=4)
    gold = pair_of(drawn[0].prompt_token_ids, (30, 31, 32, 1), drawn[0].rejected_token_ids)
    job = engine_groups(tmp_path, tiny, drawn, shift=0.03)
    row = train(tmp_path, tiny, [*drawn, gold], job=job, reference_logps="engine", max_steps=1, batch_size=99)[0]
    found = reference_of(tmp_path)

    def plain(tokens: Sequence[int], pair: PreferencePair) -> float:
        return logp(tiny, pair.prompt_token_ids, tokens).sum().item()

    for n, pair in enumerate(drawn):
        shifted = plain(pair.chosen_token_ids, pair) + 0.03 * len(pair.chosen_token_ids)
        assert found["chosen"][n].item() == pytest.approx(shifted, abs=1e-3)
    assert found["chosen"][-1].item() == pytest.approx(plain(gold.chosen_token_ids, gold), abs=1e-3)
    assert found["rejected"][-1].item() == found["rejected"][0].item()
    assert 0.02 < row["audit/zero_logratio"] <= 0.03 + 1e-5  # a difference of the engine's, within the audit's bound
    assert row["loss"] == pytest.approx(math.log(2), abs=0.02)


def test_engine_logps_are_used_only_after_the_audit_and_within_its_bound(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    engine: dict[str, Any] = {"reference_logps": "engine", "max_steps": 1}
    far = engine_groups(tmp_path / "far", tiny, pairs, shift=0.2)
    with pytest.raises(AuditError, match="engine and the trainer disagree"):
        train(tmp_path / "a", tiny, pairs, job=far, **engine)
    assert not (tmp_path / "a" / "out" / "reference.safetensors").exists()
    # the audit reads the first completion of a group; an engine that is wrong about the others is found on the first step
    near = engine_groups(tmp_path / "near", tiny, pairs)
    for path in near["groups"]:
        groups = store.read_records(Path(path), Group)
        spoilt = [
            dataclasses.replace(
                group,
                completions=(
                    group.completions[0],
                    *(
                        dataclasses.replace(c, logps=tuple(x - 1 for x in c.logps))
                        for c in group.completions[1:]
                        if c.token_ids != group.completions[0].token_ids
                    ),
                ),
            )
            for group in groups
        ]
        store.write_records(Path(path), spoilt, Group)
    with pytest.raises(AuditError, match=r"at most 0\.1 is rounding"):
        train(tmp_path / "b", tiny, pairs, job=near, **engine)
    assert not (tmp_path / "b" / "out" / "policy").exists()


def test_engine_logps_need_an_engine_and_the_policy_as_reference(
    tiny: Path, moved: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    with pytest.raises(AuditError, match="no logps of an engine in the groups"):
        train(tmp_path / "none", tiny, pairs, reference_logps="engine")
    job = engine_groups(tmp_path, tiny, pairs)
    with pytest.raises(AuditError, match="not the policy that sampled"):
        train(tmp_path / "other", tiny, pairs, reference_logps="engine", job={**job, "reference": str(moved)})


def test_engine_logps_of_other_groups_are_refused(tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path) -> None:
    one, other = (engine_groups(tmp_path / str(s), tiny, pairs, shift=s) for s in (0.0, 0.01))
    train(tmp_path, tiny, pairs, job=one, reference_logps="engine", max_steps=1)
    with pytest.raises(StorageError, match=r"\(groups differ\)"):
        train(tmp_path, tiny, pairs, job=other, reference_logps="engine", max_steps=1)
    with pytest.raises(StorageError, match=r"\(groups, reference_logps differ\)"):
        train(tmp_path, tiny, pairs, max_steps=1)


def test_a_reference_file_says_what_it_is_of(tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path) -> None:
    train(tmp_path, tiny, pairs, max_steps=1)
    identity = identity_of(tmp_path / "out" / "reference.safetensors")
    assert identity["weights"] == store.weights_digest(tiny)
    assert identity["pairs"] == reference_pass.rows_digest(pairs)
    assert len(steps(tmp_path)) == 1
