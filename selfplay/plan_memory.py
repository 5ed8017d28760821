"""How much memory the phases of a run need: sampling, judges with a model of their own, training, and KL to the initial policy.
They come one after the other, so the largest is what a machine must have.

An estimate, of what is large and known beforehand. It counts with prompts of 64 tokens, as the trial packs of the trainer
have (train/budget.py), and completions of max_tokens. It leaves out: longer prompts; graphs and workspaces of an engine and of
CUDA's libraries beyond PROCESS_BYTES, and holes between blocks; buffers of collectives; that a model which is sharded is read
by each process of a machine in turn, in fp32 (4 bytes a weight of the machine's own memory); families whose norms and MLPs are
not of Llama's kind, which keep up to twice as much of a pack, and mixtures of experts; similarity judges, which are small; the
prompts and pairs, which are read when they are asked for; and GPUs that nvidia-smi doesn't know.

Compared with the peak of training a 135M model on a CPU (2 steps, AdamW, pairs of 320 tokens): with packs of 2048 tokens in
bf16 3.9 GB, where 3.5 were measured; of 512 tokens 3.1 and 3.2; of 1024 tokens in fp32 3.9 and 4.1. Not compared on a GPU.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from selfplay.generators.engine import DEFAULT_BATCH_SIZE
from selfplay.generators.environment import GIB, cpu_cache_bytes
from selfplay.plan_machine import Machine
from selfplay.plan_models import WIDTHS, ModelFacts, model_facts
from selfplay.recipe import GeneratorRecipe, Recipe
from selfplay.recipe_judges import LLMJudgeRecipe, judges_in
from selfplay.recipe_reward import RewardModelRecipe
from selfplay.recipe_values import at_round
from selfplay.train.devices import Devices
from selfplay.train.settings import TrainSettings
from selfplay.train.sizes import (
    CPU_PACK_TOKENS,
    FOUR_BITS,
    GRADIENT_BYTES,
    MASTER_BYTES,
    PROMPT,
    SHARE,
    SIZES,
    Dimensions,
    PackSize,
    optimizer_bytes,
)

GB = 1e9
PROCESS_BYTES = (
    650_000_000  # Python with torch, transformers and peft; on a GPU its context and kernels take about as much
)


@dataclass(frozen=True, slots=True)
class Phase:
    """What is held at once on a device, in bytes by what it is for; no parts where the model is unknown. `room` is what the
    device has, None where the system doesn't say; `where` names it.
    """

    name: str
    model: str
    parts: tuple[tuple[str, float], ...]
    room: float | None
    where: str
    note: str = ""

    @property
    def total(self) -> float:
        return sum(size for _, size in self.parts)

    @property
    def fits(self) -> bool:
        """Whether it does, as far as is known."""
        return self.room is None or self.total <= self.room


def phases(
    recipe: Recipe,
    policy: ModelFacts | None,
    settings: Sequence[TrainSettings],
    devices: Devices | None,
    machine: Machine,
) -> list[Phase]:
    """The phases of a run, the largest first, those of unknown models last. `settings` are those of the rounds."""
    found = [_sampling("sampling", recipe, recipe.model, policy, machine)]
    found += _judging(recipe, machine)
    found.append(max((_training(recipe, one, policy, devices, machine) for one in settings), key=lambda one: one.total))
    if any(_holds_other_reference(recipe, index) for index in range(recipe.rounds)):
        found.append(_reference_pass(recipe, policy, devices, machine))
    evaluate = recipe.evaluate
    computed = evaluate.kl and evaluate.temperature == 1.0  # panel.py has none at another temperature
    if computed and any(view.prompts.heldout is not None for view in recipe.by_source.values()):
        found.append(_kl(recipe, policy, machine))
    return sorted((one for one in found if one is not None), key=lambda one: one.total, reverse=True)


def _sampling(name: str, recipe: Recipe, named: str, model: ModelFacts | None, machine: Machine) -> Phase | None:
    """An engine's weights and cache: of one GPU, or of all replicas on a CPU. None where nothing is loaded."""
    generator = recipe.generator
    if generator.kind == "scripted":
        return None
    gpu, on_gpu, vllm = machine.gpu, machine.has_gpu, generator.kind == "vllm"
    room: float | None = gpu if on_gpu else machine.memory
    where = "the GPU has" if on_gpu else "this machine has"
    if vllm and gpu is not None:
        room, where = (
            generator.gpu_memory_utilization * gpu,
            f"vLLM takes {generator.gpu_memory_utilization:g} of a GPU,",
        )
    if model is None:
        return Phase(name, named, (), room, where)
    asked = generator.dtype if generator.dtype != "auto" else model.stored
    on_slow_cpu = not on_gpu and not vllm and not machine.bf16
    dtype = "bfloat16" if asked == "float32" and generator.dtype == "auto" else asked
    width = 4 if on_slow_cpu and generator.dtype == "auto" else WIDTHS.get(dtype, 2)
    weights = model.num_parameters * width
    copies = 1 / generator.tensor_parallel_size if on_gpu else generator.data_parallel_size
    cache = _cache_bytes(recipe, generator, model.dimensions, width, on_gpu=on_gpu)
    shown = dtype if width == WIDTHS.get(dtype, 2) else "float32"
    parts = ((f"weights in {shown}", weights * copies), ("cache", cache * copies))
    note = "the rest of its share is cache as well" if vllm and on_gpu else ""
    held = (*parts, _processes(1 if on_gpu else generator.data_parallel_size))
    return Phase(name, named, held, room, where, note)


def _cache_bytes(
    recipe: Recipe, generator: GeneratorRecipe, model: Dimensions | None, width: int, *, on_gpu: bool
) -> float:
    """Of one replica: as it is set for vLLM on a CPU, the least that a GPU must have beside the weights (one completion), or
    the transformers engine's batch.
    """
    if generator.kind == "vllm" and not on_gpu:
        if given := os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            return float(given) * GIB
        return float(generator.engine_args.get("kv_cache_memory_bytes", cpu_cache_bytes()))
    length = PROMPT + max(at_round(generator.max_tokens, index) for index in range(recipe.rounds))
    batch = 1 if generator.kind == "vllm" else generator.max_batch_size or DEFAULT_BATCH_SIZE
    return batch * length * model.cache_bytes(width) if model is not None else 0.0


def _judging(recipe: Recipe, machine: Machine) -> Iterator[Phase | None]:
    """A phase for each model that is a judge's own."""
    seen = set()
    for view in recipe.by_source.values():
        for judge in (*judges_in(view.judge), *judges_in(view.evaluate.judge)):
            if not isinstance(judge, LLMJudgeRecipe | RewardModelRecipe) or judge.model == "policy":
                continue
            if (key := (judge.kind, judge.model, judge.model_revision)) in seen:
                continue
            seen.add(key)
            name = f"judge {judge.model}"
            if isinstance(judge, LLMJudgeRecipe):
                facts = model_facts(judge.model, judge.model_revision)
                yield _sampling(name, recipe, judge.model, facts, machine)
            else:
                yield _scoring(name, judge, machine)


def _scoring(name: str, judge: RewardModelRecipe, machine: Machine) -> Phase:
    """A reward model and one batch of it, which keeps nothing for a backward pass: a layer's numbers, and its input."""
    on_gpu = machine.has_gpu and judge.device != "cpu"
    room, where = (machine.gpu, "the GPU has") if on_gpu else (machine.memory, "this machine has")
    model = model_facts(judge.model, judge.model_revision, classifier=True)
    if model is None:
        return Phase(name, judge.model, (), room, where)
    stored = model.stored if judge.dtype == "auto" else judge.dtype
    slow = not on_gpu and judge.dtype == "auto" and (stored == "float16" or not machine.bf16)
    width, shape = 4 if slow else WIDTHS.get(stored, 2), model.dimensions
    layer = (
        0
        if shape is None
        else 4 * shape.hidden + 2 * shape.inner + 2 * (shape.heads + shape.key_heads) * shape.head_size
    )
    copies = 1 if on_gpu else judge.data_parallel_size
    batch = judge.max_batch_tokens * layer * width
    parts = (("weights", copies * model.num_parameters * width), ("a batch", copies * batch), _processes(copies))
    return Phase(name, judge.model, parts, room, where)


@dataclass(frozen=True, slots=True)
class _Trainer:
    """Where training runs: how many processes share a device's memory, and in how many parts each weight is cut."""

    on_gpu: bool
    beside: int
    shards: int
    room: float | None
    where: str


def _trainer(devices: Devices | None, machine: Machine) -> _Trainer:
    on_gpu = machine.has_gpu and not (devices is not None and devices.use_cpu)
    processes = devices.num_processes if devices is not None else 1
    beside = 1 if on_gpu or devices is None else processes // devices.num_machines
    shards = processes if devices is not None and devices.sharded else 1
    if on_gpu:
        where = "the GPU has" if processes == 1 else "each GPU has"
        return _Trainer(True, 1, shards, machine.gpu, where)
    return _Trainer(False, beside, shards, machine.memory, "this machine has")


def _width(recipe: Recipe, trainer: _Trainer, machine: Machine) -> int:
    """Bytes of a number in the dtype that training computes in."""
    auto = trainer.on_gpu or machine.bf16
    return 2 if (auto if recipe.train.bf16 == "auto" else recipe.train.bf16) else 4


def _weights(recipe: Recipe, model: ModelFacts, width: int) -> float:
    """The policy as the trainer holds it: what trains in fp32, the base of an adapter as it is computed with."""
    lora, total = recipe.train.lora, model.num_parameters
    if lora is None:
        return MASTER_BYTES * total
    quantized = model.num_in_linear if lora.load_in_4bit else 0
    return MASTER_BYTES * model.num_trained(lora) + FOUR_BITS * quantized + width * (total - quantized)


def _training(
    recipe: Recipe, settings: TrainSettings, model: ModelFacts | None, devices: Devices | None, machine: Machine
) -> Phase:
    """Weights, gradients, optimizer and one pack; of one GPU, or of all processes on a CPU."""
    trainer = _trainer(devices, machine)
    name = "training"
    if model is None:
        return Phase(name, recipe.model, (), trainer.room, trainer.where)
    width, lora = _width(recipe, trainer, machine), recipe.train.lora
    trained, shards, times = model.num_trained(lora), trainer.shards, trainer.beside
    pack = _pack(recipe, settings, trainer, width, devices.num_processes if devices is not None else 1)
    size = pack.bytes_of(model.dimensions) if model.dimensions is not None else 0
    state = optimizer_bytes(trained, model.num_in_tables if lora is None else 0, settings.optim)
    parts = [
        ("weights", times * _weights(recipe, model, width) / shards),
        ("gradients", times * GRADIENT_BYTES * trained / shards),
        ("optimizer", times * state / shards),
        (f"a pack of {pack.tokens} tokens", times * size),
        _processes(times),
    ]
    if shards > 1 and model.dimensions is not None:
        parts.append(("gathered weights", _gathered(model, model.dimensions.layers, width)))
    auto = trainer.on_gpu and settings.max_pack_tokens is None
    note = f"packs then take up to {SHARE:.0%} of what is left" if auto else ""
    return Phase(name, recipe.model, tuple(parts), trainer.room, trainer.where, note)


def _gathered(model: ModelFacts, layers: int, width: int) -> float:
    """Where weights are sharded: embeddings and head, which stay gathered, two layers, and the gradients of one."""
    return width * (model.num_parameters - model.num_in_linear + 3 * model.num_in_linear / layers)


def _pack(recipe: Recipe, settings: TrainSettings, trainer: _Trainer, width: int, processes: int) -> PackSize:
    """The largest pack of a step: the budget, less where a step is smaller, more where one pair is larger."""
    completion = max(at_round(recipe.generator.max_tokens, index) for index in range(recipe.rounds))
    pair = PROMPT + 2 * completion
    if settings.max_length is not None:
        pair = min(pair, 2 * settings.max_length)
    budget = settings.max_pack_tokens or (SIZES[0] if trainer.on_gpu else CPU_PACK_TOKENS)
    tokens = max(pair, min(budget, -(-settings.batch_size // processes) * pair))
    share = 2 * completion / (PROMPT + 2 * completion)
    keys = 0 if trainer.on_gpu else PROMPT + completion
    return PackSize(tokens, int(share * tokens), width, keys, trainer.on_gpu, settings.gradient_checkpointing)


def _holds_other_reference(recipe: Recipe, index: int) -> bool:
    """Whether the reference of a round is another model than the policy before its first step."""
    kind = recipe.train.reference
    return recipe.train.reference_path is not None or (kind in ("initial", "ema") and index > 0)


def _reference_pass(recipe: Recipe, model: ModelFacts | None, devices: Devices | None, machine: Machine) -> Phase:
    """The policy and its reference, before there are gradients; the reference is as large as the policy, as far as is known."""
    trainer = _trainer(devices, machine)
    if model is None:
        return Phase("reference pass", recipe.model, (), trainer.room, trainer.where)
    width = _width(recipe, trainer, machine)
    each = trainer.beside / trainer.shards
    parts = (
        ("the policy", each * _weights(recipe, model, width)),
        ("its reference", each * MASTER_BYTES * model.num_parameters),
        _processes(trainer.beside),
    )
    return Phase("reference pass", recipe.model, parts, trainer.room, trainer.where)


def _kl(recipe: Recipe, model: ModelFacts | None, machine: Machine) -> Phase:
    """The initial policy on one device: in fp32 where that is a CPU; on a GPU in bf16, where there is no more room."""
    trainer = _trainer(None, machine)
    name = "KL to the initial policy"
    if model is None:
        return Phase(name, recipe.model, (), trainer.room, trainer.where)
    width = _width(recipe, trainer, machine) if trainer.on_gpu else 4
    parts = (("weights", width * model.num_parameters), _processes(1))
    return Phase(name, recipe.model, parts, trainer.room, trainer.where)


def _processes(count: float) -> tuple[str, float]:
    return ("a process" if count <= 1 else "processes", max(1, count) * PROCESS_BYTES)


def not_known(model: str) -> str:
    """Why nothing can be said of a model."""
    return f"{model} is not on this machine, and the hub gives no config.json that would describe it"


def memory_lines(found: Sequence[Phase]) -> list[str]:
    """What is printed of the phases, and a warning of each that can't fit."""
    lines = ["memory, about; one phase at a time:"] if found else []
    for one in found:
        has = f"; {one.where} " + ("memory of unknown size" if one.room is None else f"{one.room / GB:.1f} GB")
        if not one.parts:
            lines.append(f"  {one.name}: unknown: {not_known(one.model)}{has}")
            continue
        parts = ", ".join(f"{what} {size / GB:.1f}" for what, size in one.parts if size)
        note = f"; {one.note}" if one.note else ""
        lines.append(f"  {one.name}: {one.total / GB:.1f} GB ({parts}){has}{note}")
    lines += [
        f"warning: {one.name} can't fit: it needs about {one.total / GB:.1f} GB, and {one.where} {(one.room or 0) / GB:.1f} GB"
        for one in found
        if not one.fits
    ]
    return lines
