"""What a training job does to the weights, and what it refuses."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import job_of, pair_of, random_pairs, steps, train, weights
from tiny import END, make_tiny_model
from transformers import AutoModelForCausalLM

from selfplay import store
from selfplay.chat import Chat
from selfplay.errors import NonFiniteError, NoPairsError
from selfplay.train.loop import run_training
from selfplay.train.model import load_model
from selfplay.types import Message, PreferencePair, Prompt, prompt_id


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


class Watching:
    """Notes whether torch is told to be deterministic, whenever a job says how far it is."""

    def __init__(self) -> None:
        self.seen: set[bool] = set()

    def __call__(self, what: str, done: int, total: int) -> None:
        self.seen.add(torch.are_deterministic_algorithms_enabled())

    def note(self, text: str) -> None:
        raise AssertionError(text)


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
    assert not torch.equal(
        next(iter(weights(tmp_path / "one/out/policy").values())), next(iter(weights(tiny).values()))
    )
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


def test_save_dtype_is_what_the_policy_is_saved_in(tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path) -> None:
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


def test_full_determinism_holds_while_a_job_trains_and_changes_no_bit_on_a_cpu(
    tiny: Path, pairs: Sequence[PreferencePair], tmp_path: Path
) -> None:
    for name, wanted in (("plain", False), ("asked", True)):
        watching = Watching()
        run_training(job_of(tmp_path / name, tiny, pairs, full_determinism=wanted, max_steps=2), watching)
        assert watching.seen == {wanted}
        assert not torch.are_deterministic_algorithms_enabled()
    assert same_bytes(tmp_path / "plain" / "out" / "policy", tmp_path / "asked" / "out" / "policy")


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
    made = [dataclasses.replace(p, rejected_token_ids=(*p.chosen_token_ids[:-1], 44, 1)) for p in made]
    train(tmp_path, model, made, num_train_epochs=25, learning_rate=3e-3)

    def end_logp(folder: Path) -> float:
        network = load_model(str(folder))
        pair = made[0]
        ids = torch.tensor([[*pair.prompt_token_ids, *pair.chosen_token_ids[:-1]]])
        with torch.no_grad():
            return float(network(input_ids=ids).logits[0, -1].log_softmax(-1)[end])

    assert chat.tokenizer.convert_ids_to_tokens(end) == END
    assert end_logp(tmp_path / "out" / "policy") > end_logp(model) + 1


def test_the_margin_of_a_training_is_that_of_its_last_epoch_as_the_accuracy_is(tiny: Path, tmp_path: Path) -> None:
    result = run_training(job_of(tmp_path, tiny, random_pairs(), batch_size=3, num_train_epochs=2))
    final = [row for row in steps(tmp_path) if row["epoch"] > 1]
    assert len(final) > 1
    for key in ("rewards/margins", "rewards/accuracies"):
        mean = sum(row[key] * row["num_pairs"] for row in final) / sum(row["num_pairs"] for row in final)
        assert result[key] == pytest.approx(mean)
