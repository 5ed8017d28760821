"""The checks at the start of a round: policy = reference, and the trainer against the engine."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import ALONE, job_of, random_pairs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model

from selfplay import store
from selfplay.errors import AuditError
from selfplay.train.launch import _main
from selfplay.train.logps import TokenLogps
from selfplay.train.loop import run_training
from selfplay.train.model import load_model
from selfplay.train.reference import NUM_AUDITED, ReferenceLogps, audit_engine
from selfplay.types import Completion, Group, Message, PreferencePair, Prompt


def sampled_groups(model: Path, pairs: Sequence[PreferencePair]) -> list[Group]:
    """The pairs' chosen completions with the logps that transformers' own forward gives them."""
    network = load_model(str(model))
    groups = []
    for n, pair in enumerate(pairs):
        ids = torch.tensor([[*pair.prompt_token_ids, *pair.chosen_token_ids]])
        with torch.no_grad():
            logps_TV = network(input_ids=ids).logits[0].log_softmax(-1)[len(pair.prompt_token_ids) - 1 : -1]
        logps = logps_TV.gather(1, torch.tensor(pair.chosen_token_ids)[:, None])[:, 0].tolist()
        completion = Completion("x", pair.chosen_token_ids, tuple(logps))
        prompt = Prompt(f"p{n}", (Message("user", "x"),))
        groups.append(Group(prompt, pair.prompt_token_ids, (completion,)))
    return groups


def logps_in(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def identity_of(path: Path) -> dict[str, Any]:
    """What a reference file says that its logps are of."""
    with safe_open(path, framework="pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["identity"])
    return found


def changed_copy(model: Path, folder: Path) -> Path:
    """The same model but for one row of one matrix."""
    network = load_model(str(model))
    with torch.no_grad():
        network.model.layers[0].mlp.down_proj.weight[:8] *= 3
    network.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bf16", [False, True])
def test_where_policy_is_reference_the_first_loss_is_ln_2(
    bf16: bool, tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    # a cap of 60 packs the reference pass other than the steps
    result = run_training(job_of(tmp_path, tiny, pairs, bf16=bf16, max_pack_tokens=60))
    first = store.read_json_lines(tmp_path / "out" / "train" / "steps.jsonl")[0]
    tolerance = 5e-2 if bf16 else 1e-5
    assert first["loss"] == pytest.approx(math.log(2), abs=tolerance)
    assert first["rewards/margins"] == pytest.approx(0, abs=tolerance)
    assert result["audit/zero_logratio"] < (5e-2 if bf16 else 1e-6)


def test_reference_logps_are_the_sums_of_the_policys_own_logits(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    run_training(job_of(tmp_path, tiny, pairs, max_steps=1))
    reference = logps_in(tmp_path / "out" / "reference.safetensors")
    wanted = [sum(g.completions[0].logps) for g in sampled_groups(tiny, pairs)]
    assert reference["chosen"].tolist() == pytest.approx(wanted, rel=1e-5)
    assert len(reference["rejected"]) == len(pairs)


def test_dropout_is_off_even_where_the_model_was_saved_with_it(tmp_path: Path) -> None:
    model = make_tiny_model(
        tmp_path / "model", family="gpt_neox", num_key_value_heads=2, hidden_dropout=0.4, attention_dropout=0.4
    )
    drawn = random_pairs()
    # gradient checkpointing needs train mode, in which dropout would act
    run_training(job_of(tmp_path, model, drawn, gradient_checkpointing=True, max_steps=1))
    first = store.read_json_lines(tmp_path / "out" / "train" / "steps.jsonl")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_reference_file_of_another_model_stops_before_any_step(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    job = job_of(tmp_path, tiny, pairs, shuffle=False)
    run_training(job)
    path = tmp_path / "out" / "reference.safetensors"
    right, other = logps_in(path), dataclasses.replace(job, out=str(tmp_path / "again"))
    # its digests are right, its numbers are not
    wrong = ReferenceLogps(right["chosen"] + 0.1, right["rejected"])
    wrong.save(tmp_path / "again" / "reference.safetensors", identity_of(path))
    with pytest.raises(AuditError, match=r"reference\.safetensors"):
        run_training(other)
    assert not (tmp_path / "again" / "policy").exists()
    assert store.read_json_lines(tmp_path / "again" / "train" / "steps.jsonl") == []


def test_the_audit_passes_with_the_engines_logps_and_fails_when_one_side_has_other_weights(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    groups = sampled_groups(tiny, pairs)
    right = audit_engine(TokenLogps(load_model(str(tiny))), groups, bound=1e-4, world=ALONE)
    plain = audit_engine(TokenLogps(load_model(str(tiny))), groups, bound=1e-4, world=ALONE)
    assert right is not None
    assert plain is not None
    assert right["audit/max_difference"] < 1e-4
    changed = changed_copy(tiny, tmp_path / "changed")
    with pytest.raises(AuditError, match=r"max_audit_difference is 0\.1"):
        audit_engine(TokenLogps(load_model(str(changed))), groups, bound=0.1, world=ALONE)


def test_the_audit_fails_on_a_shifted_template_and_on_nan(tiny: Path, pairs: Sequence[PreferencePair]) -> None:
    module = TokenLogps(load_model(str(tiny)))
    groups = sampled_groups(tiny, pairs)
    without_bos = [dataclasses.replace(g, prompt_token_ids=g.prompt_token_ids[1:]) for g in groups]
    with pytest.raises(AuditError):
        audit_engine(module, without_bos, bound=0.1, world=ALONE)
    first = dataclasses.replace(groups[0].completions[0], logps=(float("nan"),) * len(groups[0].completions[0].logps))
    with pytest.raises(AuditError):
        audit_engine(module, [dataclasses.replace(groups[0], completions=(first,))], bound=0.1, world=ALONE)


def test_the_audit_reads_at_most_16_prompts_and_says_when_nobody_gave_logps(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = random_pairs(num_prompts=10, num_completions=3)
    groups = sampled_groups(tiny, drawn)
    assert len(groups) > NUM_AUDITED == 16
    module, calls = TokenLogps(load_model(str(tiny))), 0

    def counted(*arguments: object) -> None:
        nonlocal calls
        calls += 1

    module.register_forward_pre_hook(counted)
    audit_engine(module, groups, bound=0.1, world=ALONE)
    assert calls == NUM_AUDITED
    silent = [dataclasses.replace(g, completions=(dataclasses.replace(g.completions[0], logps=()),)) for g in groups]
    assert audit_engine(module, silent, bound=0.1, world=ALONE) is None


def test_a_job_in_its_own_process_passes_results_and_errors_on(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    changed = changed_copy(tiny, tmp_path / "changed")
    store.write_records(tmp_path / "groups.jsonl", sampled_groups(changed, pairs), Group)
    job = job_of(tmp_path, tiny, pairs, job={"groups": (str(tmp_path / "groups.jsonl"),)}, max_steps=2)
    file, result = tmp_path / "job.json", tmp_path / "result.json"
    file.write_text(json.dumps({"kind": "TrainJob", "quiet": True, **dataclasses.asdict(job)}))
    assert _main(str(file), str(result)) == AuditError.exit_code
    assert json.loads(result.read_text())["error"] == "AuditError"
    assert not (tmp_path / "out" / "policy").exists()
    right = dataclasses.replace(job, policy=str(changed))
    (tmp_path / "changed" / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    (tmp_path / "changed" / "tokenizer_config.json").write_bytes((tiny / "tokenizer_config.json").read_bytes())
    file.write_text(json.dumps({"kind": "TrainJob", "quiet": True, **dataclasses.asdict(right)}))
    assert _main(str(file), str(result)) == 0
    assert json.loads(result.read_text())["audit/mean_difference"] < 1e-4


def test_a_damaged_reference_file_is_never_used(tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    ReferenceLogps(torch.ones(3), torch.zeros(3)).save(path, {})
    tensors = load_file(path)
    save_file({**tensors, "chosen": tensors["chosen"] + 1}, path)
    with pytest.raises(store.StorageError, match="damaged"):
        ReferenceLogps.load(path, {})
