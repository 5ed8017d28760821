"""An accelerate configuration: how many processes train, what each holds, and the command that starts them. Loads no torch."""

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from selfplay.errors import RecipeError
from selfplay.recipe_file import recipe_folder

PLAIN = ("NO", "MULTI_GPU", "MULTI_CPU")


@dataclass(frozen=True, slots=True)
class Devices:
    """`layers` are class names of decoder layers, where the model's own are not wanted. `port` is None for any that is free."""

    config: Path
    num_processes: int
    num_machines: int = 1
    use_cpu: bool = False
    sharded: bool = False
    reshard_after_forward: bool = True
    layers: tuple[str, ...] | None = None
    port: int | None = None

    @property
    def line(self) -> str:
        """What trains, and what each process holds."""
        machines = f" on {self.num_machines} machines" if self.num_machines > 1 else ""
        if self.num_processes == 1:
            return "1 process, which holds the policy and its optimizer"
        if self.sharded:
            held = f"each holds 1/{self.num_processes} of policy, gradients and optimizer (FSDP2)"
        else:
            held = "each holds the policy, its gradients and its optimizer (DDP)"
        return f"{self.num_processes} processes{machines}, {held}"

    def command(self, module: str, arguments: list[str], *, failed: Path) -> list[str]:
        """`accelerate launch` of a module, which writes `failed` where a process fails. RecipeError where several machines are
        asked for outside a SLURM job.
        """
        wrapper = [sys.executable, "-P", "-m", "selfplay.train.ranks", str(os.getpid()), str(failed)]
        options = ["--config_file", str(self.config), "--main_process_port", str(self.port or free_port())]
        if self.num_processes > 1 and not self.sharded:
            options.append(
                "--multi_gpu"
            )  # on CPUs as well: else accelerate starts one process and leaves the rest to MPI
        launch = [*options, "-m", module, *arguments]
        if self.num_machines == 1:
            return [*wrapper, *launch]
        if "SLURM_JOB_ID" not in os.environ:
            raise RecipeError(
                f"{self.config}: num_machines is {self.num_machines}, and selfplay starts processes on other machines "
                "through SLURM alone: submit recipes/accelerate/fsdp2_nodes.sbatch, or one like it"
            )
        spread = ["srun", "--nodes", str(self.num_machines), "--ntasks-per-node", "1", "--kill-on-bad-exit=1"]
        return [*spread, *wrapper, "--main_process_ip", socket.gethostname(), *launch]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        port: int = free.getsockname()[1]
    return port


def read_devices(name: str) -> Devices:
    """A configuration that comes with selfplay, by name, or a file of `accelerate config`. RecipeError where it asks for what
    the trainer does not do.
    """
    folder = recipe_folder() / "accelerate"
    path = Path(name) if Path(name).is_file() else folder / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise RecipeError(f"--accelerate-config {name}: neither a file nor one of {names}")
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: no YAML ({error})") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: no accelerate configuration; make one with: accelerate config")
    kind, fsdp = str(data.get("distributed_type", "NO")).upper(), data.get("fsdp_config") or {}
    kind = "NO" if kind == "FALSE" else kind  # an unquoted NO is YAML's false
    processes, machines = int(data.get("num_processes", 1)), int(data.get("num_machines", 1))
    for wrong, change in _refused(data, kind, fsdp, processes, machines):
        if wrong:
            raise RecipeError(f"{path}: {change}")
    layers = fsdp.get("fsdp_transformer_layer_cls_to_wrap")
    return Devices(
        config=path.absolute(),
        num_processes=processes,
        num_machines=machines,
        use_cpu=bool(data.get("use_cpu", False)),
        sharded=kind == "FSDP",
        reshard_after_forward=bool(fsdp.get("fsdp_reshard_after_forward", True)),
        layers=tuple(layers.split(",") if isinstance(layers, str) else layers) if layers else None,
        port=data.get("main_process_port") or None,
    )


def _refused(
    data: dict[str, Any], kind: str, fsdp: dict[str, Any], processes: int, machines: int
) -> list[tuple[bool, str]]:
    """(whether it is so, what is wrong and what to change)."""
    is_fsdp, cpu = kind == "FSDP", bool(data.get("use_cpu", False))
    wrap = fsdp.get("fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP")
    return [
        (kind not in (*PLAIN, "FSDP"), f"distributed_type {kind} is none of {', '.join(PLAIN)}, FSDP"),
        (
            str(data.get("mixed_precision", "no")).lower() in ("fp16", "fp8"),
            "say mixed_precision: no; train.bf16 counts",
        ),
        (processes < 1 or processes % machines != 0, f"{processes} processes can't be spread over {machines} machines"),
        (kind == "NO" and processes > 1, "several processes need distributed_type MULTI_GPU, MULTI_CPU or FSDP"),
        (is_fsdp and str(fsdp.get("fsdp_version", 1)) != "2", "fsdp_version must be 2"),
        (is_fsdp and cpu, "accelerate does no FSDP on CPUs: take distributed_type MULTI_CPU"),
        (bool(fsdp.get("fsdp_offload_params", False)), "fsdp_offload_params must be false"),
        (
            bool(fsdp.get("fsdp_activation_checkpointing", False)),
            "say train.gradient_checkpointing in the recipe instead",
        ),
        (is_fsdp and wrap != "TRANSFORMER_BASED_WRAP", "fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP"),
        (bool(data.get("parallelism_config")), "parallelism_config is not supported: leave it out"),
    ]
