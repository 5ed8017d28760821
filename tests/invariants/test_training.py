"""What a training job does to the weights, and what it refuses."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import job_of, pair_of, random_pairs
from safetensors.torch import load_file, save_file
from tiny import END, make_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from selfplay import store
from selfplay.chat import Chat
from selfplay.errors import DataError, NonFiniteError, NoPairsError, StorageError
from selfplay.losses import PairLogps
from selfplay.train.kl import KLJob, run_kl
from selfplay.train.loop import run_training
from selfplay.train.model import load_model
from selfplay.types import Completion, Group, Message, PreferencePair, Prompt, prompt_id


def quiet(what: str, done: int, total: int) -> None:
    pass


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def steps(folder: Path) -> list[dict[str, Any]]:
    return store.read_json_lines(folder / "out" / "train" / "steps.jsonl")


def train(folder: Path, model: Path, pairs: Sequence[PreferencePair], **changes: Any) -> list[dict[str, Any]]:
    run_training(job_of(folder, model, pairs, **changes))
    return steps(folder)


def swapped(pair: PreferencePair) -> PreferencePair:
    return dataclasses.replace(
        pair,
        chosen=pair.rejected,
        rejected=pair.chosen,
        chosen_token_ids=pair.rejected_token_ids,
        rejected_token_ids=pair.chosen_token_ids,
        chosen_score=pair.rejected_score,
        rejected_score=pair.chosen_score,
    )


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files with the same bytes."""

    def files(folder: Path) -> dict[str, bytes]:
        return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}

    return files(one) == files(other)


def test_the_same_job_gives_the_same_bytes(tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path) -> None:
    for name in ("one", "two"):
        torch.rand(3)  # the global random state has no say
        run_training(job_of(tmp_path / name, tiny, pairs, num_train_epochs=2))
    assert same_bytes(tmp_path / "one" / "out", tmp_path / "two" / "out")
    assert not torch.equal(next(iter(weights(tmp_path / "one/out/policy").values())), next(iter(weights(tiny).values())))
    run_training(job_of(tmp_path / "other", tiny, pairs, num_train_epochs=2, job={"seed": 1}))
    assert not same_bytes(tmp_path / "one/out/policy", tmp_path / "other/out/policy")


def test_the_margin_flips_when_chosen_and_rejected_are_swapped(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    # one policy and one reference that is not it
    run_training(job_of(tmp_path / "before", tiny, pairs, max_steps=3, learning_rate=3e-3))
    policy, other = tmp_path / "before" / "out" / "policy", {"reference": str(tiny)}
    first = train(tmp_path / "as-is", policy, pairs, shuffle=False, job=other)[0]
    turned = train(tmp_path / "turned", policy, [swapped(p) for p in pairs], shuffle=False, job=other)[0]
    assert abs(first["rewards/margins"]) > 0.01
    assert turned["rewards/margins"] == pytest.approx(-first["rewards/margins"], rel=1e-5)
    assert turned["rewards/chosen"] == pytest.approx(first["rewards/rejected"], rel=1e-5)
    assert turned["logps/rejected"] == pytest.approx(first["logps/chosen"], rel=1e-6)


def test_training_prefers_the_chosen_completions(tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path) -> None:
    rows = train(tmp_path, tiny, pairs, num_train_epochs=4)
    assert rows[-1]["loss"] < 0.4
    assert rows[-1]["rewards/accuracies"] == 1
    assert rows[-1]["rewards/margins"] > 0.5


def test_the_policy_loads_in_transformers_with_the_trained_weights(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    train(tmp_path, tiny, pairs)
    policy = tmp_path / "out" / "policy"
    store.check_folder(policy)
    ids = torch.arange(6, 40)[None]
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(policy)(input_ids=ids).logits
        before = AutoModelForCausalLM.from_pretrained(tiny)(input_ids=ids).logits
    assert loaded.dtype == torch.float32
    assert (loaded - before).abs().max() > 1e-3
    assert {n: w.shape for n, w in weights(policy).items()} == {n: w.shape for n, w in weights(tiny).items()}
    assert Chat.load(str(policy)).template_digest_text == Chat.load(str(tiny)).template_digest_text
    # a second round starts where the first ended: its reference is the trained policy
    again = run_training(job_of(tmp_path / "next", policy, pairs))
    assert again["loss_first"] == pytest.approx(math.log(2), abs=1e-5)


def test_an_untied_head_is_trained_and_saved(pairs: Sequence[PreferencePair], tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", tie_word_embeddings=False)
    train(tmp_path, model, pairs)
    before, after = weights(model), weights(tmp_path / "out" / "policy")
    assert before.keys() == after.keys()
    assert "lm_head.weight" in after
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_save_dtype_is_what_the_policy_is_saved_in(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    train(tmp_path / "full", tiny, pairs)
    train(tmp_path / "half", tiny, pairs, save_dtype="bfloat16")
    full, half = weights(tmp_path / "full/out/policy"), weights(tmp_path / "half/out/policy")
    assert all(torch.equal(full[name].bfloat16(), half[name]) for name in full)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half/out/policy").dtype == torch.bfloat16


def test_the_template_of_the_recipe_travels_with_the_policy(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    template = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    run_training(job_of(tmp_path, tiny, pairs, job={"chat_template": template}, max_steps=1))
    assert Chat.load(str(tmp_path / "out" / "policy")).tokenizer.chat_template == template


def test_masters_keep_updates_below_the_spacing_of_bf16(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    rows = train(tmp_path, tiny, pairs, bf16=True, learning_rate=1e-6, lr_scheduler_type="constant")
    assert len(rows) == 3
    before, after = weights(tiny), weights(tmp_path / "out" / "policy")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert after[name].dtype == torch.float32
    moved = (after[name] - before[name]).abs()
    assert (moved > 0).float().mean() > 0.9
    # AdamW moves a weight by about the learning rate each step, in fp32 as in bf16
    assert moved.max() < 4e-6
    assert moved.median() > 5e-7
    assert (after[name].bfloat16() == before[name].bfloat16()).float().mean() > 0.99


def test_bf16_compute_follows_fp32(tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path) -> None:
    full = train(tmp_path / "full", tiny, pairs, num_train_epochs=2)
    half = train(tmp_path / "half", tiny, pairs, num_train_epochs=2, bf16=True)
    for one, other in zip(full, half, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=0.05)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.1)


def test_gradient_checkpointing_and_the_pack_cap_change_nothing(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    wanted = train(tmp_path / "plain", tiny, pairs)
    for name, change in (("checkpointed", {"gradient_checkpointing": True}), ("cut", {"max_pack_tokens": 30})):
        found = train(tmp_path / name, tiny, pairs, **change)
        for one, other in zip(wanted, found, strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert sum(r["num_tokens"] for r in found) > sum(r["num_tokens"] for r in wanted)


def test_a_weight_scales_what_its_pair_adds_to_the_loss(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    doubled = [dataclasses.replace(p, weight=2.0) for p in pairs]
    one = train(tmp_path / "one", tiny, pairs, max_grad_norm=1e9, max_steps=1)[0]
    two = train(tmp_path / "two", tiny, doubled, max_grad_norm=1e9, max_steps=1)[0]
    assert two["loss"] == pytest.approx(2 * one["loss"], rel=1e-5)
    assert two["grad_norm"] == pytest.approx(2 * one["grad_norm"], rel=1e-5)
    # weight 0 takes a pair out of the gradient, and not out of the mean
    half = [dataclasses.replace(p, weight=float(n % 2)) for n, p in enumerate(pairs)]
    zero = train(tmp_path / "half", tiny, half, max_steps=1, batch_size=12, shuffle=False)[0]
    assert zero["loss"] == pytest.approx(math.log(2) / 2, rel=1e-5)


def test_a_list_of_losses_is_their_weighted_sum(tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path) -> None:
    values: dict[str, Any] = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.25], "batch_size": 1}
    row = train(tmp_path, tiny, pairs, shuffle=False, max_steps=1, **values)[0]
    nll = -row["logps/chosen"] / len(pairs[0].chosen_token_ids)
    assert nll > 1
    assert row["loss"] == pytest.approx(math.log(2) + 0.25 * nll, rel=1e-5)


@pytest.mark.parametrize("weight", [1e39, 3e38])
def test_a_loss_or_a_gradient_that_is_not_finite_names_its_prompt_and_writes_no_policy(
    weight: float, tiny: Path, tmp_path: Path
) -> None:
    drawn = random_pairs(num_prompts=4, num_completions=2)
    drawn[2] = dataclasses.replace(drawn[2], prompt_id="the-bad-one", weight=weight)
    kind = "loss" if weight == 1e39 else "gradient"  # fp32 ends at 3.4e38
    with pytest.raises(NonFiniteError, match=f"the {kind} of .*the-bad-one") as caught:
        train(tmp_path, tiny, drawn, shuffle=False, batch_size=2)
    assert drawn[0].prompt_id not in str(caught.value)
    assert not (tmp_path / "out" / "policy").exists()


def test_max_steps_goes_on_into_further_epochs_or_stops_within_one(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    rows = train(tmp_path / "more", tiny, pairs, max_steps=5, batch_size=4, shuffle=False)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["epoch"] == pytest.approx(5 / 3, abs=1e-3)
    assert len(train(tmp_path / "less", tiny, pairs, max_steps=2, num_train_epochs=9)) == 2


def test_unshuffled_steps_follow_the_file(tiny: Path, tmp_path: Path) -> None:
    drawn = random_pairs(num_prompts=6, num_completions=2)
    # one pair a step: the chosen logps of step n are those of pair n under a rate too small to matter
    rows = train(tmp_path, tiny, drawn, shuffle=False, batch_size=1, learning_rate=1e-12)
    reference = load_file(tmp_path / "out" / "reference.safetensors")["chosen"]
    assert [row["logps/chosen"] for row in rows] == pytest.approx(reference.tolist(), rel=1e-5)
    assert len({round(float(x), 3) for x in reference}) == 6


def test_two_jobs_with_carried_state_and_the_runs_schedule_are_one_long_job(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    whole: dict[str, Any] = {"shuffle": False, "warmup_steps": 2, "lr_scheduler_type": "cosine"}
    long = job_of(tmp_path / "long", tiny, pairs, job={"reference": str(tiny)}, max_steps=6, **whole)
    run_training(long)
    one = job_of(
        tmp_path / "one",
        tiny,
        pairs,
        job={"reference": str(tiny), "keep_optimizer_state": True, "total_steps": 6},
        max_steps=3,
        **whole,
    )
    run_training(one)
    state = tmp_path / "one/out/train/optimizer.safetensors"
    following = {"policy": str(tmp_path / "one/out/policy"), "first_step": 3, "optimizer_state": str(state)}
    two = dataclasses.replace(one, **following, out=str(tmp_path / "two" / "out"))
    run_training(two)
    rates = [row["learning_rate"] for name in ("one", "two") for row in steps(tmp_path / name)]
    assert rates == [row["learning_rate"] for row in steps(tmp_path / "long")]
    assert rates[0] == 0
    assert max(rates) == pytest.approx(1e-3)
    long_policy, two_policy = weights(tmp_path / "long/out/policy"), weights(tmp_path / "two/out/policy")
    assert all(torch.equal(long_policy[name], two_policy[name]) for name in long_policy)
    fresh = dataclasses.replace(two, optimizer_state=None, out=str(tmp_path / "fresh" / "out"))
    run_training(fresh)
    fresh_policy = weights(tmp_path / "fresh/out/policy")
    assert not all(torch.equal(fresh_policy[name], two_policy[name]) for name in fresh_policy)


def test_optimizer_state_of_another_model_or_damaged_is_refused(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    state = tmp_path / "optimizer.safetensors"
    store.write_file(state, lambda path: save_file({"0/step": torch.tensor(1.0)}, path))
    with pytest.raises(DataError, match="optimizer state"):
        run_training(job_of(tmp_path, tiny, pairs, job={"optimizer_state": str(state)}))
    state.write_bytes(state.read_bytes()[:-1] + b"\xff")
    with pytest.raises(StorageError, match="damaged"):
        run_training(job_of(tmp_path, tiny, pairs, job={"optimizer_state": str(state)}))


@pytest.mark.parametrize("kind", ["linear", "constant", "constant_with_warmup", "cosine"])
def test_learning_rates_follow_the_schedule(
    kind: str, tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    rows = train(tmp_path, tiny, pairs, lr_scheduler_type=kind, warmup_steps=0.5, max_steps=4, learning_rate=1e-3)
    rates = [row["learning_rate"] for row in rows]
    wanted = {
        "linear": [0, 5e-4, 1e-3, 5e-4],
        "constant": [1e-3] * 4,
        "constant_with_warmup": [0, 5e-4, 1e-3, 1e-3],
        "cosine": [0, 5e-4, 1e-3, 5e-4],
    }
    assert rates == pytest.approx(wanted[kind], abs=1e-12)


def test_optimizers_differ_and_weight_decay_spares_norms(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    plain = {"max_steps": 1, "loss_type": "sigmoid"}
    train(tmp_path / "adamw", tiny, pairs, **plain)
    train(tmp_path / "rmsprop", tiny, pairs, optim="rmsprop", **plain)
    train(tmp_path / "decayed", tiny, pairs, weight_decay=0.5, **plain)
    adamw, rmsprop, decayed = (weights(tmp_path / n / "out/policy") for n in ("adamw", "rmsprop", "decayed"))
    matrix, norm = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    assert not torch.equal(adamw[matrix], rmsprop[matrix])
    assert torch.equal(adamw[norm], decayed[norm])
    assert torch.allclose(adamw[matrix] - decayed[matrix], weights(tiny)[matrix] * 1e-3 * 0.5, atol=1e-7)


def test_pairs_over_max_length_are_dropped_and_counted(tiny: Path, tmp_path: Path) -> None:
    drawn = [pair_of((0, 9, 9), (10,) * n + (1,), (11, 1)) for n in range(1, 9)]
    result = run_training(job_of(tmp_path, tiny, drawn, max_length=3 + 5))
    assert result["num_too_long"] == 4
    assert result["num_pairs"] == 4
    with pytest.raises(NoPairsError, match="max_length 4"):
        run_training(job_of(tmp_path / "none", tiny, drawn, max_length=4))


def test_every_pair_has_a_step_and_the_summary_counts_them(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    result = run_training(job_of(tmp_path, tiny, pairs, batch_size=5, num_train_epochs=2))
    rows = steps(tmp_path)
    assert sum(row["num_pairs"] for row in rows) == 2 * len(pairs)
    assert result["num_pairs"] == len(pairs)
    assert result["num_steps"] == len(rows)
    assert result["num_tokens"] == sum(row["num_tokens"] for row in rows)
    assert (result["loss_first"], result["loss_last"]) == (rows[0]["loss"], rows[-1]["loss"])
    assert store.read_json(tmp_path / "out/train/result.json") == result


def test_a_policy_learns_to_stop_where_pad_is_the_end_token(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", pad_is_eos=True)
    chat = Chat.load(str(model))
    end = chat.tokenizer.eos_token_id
    assert chat.tokenizer.pad_token_id == end
    made = []
    for question in ("Sing!", "And then, in the end?"):
        messages = (Message("user", question),)
        prompt = Prompt(prompt_id(messages), messages)
        ids = [chat.encode_completion(prompt, text) for text in ("no", "the thing and another")]
        assert all(tokens[-1] == end for tokens in ids)
        made.append(pair_of(chat.encode_prompt(prompt), *ids))
    # the words are equal; only the end tells chosen from rejected
    rejected = [dataclasses.replace(p, rejected_token_ids=(*p.chosen_token_ids[:-1], 44, 1)) for p in made]
    train(tmp_path, model, rejected, num_train_epochs=8, learning_rate=3e-3)

    def end_logp(folder: Path) -> float:
        network = load_model(str(folder))
        pair = made[0]
        ids = torch.tensor([[*pair.prompt_token_ids, *pair.chosen_token_ids[:-1]]])
        with torch.no_grad():
            return float(network(input_ids=ids).logits[0, -1].log_softmax(-1)[end])

    assert chat.tokenizer.convert_ids_to_tokens(end) == END
    assert end_logp(tmp_path / "out" / "policy") > end_logp(model) + 1


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


def test_log_ratios_are_policy_minus_reference() -> None:
    one, two, three, four, lengths = (torch.tensor([x]) for x in (-3.0, -5.0, -4.0, -4.5, 2.0))
    logps = PairLogps(one, two, three, four, lengths, lengths)
    assert logps.chosen_logratios_B.tolist() == [1.0]
    assert logps.rejected_logratios_B.tolist() == [-0.5]
