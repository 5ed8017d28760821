"""An accelerate configuration: how many processes train, what each holds, and the command that starts them. Loads no torch."""

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from selfplay.errors import RecipeError
from selfplay.recipe_file import recipe_folder
from selfplay.recipe_train import TrainRecipe
from selfplay.train.device_fields import kind_of, unread_fields, whole_number


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

    def command(self, module: str, arguments: list[str], *, failed: Path) -> list[str]:
        """`accelerate launch` of a module, which writes `failed` where a process fails. RecipeError where several machines are
        asked for outside a SLURM job.
        """
        wrapper = [sys.executable, "-P", "-m", "selfplay.train.ranks", str(os.getpid()), str(failed)]
        options = ["--config_file", str(self.config), "--main_process_port", str(self.port or free_port())]
        options += ["--mixed_precision", "no"]  # an unquoted no of the file is false, which accelerate stumbles over
        if self.num_processes > 1 and not self.sharded:
            # on CPUs as well: else accelerate starts one process and leaves the rest to MPI
            options.append("--multi_gpu")
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
    processes, machines = (whole_number(path, data, key, 1) for key in ("num_processes", "num_machines"))
    unread = unread_fields(path, data)
    fsdp = data.get("fsdp_config") or {}
    layers = fsdp.get("fsdp_transformer_layer_cls_to_wrap")
    return Devices(
        config=path.absolute(),
        num_processes=processes,
        num_machines=machines,
        use_cpu=bool(data.get("use_cpu", False)),
        sharded=kind_of(data) == "FSDP",
        reshard_after_forward=bool(fsdp.get("fsdp_reshard_after_forward", True)),
        layers=tuple(layers.split(",") if isinstance(layers, str) else layers) if layers else None,
        port=data.get("main_process_port") or None,
        unread=unread,
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
