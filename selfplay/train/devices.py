"""An accelerate configuration: how many processes train, what each holds, and the command that starts them. Loads no torch."""

import os
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from selfplay.errors import RecipeError
from selfplay.recipe_file import recipe_folder
from selfplay.recipe_train import TrainRecipe
from selfplay.train.device_fields import fsdp_fields, kind_of, switch, unread_fields, whole_number


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
    gpu_ids: str = "all"
    port: int | None = None
    unread: tuple[str, ...] = ()  # fields of the configuration that are not read, and why

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

    @property
    def lines(self) -> list[str]:
        """The same, and before it which fields of the configuration are not read."""
        unread = [f"{self.config.name}: not read: {', '.join(self.unread)}"] if self.unread else []
        return [*unread, f"training on {self.line}"]

    @property
    def launched(self) -> dict[str, Any]:
        """What accelerate's launcher is told: what was read, and nothing that it would take from elsewhere."""
        return {
            "compute_environment": "LOCAL_MACHINE",
            # on CPUs and with FSDP as well: it only starts processes, and of several on CPUs it would leave the rest to MPI
            "distributed_type": "MULTI_GPU" if self.num_processes > 1 else "NO",
            "num_processes": self.num_processes,
            "num_machines": self.num_machines,
            "use_cpu": self.use_cpu,
            "gpu_ids": self.gpu_ids,
            "mixed_precision": "no",
        }

    def command(self, module: str, arguments: list[str], *, launched: Path, failed: Path) -> list[str]:
        """`accelerate launch` of a module, by the file `launched`, which writes `failed` where a process fails."""
        wrapper = [sys.executable, "-P", "-m", "selfplay.train.ranks", str(os.getpid()), str(failed)]
        options = ["--config_file", str(launched), "--main_process_port", str(self.port or free_port())]
        launch = [*options, "-m", module, *arguments]
        if self.num_machines == 1:
            return [*wrapper, *launch]
        # one task starts all processes of a machine: some clusters would bind it, and so them, to a core
        spread = ["srun", "--nodes", str(self.num_machines), "--ntasks-per-node", "1", "--cpu-bind=none"]
        return [*spread, "--kill-on-bad-exit=1", *wrapper, "--main_process_ip", socket.gethostname(), *launch]


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
    processes, machines = (whole_number(path, data, key, 1) for key in ("num_processes", "num_machines"))
    unread = unread_fields(path, data)
    kind, fsdp, gpus = kind_of(data), fsdp_fields(path, data), data.get("gpu_ids")
    sharded = kind == "FSDP"
    layers = fsdp.get("fsdp_transformer_layer_cls_to_wrap")
    wrapped = layers.split(",") if isinstance(layers, str) else layers or ()
    return Devices(
        config=path.absolute(),
        num_processes=processes,
        num_machines=machines,
        use_cpu=switch(path, data, "use_cpu") or kind == "MULTI_CPU",
        sharded=sharded,
        reshard_after_forward=not sharded or switch(path, fsdp, "fsdp_reshard_after_forward", default=True),
        layers=tuple(name.strip() for name in wrapped) or None,
        gpu_ids="all" if gpus is None else gpus,
        port=whole_number(path, data, "main_process_port", 1) if data.get("main_process_port") else None,
        unread=unread,
    )


def require_machines(devices: Devices | None) -> None:
    """RecipeError where several machines are asked for, and nothing here starts processes on the others, or this is not the
    machine whose process 0 they will look for.
    """
    if devices is None or devices.num_machines == 1:
        return
    asked = f"{devices.config}: num_machines is {devices.num_machines}, and selfplay starts processes on other machines"
    if "SLURM_JOB_ID" not in os.environ:
        raise RecipeError(f"{asked} through SLURM alone: submit recipes/accelerate/fsdp2_nodes.sbatch, or one like it")
    if shutil.which("srun") is None:
        raise RecipeError(f"{asked} with srun, which is not found here: run the command where SLURM's commands are")
    if os.environ.get("SLURM_NODEID") != "0":  # a shell of salloc may be on a login node
        raise RecipeError(
            f"{asked}, which meet on the first one of the job, and this is none of them or another one (SLURM_NODEID): run "
            "the command in the batch script, or in a shell that srun --pty has started there"
        )


def require_possible(recipe: TrainRecipe, devices: Devices | None) -> None:
    """RecipeError where the recipe asks for what can't be cut over processes: asked at the start, not when training begins."""
    if devices is None or not devices.sharded or devices.num_processes == 1:
        return
    wanted = {
        "train.optim adamw_bnb_8bit": ("adamw_torch", recipe.optim == "adamw_bnb_8bit"),
        "train.lora.load_in_4bit": ("load_in_4bit: false", recipe.lora is not None and recipe.lora.load_in_4bit),
    }
    for what, (instead, asked) in wanted.items():
        if asked:
            raise RecipeError(
                f"{what} can't be cut over processes, as {devices.config} asks (FSDP): take {instead}, or a configuration "
                "without FSDP"
            )
