"""The fields of an accelerate configuration: which the trainer reads, which it does not read and says so, and which it refuses.

None is ignored in silence, but for those that ask for nothing. Loads no torch.
"""

from pathlib import Path
from typing import Any

from selfplay.errors import RecipeError

PLAIN = ("NO", "MULTI_GPU", "MULTI_CPU")
READ = {
    *(
        "compute_environment",
        "distributed_type",
        "num_processes",
        "num_machines",
        "use_cpu",
        "gpu_ids",
        "mixed_precision",
    ),
    *("main_process_port", "rdzv_backend", "same_network", "fsdp_config"),
    "main_training_function",  # of notebooks and TPUs; accelerate writes it into every file
}
READ_OF_FSDP = {
    *("fsdp_version", "fsdp_reshard_after_forward", "fsdp_transformer_layer_cls_to_wrap", "fsdp_auto_wrap_policy"),
    *("fsdp_offload_params", "fsdp_activation_checkpointing"),
}
# Fields that change no result, and what is done instead.
UNREAD = {
    "machine_rank": "SLURM counts the machines",
    "main_process_ip": "it is the machine that selfplay runs on",
    "enable_cpu_affinity": "no process is bound to cores",
    "debug": "set TORCH_DISTRIBUTED_DEBUG for torch's own checks",
    "fsdp_config": "without distributed_type FSDP",
    "fsdp_state_dict_type": "checkpoints are a file of each process, policies are whole",
    "fsdp_cpu_ram_efficient_loading": "the processes of a machine load the model in turn",
    "fsdp_sync_module_states": "each process reads the model itself",
    "fsdp_sharding_strategy": "fsdp_reshard_after_forward says it in FSDP2",
    "fsdp_backward_prefetch": "of FSDP1",
    "fsdp_forward_prefetch": "of FSDP1",
    "fsdp_use_orig_params": "of FSDP1",
    "fsdp_min_num_params": "layers are wrapped by their class",
}
ASKS_FOR_NOTHING = ("", "no", "false", "none", "0", "{}", "[]")
SAYS_YES, SAYS_NO = (
    ("true", "yes", "on", "y", "t", "1"),
    ("false", "no", "off", "n", "f", "0"),
)  # as accelerate reads it


def unread_fields(path: Path, data: dict[str, Any]) -> tuple[str, ...]:
    """Each field that is not read, with what is done instead. RecipeError where a field asks for what the trainer does not
    do, or is none that it knows.
    """
    fsdp = fsdp_fields(path, data)
    kind, precision = kind_of(data), str(data.get("mixed_precision", "no")).lower()
    for wrong, change in [*_refused(data, kind), *_refused_fsdp(path, kind, fsdp, data)]:
        if wrong:
            raise RecipeError(f"{path}: {change}")
    asked = {
        **{k: v for k, v in data.items() if k not in READ},
        **{k: v for k, v in fsdp.items() if k not in READ_OF_FSDP},
    }
    asked = {key: value for key, value in asked.items() if str(value).lower() not in ASKS_FOR_NOTHING}
    if unknown := sorted(asked.keys() - UNREAD.keys()):
        raise RecipeError(f"{path}: {', '.join(unknown)}: nothing that selfplay's trainer does; leave it out")
    found = {key: UNREAD[key] for key in asked}
    if kind != "FSDP" and fsdp:
        found = {key: why for key, why in found.items() if key not in fsdp} | {"fsdp_config": UNREAD["fsdp_config"]}
    if precision == "bf16":
        found["mixed_precision"] = "train.bf16 says"
    return tuple(f"{key} ({why})" for key, why in found.items())


def kind_of(data: dict[str, Any]) -> str:
    """The distributed_type; an unquoted NO is YAML's false."""
    kind = str(data.get("distributed_type", "NO")).upper()
    return "NO" if kind == "FALSE" else kind


def whole_number(path: Path, data: dict[str, Any], key: str, default: int) -> int:
    """A field that is a number of 1 or more; `default` where it is not there or null."""
    value = data.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RecipeError(f"{path}: {key} must be a whole number of 1 or more, not {value!r}")
    return value


def fsdp_fields(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Those of fsdp_config."""
    fields = data.get("fsdp_config") or {}
    if not isinstance(fields, dict):
        raise RecipeError(f"{path}: fsdp_config must be a mapping, not {fields!r}")
    return fields


def switch(path: Path, data: dict[str, Any], key: str, *, default: bool = False) -> bool:
    """A field that is true or false, or says so in words; `default` where it is not there or null."""
    value = data.get(key)
    said = str(default if value is None else value).lower()
    if said not in (*SAYS_YES, *SAYS_NO):
        raise RecipeError(f"{path}: {key} must be true or false, not {value!r}")
    return said in SAYS_YES


def _refused(data: dict[str, Any], kind: str) -> list[tuple[bool, str]]:
    """(whether it is so, what is wrong and what to change)."""
    processes, machines, gpus = data.get("num_processes") or 1, data.get("num_machines") or 1, data.get("gpu_ids")
    named = gpus not in (None, "all")
    return [
        (
            str(data.get("compute_environment", "LOCAL_MACHINE")) != "LOCAL_MACHINE",
            "compute_environment must be LOCAL_MACHINE",
        ),
        (kind not in (*PLAIN, "FSDP"), f"distributed_type {kind} is none of {', '.join(PLAIN)}, FSDP"),
        (
            str(data.get("mixed_precision", "no")).lower() in ("fp16", "fp8"),
            "say mixed_precision: no; train.bf16 counts",
        ),
        (processes % machines != 0, f"{processes} processes can't be spread over {machines} machines"),
        (kind == "NO" and processes > 1, "several processes need distributed_type MULTI_GPU, MULTI_CPU or FSDP"),
        (named and not isinstance(gpus, str), f"gpu_ids must be all, or text such as '0,1', not {gpus!r}"),
        (
            named and len(str(gpus).split(",")) < processes // machines,
            f"gpu_ids names {gpus}, too few for {processes // machines} processes on a machine",
        ),
        (
            str(data.get("rdzv_backend", "static")) not in ("static", "None"),
            "rdzv_backend must be static: the number of processes is fixed",
        ),
    ]


def _refused_fsdp(path: Path, kind: str, fsdp: dict[str, Any], data: dict[str, Any]) -> list[tuple[bool, str]]:
    is_fsdp, cpu = kind == "FSDP", switch(path, data, "use_cpu")
    wrap = fsdp.get("fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP")
    return [
        (is_fsdp and str(fsdp.get("fsdp_version", 1)) != "2", "fsdp_version must be 2"),
        (is_fsdp and cpu, "accelerate does no FSDP on CPUs: take distributed_type MULTI_CPU"),
        (switch(path, fsdp, "fsdp_offload_params"), "fsdp_offload_params must be false"),
        (
            switch(path, fsdp, "fsdp_activation_checkpointing"),
            "say train.gradient_checkpointing in the recipe instead",
        ),
        (is_fsdp and wrap != "TRANSFORMER_BASED_WRAP", "fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP"),
    ]
