"""Memory in the dry run: counted as the trainer counts, of models that are here and of those whose config alone can be had."""

import io
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from rewards import make_reward_model
from rich.console import Console
from test_plan import printed, recipe_of
from tiny import make_tiny_model

from selfplay import plan_machine
from selfplay.plan import make_plan, print_plan
from selfplay.plan_machine import Machine, this_machine
from selfplay.plan_memory import PROCESS_BYTES, Phase, memory_lines, phases
from selfplay.plan_models import ModelFacts, facts_in, facts_of_config, find_model, hub_answers, model_facts
from selfplay.recipe_train import LoraRecipe
from selfplay.train.devices import read_devices
from selfplay.train.settings import settings_at
from selfplay.train.sizes import CPU_PACK_TOKENS, SIZES

ID = "someone/some-model"
LAPTOP = Machine(memory=16 * 10**9)
GPUS = Machine(memory=10**12, gpus=(80 * 10**9, 79 * 10**9), bf16=True)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub can be reached, and nothing was ever fetched from one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def memory_of(recipe: Any, machine: Machine, config: str | None = None) -> dict[str, Phase]:
    settings = [settings_at(recipe.train, index, bf16=recipe.train.bf16 is True) for index in range(recipe.rounds)]
    devices = read_devices(config) if config is not None else None
    found = phases(recipe, facts_in(Path(recipe.model)), settings, devices, machine)
    assert [one.total for one in found] == sorted((one.total for one in found), reverse=True)
    return {one.name: one for one in found}


def part(phase: Phase, name: str) -> float:
    (size,) = (size for what, size in phase.parts if what.startswith(name))
    return size


# what is known of a model


@pytest.mark.parametrize(
    ("family", "config"),
    [("llama", {}), ("llama", {"tie_word_embeddings": False}), ("gemma2", {"query_pre_attn_scalar": 32})],
    ids=["tied", "untied", "gemma2"],
)
def test_a_config_alone_says_what_the_weights_do(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", family=family, **config)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(model / "config.json", alone)
    found = facts_of_config(alone / "config.json")
    assert found is not None
    there = facts_in(model)
    assert found.shapes == there.shapes
    assert (found.dimensions, found.stored) == (there.dimensions, "float32")
    adapter = LoraRecipe(r=4, lora_alpha=8)
    assert found.num_trained(adapter) == there.num_trained(adapter)


def test_a_reward_models_config_says_what_its_weights_do(tmp_path: Path) -> None:
    model = make_reward_model(tmp_path)
    found = facts_of_config(model / "config.json", classifier=True)
    assert found is not None
    assert found.num_parameters == facts_in(model).num_parameters


def test_a_kind_of_model_that_transformers_lacks_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_kind_of_model"}))
    assert facts_of_config(tmp_path / "config.json") is None


def test_a_snapshot_of_the_config_alone_is_no_model_that_is_here(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copy(tiny / "config.json", tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(tmp_path))
    asked = []

    def fetch(model: str, file: str, *, revision: str | None = None) -> str:
        asked.append((model, file, revision))
        return str(tmp_path / file)

    monkeypatch.setattr("selfplay.plan_models.hub_answers", lambda: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    assert find_model(ID) is None
    found = model_facts(ID, "old")
    assert asked == [(ID, "config.json", "old")]
    assert found is not None
    assert found.num_parameters == facts_in(tiny).num_parameters


def test_the_plan_of_a_model_that_is_not_here_has_its_disk_and_memory(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None
) -> None:
    here = make_plan(recipe_of(tmp_path, tiny), tmp_path / "run")
    away = recipe_of(tmp_path, Path(ID))
    unknown = make_plan(away, tmp_path / "run")
    assert unknown.bytes_needed is None
    assert f"training: unknown: {ID} is not on this machine" in printed(unknown)
    assert "warning" not in printed(unknown)
    monkeypatch.setattr("selfplay.plan_models.hub_answers", lambda: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda model, file, **_: str(tiny / file))
    known = make_plan(away, tmp_path / "run")
    assert known.bytes_needed == here.bytes_needed
    assert [one.parts for one in known.memory] == [one.parts for one in here.memory]


@pytest.mark.parametrize("error", [OSError("no route"), PermissionError("gated")], ids=["network", "gate"])
def test_a_hub_that_gives_nothing_is_no_error(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None
) -> None:
    def refuse(*arguments: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr("selfplay.plan_models.hub_answers", lambda: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    assert model_facts(ID) is None


def test_a_hub_is_asked_where_one_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(
        ("127.0.0.1", 0), BaseHTTPRequestHandler
    ) as server:  # knows no method, and so answers with an error
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert hub_answers()
    assert not hub_answers(), "nobody listens any more"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "no address")
    assert not hub_answers()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not hub_answers()


# training


@pytest.mark.parametrize(
    ("optim", "each"), [("adamw_torch", 8), ("rmsprop", 4), ("adamw_bnb_8bit", 2)], ids=lambda value: str(value)
)
def test_weights_gradients_and_the_optimizers_state_are_counted(
    optim: str, each: int, tiny: Path, tmp_path: Path
) -> None:
    facts = facts_in(tiny)
    training = memory_of(recipe_of(tmp_path, tiny, train={"optim": optim}), LAPTOP)["training"]
    wide = (8 - each) * facts.num_in_tables if optim == "adamw_bnb_8bit" else 0
    assert facts.num_in_tables > 0
    assert part(training, "weights") == part(training, "gradients") == 4 * facts.num_parameters
    assert part(training, "optimizer") == each * facts.num_parameters + wide
    assert (training.room, training.where) == (LAPTOP.memory, "this machine has")


def test_an_adapter_has_gradients_and_state_of_its_own_alone(tiny: Path, tmp_path: Path) -> None:
    facts, adapter = facts_in(tiny), LoraRecipe(r=4, lora_alpha=8)
    sizes = {}
    for quantized in (False, True):
        lora = {**adapter.model_dump(), "load_in_4bit": quantized}
        training = memory_of(recipe_of(tmp_path, tiny, train={"lora": lora, "bf16": True}), LAPTOP)["training"]
        trained = facts.num_trained(adapter)
        assert part(training, "gradients") == 4 * trained
        assert part(training, "optimizer") == 8 * trained
        sizes[quantized] = part(training, "weights")
    assert sizes[False] == 4 * trained + 2 * facts.num_parameters
    assert sizes[False] - sizes[True] == pytest.approx((2 - 0.52) * facts.num_in_linear)


def test_sharding_cuts_what_copies_repeat(tiny: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tiny)
    alone, copied, cut = (memory_of(recipe, GPUS, c)["training"] for c in (None, "eight_gpus", "eight_gpus_fsdp2"))
    for name in ("weights", "gradients", "optimizer"):
        assert part(copied, name) == part(alone, name) == 8 * part(cut, name)
    assert part(cut, "gathered") > 0
    assert (alone.where, cut.where, cut.room) == ("the GPU has", "each GPU has", GPUS.gpus[1])


def test_processes_on_a_cpu_share_its_memory(tiny: Path, tmp_path: Path) -> None:
    config = tmp_path / "two.yaml"
    config.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n")
    recipe = recipe_of(tmp_path, tiny)
    alone, two = memory_of(recipe, GPUS)["training"], memory_of(recipe, GPUS, str(config))["training"]
    assert part(two, "weights") == 2 * part(alone, "weights")
    assert part(two, "processes") == 2 * PROCESS_BYTES
    assert two.room == GPUS.memory


def test_a_pack_holds_no_more_than_the_trainers_budget(tiny: Path, tmp_path: Path) -> None:
    def tokens(machine: Machine, **train: Any) -> int:
        recipe = recipe_of(tmp_path, tiny, train={"batch_size": 1000, **train})
        (name,) = (what for what, _ in memory_of(recipe, machine)["training"].parts if what.startswith("a pack"))
        return int(name.split()[3])

    assert tokens(LAPTOP) == CPU_PACK_TOKENS
    assert tokens(GPUS) == SIZES[0]
    assert tokens(GPUS, max_pack_tokens=777) == 777
    assert tokens(LAPTOP, batch_size=2) == 2 * (64 + 2 * 10), "a step that is smaller"
    assert tokens(LAPTOP, max_pack_tokens=1) == 64 + 2 * 10, "a pair is never cut"
    gpu = memory_of(recipe_of(tmp_path, tiny), GPUS)["training"]
    assert gpu.note == "packs then take up to 80% of what is left"


def test_another_reference_is_held_beside_the_policy_before_training(tiny: Path, tmp_path: Path) -> None:
    count = facts_in(tiny).num_parameters
    assert "reference pass" not in memory_of(recipe_of(tmp_path, tiny), LAPTOP)
    for reference in ("initial", str(tiny)):
        found = memory_of(recipe_of(tmp_path, tiny, train={"reference": reference}), LAPTOP)["reference pass"]
        assert found.total == 8 * count + PROCESS_BYTES
    assert "reference pass" not in memory_of(
        recipe_of(tmp_path, tiny, rounds=1, train={"reference": "initial"}), LAPTOP
    )


def test_kl_is_a_phase_only_where_the_panel_computes_one(tiny: Path, tmp_path: Path) -> None:
    def found(**evaluate: Any) -> bool:
        return "KL to the initial policy" in memory_of(recipe_of(tmp_path, tiny, evaluate=evaluate), LAPTOP)

    assert found()
    assert not found(temperature=0.7)
    assert not found(kl=False)


# engines


def test_an_engine_holds_weights_and_its_cache(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = facts_in(tiny).num_parameters

    def sampling(machine: Machine, **generator: Any) -> Phase:
        return memory_of(recipe_of(tmp_path, tiny, generator=generator), machine)["sampling"]

    assert "sampling" not in memory_of(recipe_of(tmp_path, tiny), LAPTOP)  # scripted
    own = sampling(LAPTOP, kind="transformers", max_batch_size=3)
    assert part(own, "weights in float32") == 4 * count  # this laptop has no bf16
    assert part(own, "cache") == 3 * (64 + 10) * 2 * 2 * 32 * 4  # two layers, keys and values of one head of 32
    assert part(sampling(LAPTOP, kind="transformers", dtype="bfloat16"), "weights in bfloat16") == 2 * count
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    two = sampling(LAPTOP, kind="vllm", data_parallel_size=2)
    assert part(two, "cache") == 2 * 3 * 2**30
    assert part(two, "weights in bfloat16") == 2 * 2 * count
    shared = sampling(GPUS, kind="vllm", tensor_parallel_size=2, gpu_memory_utilization=0.5)
    assert part(shared, "weights in bfloat16") == count
    assert shared.room == 0.5 * GPUS.gpus[1]


def test_judges_with_models_of_their_own_are_phases(tiny: Path, tmp_path: Path) -> None:
    reward = make_reward_model(tmp_path / "reward")
    judges = [{"kind": "reward_model", "model": str(reward)}, {"kind": "llm", "model": str(tiny)}]
    judges += [{"kind": "llm", "template": "yes_no", "verdict": "labels"}]
    recipe = recipe_of(
        tmp_path,
        tiny,
        generator={"kind": "transformers"},
        judge={"kind": "combine", "how": "min", "normalize": "rank", "judges": judges},
        evaluate={"judge": judges[0]},
    ).model_copy()
    found = memory_of(recipe, LAPTOP)
    assert {name for name in found if name.startswith("judge")} == {f"judge {reward}", f"judge {tiny}"}
    assert part(found[f"judge {reward}"], "weights") == 4 * facts_in(reward).num_parameters
    assert part(found[f"judge {tiny}"], "weights") == part(found["sampling"], "weights")


# what is said


def test_phases_are_printed_from_the_largest_with_a_warning_of_each_that_can_not_fit(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, tiny, generator={"kind": "transformers"})
    plan = make_plan(recipe, tmp_path / "run")
    assert "warning" not in printed(plan)
    least = min(one.total for one in plan.memory)
    monkeypatch.setattr("selfplay.plan.this_machine", lambda: Machine(memory=int(least) + 1))
    stream = io.StringIO()
    print_plan(make_plan(recipe, tmp_path / "run"), Console(file=stream, width=200))
    lines = stream.getvalue().splitlines()
    named = [line.split(":")[0].strip() for line in lines[lines.index("memory, about; one phase at a time:") + 1 :]]
    assert named[: len(plan.memory)] == [one.name for one in plan.memory]
    warned = [line.removeprefix("warning: ").split(" can't fit")[0] for line in lines if "can't fit" in line]
    assert warned == [one.name for one in plan.memory[:-1]]


def test_a_schedule_longer_than_the_round_is_said(tiny: Path, tmp_path: Path) -> None:
    text = printed(make_plan(recipe_of(tmp_path, tiny, train={"schedule_epochs": 18}), tmp_path / "run"))
    assert "linear over 18 epochs" in text


def test_a_machine_says_what_it_has_without_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho '0, GPU-a, 81559'\necho '1, GPU-b, 40960'\necho '2, GPU-c, [N/A]'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    limit = tmp_path / "memory.max"
    limit.write_text("1000000\n")
    monkeypatch.setattr(plan_machine, "CGROUP", limit)
    assert this_machine().gpus == (81559 * 2**20, 40960 * 2**20)
    assert this_machine().memory == 1_000_000
    limit.write_text("max\n")
    assert (this_machine().memory or 0) > 1_000_000
    for visible, count in (("1", 1), ("GPU-a,GPU-b", 2), ("", 0), ("GP", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert len(this_machine().gpus) == count
    command.write_text("#!/bin/sh\necho '0, GPU-8932f937-d72c, 81559'\necho '1, GPU-51f0-8932, 40960'\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937")
    assert this_machine().gpus == (81559 * 2**20,)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-51f0")
    assert this_machine().gpus == (None,)
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert this_machine().gpus == ()


def test_a_part_of_a_gpu_is_a_gpu_whose_memory_is_unknown(tiny: Path, tmp_path: Path) -> None:
    part = Machine(memory=16 * 10**9, gpus=(None,), bf16=True)
    recipe = recipe_of(tmp_path, tiny, generator={"kind": "transformers"})
    found, whole = memory_of(recipe, part), memory_of(recipe, GPUS)
    assert {one.name: one.parts for one in found.values()} == {one.name: one.parts for one in whole.values()}
    assert all(one.fits for one in found.values())
    lines = [line for line in memory_lines(list(found.values())) if "the GPU has memory of unknown size" in line]
    assert len(lines) == len(found)


def test_the_smallest_gpu_is_what_counts() -> None:
    assert (GPUS.gpu, LAPTOP.gpu) == (79 * 10**9, None)
    assert (GPUS.has_gpu, LAPTOP.has_gpu) == (True, False)
    assert ModelFacts({}, {}).dimensions is None
