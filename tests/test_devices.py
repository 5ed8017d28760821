"""accelerate's configurations: those that ship parse, others may be refused, and two processes train as one does."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from jobs import flat, random_pairs, weights
from scripted_run import ok, write_recipe

from selfplay import store
from selfplay.cli import main
from selfplay.errors import RecipeError
from selfplay.recipe_file import recipe_folder
from selfplay.train.devices import read_devices
from selfplay.types import PreferencePair

SHIPPED = {
    "one_gpu": (1, 1, False),
    "eight_gpus": (8, 1, False),
    "eight_gpus_fsdp2": (8, 1, True),
    "fsdp2_nodes": (16, 2, True),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_configuration_that_ships_parses_here_and_in_accelerate(name: str) -> None:
    path = recipe_folder() / "accelerate" / f"{name}.yaml"
    theirs, ours = load_config_from_file(str(path)), read_devices(name)
    assert (ours.num_processes, ours.num_machines, ours.sharded) == SHIPPED[name]
    assert (theirs.num_processes, theirs.num_machines) == SHIPPED[name][:2]
    assert (theirs.distributed_type == "FSDP") == ours.sharded
    assert ours == read_devices(str(path))


def test_every_file_of_the_folder_is_one_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert {f.stem for f in (recipe_folder() / "accelerate").iterdir()} == set(SHIPPED)
    ok("recipes")
    assert not [name for name in SHIPPED if name in capsys.readouterr().out]


CPU = {"distributed_type": "MULTI_CPU", "use_cpu": True, "num_processes": 2, "num_machines": 1, "mixed_precision": "no"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "deepspeed": ({"distributed_type": "DEEPSPEED"}, "DEEPSPEED is none of"),
    "fp16": ({"mixed_precision": "fp16"}, r"train\.bf16"),
    "fsdp1": ({"distributed_type": "FSDP", "use_cpu": False}, "fsdp_version must be 2"),
    "offload": ({"fsdp_config": {"fsdp_offload_params": True}}, "offload"),
    "uneven": ({"num_machines": 3}, "2 processes can't be spread over 3 machines"),
    "a word": ({"num_processes": "two"}, "num_processes must be a whole number of 1 or more, not 'two'"),
    "few gpus": ({"gpu_ids": "0"}, "gpu_ids names 0, too few for 2 processes"),
    "elastic": ({"rdzv_backend": "c10d"}, "rdzv_backend must be static"),
    "cloud": ({"compute_environment": "AMAZON_SAGEMAKER"}, "compute_environment must be LOCAL_MACHINE"),
    "compile": ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "dynamo_config: nothing that"),
    "misspelt": ({"num_proceses": 4}, "num_proceses: nothing that selfplay's trainer does; leave it out"),
    "half": ({"use_cpu": "half"}, "use_cpu must be true or false, not 'half'"),
    "port": ({"main_process_port": "http"}, "main_process_port must be a whole number"),
    "list": ({"fsdp_config": ["fsdp_version"]}, "fsdp_config must be a mapping"),
    "ignored modules": ({"fsdp_config": {"fsdp_ignored_modules": "head"}}, "fsdp_ignored_modules: nothing that"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_trainer_does_not_do_is_refused(what: str, tmp_path: Path) -> None:
    changes, said = REFUSED[what]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**CPU, **changes}))
    with pytest.raises(RecipeError, match=said):
        read_devices(str(path))


def test_a_field_that_is_not_read_is_named_and_one_that_asks_for_nothing_is_not(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    written = {"debug": False, "downcast_bf16": "no", "tpu_env": [], "machine_rank": 0, "dynamo_config": {}}
    path.write_text(yaml.safe_dump({**CPU, **written, "main_training_function": "main", "fsdp_config": {}}))
    assert read_devices(str(path)).lines == [f"training on {read_devices(str(path)).line}"]
    sharded = {"fsdp_version": 2, "fsdp_state_dict_type": "SHARDED_STATE_DICT", "fsdp_reshard_after_forward": True}
    config = {**CPU, "distributed_type": "FSDP", "use_cpu": False, "mixed_precision": "bf16", "fsdp_config": sharded}
    path.write_text(yaml.safe_dump({**config, "enable_cpu_affinity": True}))
    said = read_devices(str(path)).lines[0]
    assert said.startswith(
        "config.yaml: not read: enable_cpu_affinity (no process is bound to cores), fsdp_state_dict_type ("
    )
    assert said.endswith(", mixed_precision (train.bf16 says)")
    path.write_text(yaml.safe_dump({**CPU, "fsdp_config": sharded}))
    assert read_devices(str(path)).unread == ("fsdp_config (without distributed_type FSDP)",)


def test_what_is_said_in_words_counts_as_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    sharded = {"fsdp_version": 2, "fsdp_reshard_after_forward": "no", "fsdp_offload_params": "false"}
    layers = {"fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer, LlamaMLP"}
    path.write_text(
        yaml.safe_dump({**CPU, "distributed_type": "FSDP", "use_cpu": "no", "fsdp_config": sharded | layers})
    )
    found = read_devices(str(path))
    assert (found.use_cpu, found.reshard_after_forward) == (False, False)
    assert found.layers == ("LlamaDecoderLayer", "LlamaMLP")
    path.write_text(yaml.safe_dump({"distributed_type": "MULTI_CPU", "num_processes": 2}))
    assert read_devices(str(path)).use_cpu


@pytest.mark.parametrize(
    "config",
    [CPU, {"distributed_type": "MULTI_GPU", "num_processes": 8, "gpu_ids": "0,1,2,3,4,5,6,7", "debug": True}, {}],
    ids=["cpus", "gpus", "one"],
)
def test_the_launcher_is_told_what_was_read_and_nothing_else(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"use_cpu": False, **config}))
    ours = read_devices(str(tmp_path / "config.yaml"))
    (tmp_path / "launched.json").write_text(json.dumps(ours.launched))
    theirs = load_config_from_file(str(tmp_path / "launched.json"))
    assert (theirs.num_processes, theirs.num_machines) == (ours.num_processes, 1)
    assert (theirs.use_cpu, theirs.gpu_ids, theirs.debug) == (ours.use_cpu, config.get("gpu_ids", "all"), False)
    assert (theirs.distributed_type == "MULTI_GPU") == (ours.num_processes > 1)


EIGHT_BIT = {"optim": "adamw_bnb_8bit"}
FOUR_BIT = {"lora": {"r": 4, "lora_alpha": 8, "load_in_4bit": True}}


@pytest.mark.parametrize("train", [EIGHT_BIT, FOUR_BIT], ids=["optimizer", "weights"])
def test_what_can_not_be_cut_over_processes_is_refused_at_the_start(
    train: dict[str, Any], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny, train={"learning_rate": 1e-3, **train})
    command = ["iterate", str(recipe), "--out", str(tmp_path / "run"), "--accelerate-config"]
    for more in ([], ["--dry-run"]):
        assert main([*command, "fsdp2_nodes", *more]) == 64
        assert "can't be cut over processes" in capsys.readouterr().err
    ok(*command, "eight_gpus", "--dry-run")


def test_several_machines_need_slurm_and_that_is_said_at_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny)
    run = tmp_path / "run"
    command = ["iterate", str(recipe), "--out", str(run), "--accelerate-config", "fsdp2_nodes"]
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert main(command) == 64
    assert "through SLURM alone: submit recipes/accelerate/fsdp2_nodes.sbatch" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(command) == 64
    assert "with srun, which is not found here" in capsys.readouterr().err
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    for node in (None, "1"):
        monkeypatch.delenv("SLURM_NODEID", raising=False)
        if node is not None:
            monkeypatch.setenv("SLURM_NODEID", node)
        assert main(command) == 64
        assert "meet on the first one of the job" in capsys.readouterr().err
    assert not (run / "recipe.yaml").exists()
    files = {"launched": tmp_path / "launched", "failed": tmp_path / "failed"}
    assert read_devices("fsdp2_nodes").command("m", [], **files)[:3] == ["srun", "--nodes", "2"]


def test_a_dry_run_says_what_each_process_holds(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, tiny)
    ok("iterate", recipe, "--out", tmp_path / "run", "--dry-run", "--accelerate-config", "fsdp2_nodes")
    assert "16 processes on 2 machines, each holds 1/16 of policy" in capsys.readouterr().out
    assert main(["iterate", str(recipe), "--accelerate-config", "nine_gpus"]) == 64
    assert "neither a file nor one of eight_gpus, eight_gpus_fsdp2, fsdp2_nodes, one_gpu" in capsys.readouterr().err


# Starts a command on "machines" that are all this one, as SLURM would on several; one that fails ends the others.
SRUN = """#!{python}
import os, signal, subprocess, sys
assert sys.argv[1:7] == ["--nodes", "2", "--ntasks-per-node", "1", "--cpu-bind=none", "--kill-on-bad-exit=1"], sys.argv
nodes = [
    subprocess.Popen(sys.argv[7:], env=os.environ | {{"SLURM_NODEID": str(n)}}, stdin=subprocess.DEVNULL) for n in range(2)
]
_, status = os.wait()
if status:
    [node.terminate() for node in nodes if node.poll() is None]
codes = [node.wait() for node in nodes]
sys.exit(int(status != 0 or any(codes)))
"""


@pytest.mark.slow
def test_two_machines_train_as_one_process_does(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/srun").write_text(SRUN.format(python=sys.executable))
    (tmp_path / "bin/srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NODEID", "0")
    recipe = write_recipe(tmp_path, tiny)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({**CPU, "num_machines": 2}))
    store.write_records(tmp_path / "pairs.jsonl", random_pairs(num_prompts=5), PreferencePair)
    arguments = ["train", recipe, "--model", tiny, "--pairs", tmp_path / "pairs.jsonl", "--out"]
    ok(*arguments, tmp_path / "one")
    ok(*arguments, tmp_path / "two", "--accelerate-config", tmp_path / "two.yaml")
    assert "training on 2 processes on 2 machines" in capfd.readouterr().err
    one, two = (flat(tmp_path / name / "policy") for name in ("one", "two"))
    assert (one - two).norm() <= 1e-5 * one.norm()


@pytest.mark.slow
def test_train_on_two_processes_gives_the_policy_of_one(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, tiny)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(CPU))
    rows = [{"prompt": f"Add {n}.", "chosen": f"It is {n}.", "rejected": "No."} for n in range(5)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    arguments = ["train", recipe, "--model", tiny, "--pairs", tmp_path / "data.json", "--out"]
    two = ["--accelerate-config", tmp_path / "two.yaml"]
    ok(*arguments, tmp_path / "one")
    ok(*arguments, tmp_path / "two", *two)
    assert "training on 2 processes, each holds the policy" in capfd.readouterr().err
    one, both = weights(tmp_path / "one/policy"), weights(tmp_path / "two/policy")
    for name, wanted in one.items():
        assert (both[name] - wanted).norm() <= 1e-5 * wanted.norm()
    assert not (tmp_path / "two" / "processes.unfinished").exists()
    # an error of the ranks is ours, by its name and exit code
    monkeypatch.setenv("SELFPLAY_FAULT", "train.loss@2=nan")
    assert main([str(a) for a in (*arguments, tmp_path / "bad", *two)]) == 76
    assert "error: the loss of pairs with prompts" in capfd.readouterr().err


@pytest.mark.slow
def test_a_run_on_two_processes_ends_with_the_policy_of_one(tiny: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(CPU))
    ok("iterate", recipe, "--out", tmp_path / "one")
    ok("iterate", recipe, "--out", tmp_path / "two", "--accelerate-config", tmp_path / "two.yaml")
    for index, start in enumerate((tiny, tmp_path / "one/round-000/policy")):
        one, two = (flat(tmp_path / name / f"round-{index:03d}/policy") for name in ("one", "two"))
        assert (one - two).norm() <= 1e-5 * one.norm()
        assert (one - two).norm() <= 0.01 * (one - flat(start)).norm(), "the policies have moved, and the same way"
        figures = json.loads((tmp_path / f"two/round-{index:03d}/round.json").read_text())
        assert figures["train"]["processes"] == "2 processes (DDP)"
    again = ["iterate", str(recipe), "--out", str(tmp_path / "two")]
    assert main(again) == 0, "a finished run is read by whatever trains"
