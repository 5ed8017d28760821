"""Whole runs on a model of 100,000 parameters: what a round is made of, and that stopping one anywhere loses nothing."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_tiny_model

import selfplay
from selfplay import store
from selfplay.chat import Chat
from selfplay.errors import DataError, LockedError, NoPairsError, RecipeError, StorageError, UnparsedGateError
from selfplay.lock import locked
from selfplay.recipe_file import check_recipe
from selfplay.rounds import iterate
from selfplay.types import Completion, Group, Message, PreferencePair, Prompt, prompt_id

TIMES = {"seconds.json", "metrics.jsonl", ".lock"}


class KilledError(BaseException):
    """Stands in for a kill: nothing in selfplay may catch it."""


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("rig")
    make_tiny_model(folder / "model")
    train = [{"prompt": f"Say something about number {n}.", "checks": _checks(n)} for n in range(24)]
    held = [{"prompt": f"Tell me of letter {c}.", "checks": _checks(n)} for n, c in enumerate("abcd")]
    for name, rows in (("train", train), ("held", held)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(folder / "model"),
        "rounds": 2,
        "prompts": {"source": str(folder / "train.jsonl"), "heldout": str(folder / "held.jsonl"), "num_prompts": 8},
        "generator": {"kind": "transformers", "num_completions": 4, "max_tokens": 12, "dtype": "float32"},
        "judge": {"kind": "verifier", "truncated_fails": False},
        "train": {"learning_rate": 1e-3, "batch_size": 4, "num_train_epochs": 2, "bf16": False},
        "evaluate": {"num_completions": 2},
    }


def _checks(n: int) -> list[dict[str, Any]]:
    return [{"kind": "contains", "any": ["a", "e"]}, {"kind": "contains", "any": [str(n % 10)]}]


def changed(recipe: dict[str, Any], **sections: dict[str, Any]) -> Any:
    """The rig's recipe with some keys replaced."""
    data = {key: dict(value) if isinstance(value, dict) else value for key, value in recipe.items()}
    for name, keys in sections.items():
        data[name] = {**data[name], **keys} if isinstance(keys, dict) and isinstance(data.get(name), dict) else keys
    return check_recipe(data, "rig")


def digests(run: Path) -> dict[str, str]:
    """Of every artifact but the wall clock's."""
    found = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file() and p.name.removesuffix(".sha256") not in TIMES):
        data = path.read_bytes()
        if path.name == "round.json":
            data = json.dumps({k: v for k, v in json.loads(data).items() if k != "seconds"}).encode()
        if path.name != "round.json.sha256":
            found[str(path.relative_to(run))] = hashlib.sha256(data).hexdigest()
    return found


# A model of random weights rarely ends a completion: pairs come from a judge and a selector that don't mind.
@selfplay.pointwise
def length(prompt: Prompt, completion: Completion) -> float:
    return float(len(completion.text))


class AnyPair:
    """The first two different completions, the higher score chosen, truncated or not."""

    def select(self, group: Group, judgement: Any) -> list[PreferencePair]:
        from selfplay.pairs import make_pair

        order = sorted(range(len(group.completions)), key=lambda i: judgement.scores[i])
        worst, best = order[0], order[-1]
        if group.completions[worst].text == group.completions[best].text:
            return []
        return [make_pair(group, chosen=best, rejected=worst, judgement=judgement)]


def play(recipe: Any, out: Path) -> dict[str, Any]:
    return iterate(recipe, out, judge=length, selector=AnyPair())


@pytest.fixture(scope="session")
def undisturbed(rig: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    play(changed(rig), out)
    return out


def test_a_run_leaves_the_files_that_the_readme_names(undisturbed: Path) -> None:
    for name in ("recipe.yaml", "run.json", "metrics.jsonl", "initial/eval.json", "round-000/prompts.jsonl"):
        assert (undisturbed / name).is_file()
    for name in ("pairs.jsonl", "reference.safetensors", "train/steps.jsonl", "eval.json", "round.json"):
        assert (undisturbed / "round-001" / name).is_file()
    store.check_folder(undisturbed / "round-001" / "policy")


def test_each_round_starts_from_the_policy_before_and_takes_it_as_reference(undisturbed: Path) -> None:
    first, second = (store.read_json(undisturbed / f"round-00{r}" / "round.json") for r in (0, 1))
    assert second["init"] == first["policy"] == second["reference"]["weights"]
    assert first["init"] == store.read_json(undisturbed / "run.json")["model"]
    assert len({first["init"], first["policy"], second["policy"]}) == 3


def test_the_first_loss_of_every_round_is_ln_2(undisturbed: Path) -> None:
    for r in (0, 1):
        first = store.read_json_lines(undisturbed / f"round-00{r}" / "train" / "steps.jsonl")[0]
        assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
        assert first["audit/zero_logratio"] == 0.0


def test_trainer_and_engine_agree_on_the_sampled_tokens(undisturbed: Path) -> None:
    for r in (0, 1):
        result = store.read_json(undisturbed / f"round-00{r}" / "train" / "result.json")
        assert result["audit/max_difference"] < 1e-3


def test_sampled_token_ids_are_trained_on_as_they_are(undisturbed: Path) -> None:
    groups = {g.prompt.id: g for g in store.read_records(undisturbed / "round-000" / "groups" / "00000.jsonl", Group)}
    pairs = store.read_records(undisturbed / "round-000" / "pairs.jsonl", PreferencePair)
    assert pairs
    for pair in pairs:
        group = groups[pair.prompt_id]
        assert pair.chosen_index is not None
        assert pair.rejected_index is not None
        assert pair.prompt_token_ids == group.prompt_token_ids
        assert pair.chosen_token_ids == group.completions[pair.chosen_index].token_ids
        assert pair.rejected_token_ids == group.completions[pair.rejected_index].token_ids


def test_rounds_are_dealt_different_prompts_and_rows_are_accounted_for(undisturbed: Path) -> None:
    dealt = [{p.id for p in store.read_records(undisturbed / f"round-00{r}/prompts.jsonl", Prompt)} for r in (0, 1)]
    assert not dealt[0] & dealt[1]
    for r in (0, 1):
        counts = store.read_json(undisturbed / f"round-00{r}" / "round.json")["counts"]
        assert counts["num_prompts"] == counts["num_pairs"] + sum(counts["num_prompts_without_pair"].values()) == 8
        assert counts["num_completions"] == 32


def test_status_has_the_figures_of_every_policy(undisturbed: Path) -> None:
    found = selfplay.status(undisturbed)
    assert found["initial"]["kl"] == 0.0
    assert [row["state"] for row in found["rounds"]] == ["done", "done"]
    for row in (found["initial"], *found["rounds"]):
        low, high = row["heldout_interval"]
        assert low <= row["heldout_score"] <= high
        assert row["entropy"] > 0
    difference = found["rounds"][-1]["heldout_score"] - found["initial"]["heldout_score"]
    assert found["gain"] == pytest.approx(difference)
    assert abs(found["rounds"][-1]["kl"]) > 0


def commits(monkeypatch: pytest.MonkeyPatch, stop_at: Callable[[Path], bool], *, before: bool) -> None:
    """Kills the run at the artifact that `stop_at` accepts, just before or just after it is there."""
    for name in ("write_bytes", "write_file", "write_folder"):
        real = getattr(store, name)

        def killing(path: Path, content: Any, real: Any = real) -> None:
            if before and stop_at(path):
                raise KilledError
            real(path, content)
            if not before and stop_at(path):
                raise KilledError

        monkeypatch.setattr(store, name, killing)
        if name == "write_folder":
            monkeypatch.setattr("selfplay.train.model.write_folder", killing)
        if name == "write_file":
            monkeypatch.setattr("selfplay.train.reference.write_file", killing)


POINTS = [
    "initial/heldout/temperature/00000.jsonl",
    "round-000/prompts.jsonl",
    "round-000/groups/00000.jsonl",
    "round-000/judgements/00000.jsonl",
    "initial/eval.json",
    "round-000/drops.jsonl",
    "round-000/pairs.jsonl",
    "round-000/reference.safetensors",
    "round-000/train/result.json",
    "round-000/policy",
    "round-001/groups/00000.jsonl",
    "round-000/round.json",
    "round-001/policy",
    "round-001/heldout/greedy/00000.jsonl",
    "round-001/eval.json",
]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("point", POINTS)
def test_a_run_killed_at_any_stage_ends_as_an_undisturbed_one(
    rig: dict[str, Any], undisturbed: Path, tmp_path: Path, point: str, before: bool
) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        commits(monkeypatch, lambda path: path == out / point, before=before)
        with pytest.raises(KilledError):
            play(changed(rig), out)
    assert (out / point).exists() is not before
    play(changed(rig), out)
    assert digests(out) == digests(undisturbed)


@pytest.fixture
def killed_process(rig: dict[str, Any], tmp_path: Path) -> Path:
    """A real process, killed while its second file of groups is being written."""
    script = tmp_path / "script.py"
    here = str(Path(__file__).parent)
    script.write_text(
        f"import sys, os, signal; sys.path.insert(0, {here!r})\n"
        "import json, test_rounds as t\n"
        "from selfplay import store\n"
        f"rig = json.loads({json.dumps(rig)!r})\n"
        "real = store.write_records\n"
        "def kill(path, records, kind):\n"
        "    if path.parts[-3:-1] == ('round-001', 'groups'):\n"
        "        path.parent.mkdir(parents=True); path.with_name(path.name + store.TEMPORARY).write_text('half')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(path, records, kind)\n"
        "store.write_records = kill\n"
        f"t.play(t.changed(rig), t.Path({str(tmp_path / 'run')!r}))\n"
    )
    code = subprocess.run(
        [sys.executable, str(script)], check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    ).returncode
    assert code == -signal.SIGKILL
    return tmp_path / "run"


def test_a_process_killed_with_a_half_written_file_is_continued(
    rig: dict[str, Any], undisturbed: Path, killed_process: Path
) -> None:
    play(changed(rig), killed_process)
    assert digests(killed_process) == digests(undisturbed)


def test_more_rounds_leave_the_first_ones_as_they_are(rig: dict[str, Any], undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    play(changed(rig, rounds=1), out)
    first = {k: v for k, v in digests(out).items() if k.startswith("round-000")}
    play(changed(rig), out)
    assert first.items() <= digests(out).items()
    ours, theirs = (load_file(run / "round-001/policy/model.safetensors") for run in (out, undisturbed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(RecipeError, match="rounds: 2 -> 1"):
        play(changed(rig, rounds=1), out)


def test_a_changed_recipe_is_refused_with_the_keys_that_differ(rig: dict[str, Any], undisturbed: Path) -> None:
    with pytest.raises(RecipeError, match=r"train.beta: 0.1 -> 0.2"):
        play(changed(rig, train={"beta": 0.2}), undisturbed)


def test_another_judge_is_refused(rig: dict[str, Any], undisturbed: Path) -> None:
    with pytest.raises(RecipeError, match="judge"):
        iterate(changed(rig), undisturbed, judge=selfplay.pointwise(lambda prompt, completion: 1.0), selector=AnyPair())


def test_a_damaged_file_is_found_and_never_used(rig: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        commits(monkeypatch, lambda path: path.name == "pairs.jsonl", before=False)
        with pytest.raises(KilledError):
            play(changed(rig, rounds=1), out)
    path = out / "round-000" / "pairs.jsonl"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match=r"pairs\.jsonl.*damaged"):
        play(changed(rig, rounds=1), out)


def test_a_second_process_is_told_who_works_on_the_run(rig: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    with locked(out), pytest.raises(LockedError, match=str(os.getpid())):
        play(changed(rig), out)


def test_too_many_missing_verdicts_stop_the_round_before_training(rig: dict[str, Any], tmp_path: Path) -> None:
    @selfplay.pointwise
    def sulky(prompt: Prompt, completion: Completion) -> float | None:
        return None

    with pytest.raises(UnparsedGateError, match=r"100\.0%"):
        iterate(changed(rig), tmp_path / "run", judge=sulky, selector=AnyPair())
    assert not (tmp_path / "run/round-000/policy").exists()


def test_a_run_that_the_gate_stopped_goes_on_with_a_wider_one_and_its_recipe_says_so(
    rig: dict[str, Any], tmp_path: Path
) -> None:
    @selfplay.pointwise
    def choosy(prompt: Prompt, completion: Completion) -> float | None:
        return float(len(completion.text)) if len(prompt.text) % 2 else None

    class Judged(AnyPair):
        def select(self, group: Group, judgement: Any) -> list[PreferencePair]:
            return [] if None in judgement.scores else super().select(group, judgement)

    out = tmp_path / "run"
    with pytest.raises(UnparsedGateError, match=r"goes on with another pairs\.max_unparsed"):
        iterate(changed(rig, rounds=1), out, judge=choosy, selector=Judged())
    judged = (out / "round-000/judgements/00000.jsonl").stat().st_mtime_ns
    iterate(
        changed(rig, rounds=1, pairs={"kind": "best_vs_worst", "max_unparsed": 1.0}),
        out,
        judge=choosy,
        selector=Judged(),
    )
    assert (out / "round-000/policy").is_dir()
    assert (out / "round-000/judgements/00000.jsonl").stat().st_mtime_ns == judged
    assert "max_unparsed: 1.0" in (out / "recipe.yaml").read_text()


def test_a_round_without_any_pair_stops_and_says_why(rig: dict[str, Any], tmp_path: Path) -> None:
    @selfplay.pointwise
    def indifferent(prompt: Prompt, completion: Completion) -> float | None:
        return 1.0

    with pytest.raises(NoPairsError, match="none of 8 prompts"):
        iterate(changed(rig), tmp_path / "run", judge=indifferent)


def test_reference_initial_keeps_the_first_weights_as_reference(rig: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    play(changed(rig, train={"reference": "initial"}), out)
    rounds = [store.read_json(out / f"round-00{r}" / "round.json") for r in (0, 1)]
    assert rounds[1]["reference"]["weights"] == rounds[0]["init"] != rounds[1]["init"]
    first = store.read_json_lines(out / "round-001" / "train" / "steps.jsonl")[0]
    assert abs(first["rewards/chosen"]) > 1e-4  # the policy has left the reference already


def references(out: Path) -> list[Any]:
    """What round.json says of the reference, a round each."""
    return [store.read_json(path)["reference"] for path in sorted(out.glob("round-*/round.json"))]


def test_a_reference_by_path_stays_the_same_in_every_round_and_may_lie_elsewhere(
    rig: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    copies = [tmp_path / name for name in ("one", "two")]
    for copy in copies:
        shutil.copytree(undisturbed / "round-001" / "policy", copy)
    out = tmp_path / "run"
    play(changed(rig, rounds=1, train={"reference": str(copies[0])}), out)
    play(changed(rig, train={"reference": str(copies[1])}), out)
    wanted = {"kind": str(copies[0]), "weights": store.weights_digest(copies[0]), "logps": "trainer"}
    assert references(out) == [wanted, {**wanted, "kind": str(copies[1])}]
    other = undisturbed / "round-000" / "policy"
    with pytest.raises(RecipeError, match="started with another reference"):
        play(changed(rig, train={"reference": str(other)}), out)
    with pytest.raises(RecipeError, match=r"train\.reference: .* -> 'prior'"):
        play(changed(rig), out)


def test_an_ema_of_the_reference_is_mixed_once_a_round_and_kept(rig: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    play(changed(rig, rounds=3, train={"reference": "ema", "ref_model_mixup_alpha": 0.3}), out)
    found = references(out)
    assert not (out / "round-000" / "reference").exists()
    folders = [Path(rig["model"]), out / "round-001" / "reference", out / "round-002" / "reference"]
    assert [entry["weights"] for entry in found] == [store.weights_digest(folder) for folder in folders]
    assert {(entry["kind"], entry["ref_model_mixup_alpha"]) for entry in found} == {("ema", 0.3)}
    before = load_file(folders[0] / "model.safetensors")
    for r in (1, 2):
        policy = load_file(out / f"round-00{r - 1}" / "policy" / "model.safetensors")
        mixed = load_file(folders[r] / "model.safetensors")
        for name in mixed:
            assert torch.allclose(mixed[name], 0.3 * policy[name] + 0.7 * before[name], atol=1e-6)
        before = mixed


def test_a_run_killed_beside_its_ema_ends_as_an_undisturbed_one(rig: dict[str, Any], tmp_path: Path) -> None:
    recipe, runs = changed(rig, train={"reference": "ema"}), (tmp_path / "whole", tmp_path / "killed")
    play(recipe, runs[0])
    point = runs[1] / "round-001" / "reference"
    with pytest.MonkeyPatch.context() as monkeypatch:
        commits(monkeypatch, lambda path: path == point, before=False)
        with pytest.raises(KilledError):
            play(recipe, runs[1])
    play(recipe, runs[1])
    assert digests(runs[1]) == digests(runs[0])


def test_the_engine_s_logps_can_be_the_reference_s(rig: dict[str, Any], undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    play(changed(rig, train={"reference_logps": "engine"}), out)
    assert [entry["logps"] for entry in references(out)] == ["engine", "engine"]
    ours, theirs = (load_file(run / "round-000" / "reference.safetensors") for run in (out, undisturbed))
    assert not torch.equal(ours["chosen"], theirs["chosen"])  # of another program
    assert torch.allclose(ours["chosen"], theirs["chosen"], atol=1e-3)
    for r in (0, 1):
        first = store.read_json_lines(out / f"round-00{r}" / "train" / "steps.jsonl")[0]
        assert 0 < first["audit/zero_logratio"] < 1e-3


@pytest.mark.parametrize("loss_type", ["sft", "simpo"])
def test_rounds_without_a_reference_have_none(loss_type: str, rig: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = play(changed(rig, train={"loss_type": loss_type}), out)
    assert references(out) == [None, None]
    assert not list(out.glob("round-*/reference*"))
    assert [row["state"] for row in found["rounds"]] == ["done", "done"]
    assert (found["rounds"][1]["train"]["rewards/accuracies"] is None) == (loss_type == "sft")
    digests_of = [store.read_json(out / f"round-00{r}" / "round.json")["policy"] for r in (0, 1)]
    assert len({*digests_of, store.weights_digest(Path(rig["model"]))}) == 3


class Rated(AnyPair):
    """The same pairs with win rates."""

    def select(self, group: Group, judgement: Any) -> list[PreferencePair]:
        return [
            dataclasses.replace(pair, chosen_win_rate=0.75, rejected_win_rate=0.5)
            for pair in super().select(group, judgement)
        ]


def test_sppo_takes_the_win_rates_of_the_selector_s_pairs(rig: dict[str, Any], tmp_path: Path) -> None:
    recipe = changed(rig, rounds=1, train={"loss_type": "sppo", "beta": 0.1})
    iterate(recipe, tmp_path / "run", judge=length, selector=Rated())
    first = store.read_json_lines(tmp_path / "run/round-000/train/steps.jsonl")[0]
    assert first["loss"] == pytest.approx(2.5**2, rel=1e-4)
    with pytest.raises(DataError, match="has no win rates"):
        iterate(recipe, tmp_path / "other", judge=length, selector=AnyPair())
    with pytest.raises(RecipeError, match="sppo reads win rates"):
        iterate(recipe, tmp_path / "third", judge=length)
    assert not (tmp_path / "third" / "initial").exists()


def test_the_schedule_and_the_optimizer_can_span_the_run(rig: dict[str, Any], tmp_path: Path) -> None:
    settings = {"max_steps": 3, "schedule_scope": "run", "optimizer_state": "carried", "shuffle": False}
    play(changed(rig, train=settings), tmp_path / "run")
    rates = [
        row["learning_rate"]
        for r in (0, 1)
        for row in store.read_json_lines(tmp_path / f"run/round-00{r}/train/steps.jsonl")
    ]
    assert rates == pytest.approx([1e-3 * (6 - n) / 6 for n in range(6)])
    state = load_file(tmp_path / "run/round-001/train/optimizer.safetensors")
    assert {float(v) for k, v in state.items() if k.endswith("step")} == {6.0}


def test_the_schedule_of_a_round_can_be_longer_than_the_round(rig: dict[str, Any], tmp_path: Path) -> None:
    settings = {"num_train_epochs": 1, "schedule_epochs": 3, "shuffle": False}
    play(changed(rig, rounds=1, train=settings), tmp_path / "run")
    rates = [row["learning_rate"] for row in store.read_json_lines(tmp_path / "run/round-000/train/steps.jsonl")]
    assert rates == pytest.approx([1e-3 * (1 - n / (3 * len(rates))) for n in range(len(rates))])
    assert len(rates) > 1


def test_a_pool_that_would_run_out_is_refused_before_the_first_round(rig: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="round 3 needs prompts 25 to 32"):
        play(changed(rig, rounds=4), tmp_path / "run")
    assert not (tmp_path / "run" / "initial").exists()


def test_prompts_that_are_too_long_are_missed_before_the_first_round(rig: dict[str, Any], tmp_path: Path) -> None:
    asked = (Message("user", "Say something about number 9."),)
    longest = len(Chat.load(rig["model"]).encode_prompt(Prompt(prompt_id(asked), asked)))
    recipe = changed(rig, prompts={"max_prompt_length": longest})  # leaves the ten of one digit, and 16 are needed
    with pytest.raises(RecipeError, match=r"round 1 needs prompts 9 to 16, but .* has 10 for training\. Lower"):
        play(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "initial").exists()


def test_spin_pairs_the_gold_answer_with_the_policys_completion(rig: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"instruction": f"Count to {n}.", "input": "", "output": f"One to {n}."} for n in range(1, 9)]
    source = tmp_path / "rows.json"
    source.write_text(json.dumps(rows))
    recipe = check_recipe(
        {
            **rig,
            "rounds": 1,
            "prompts": {"source": str(source), "heldout": 0.25, "num_prompts": 6},
            "judge": None,
            "pairs": {"kind": "gold_vs_completion"},
            "generator": {"kind": "transformers", "num_completions": 4, "max_tokens": 200},
            "evaluate": {"judge": {"kind": "rouge_l"}, "num_completions": 1},
        },
        "rig",
    )
    found = iterate(recipe, tmp_path / "run")
    pairs = store.read_records(tmp_path / "run/round-000/pairs.jsonl", PreferencePair)
    assert {p.chosen_index for p in pairs} == {None}
    assert all(p.chosen[0].content.startswith("One to") for p in pairs)
    assert found["rounds"][0]["heldout_score"] is not None
