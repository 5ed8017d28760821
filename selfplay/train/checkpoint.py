"""Checkpoints of a training job: everything that a step leaves behind, so that going on gives the same bits on a CPU. On CUDA
the sums of some kernels (attention's gradients, additions at an index) have no fixed order, and two runs differ by rounding,
unless train.full_determinism is set.

    train/checkpoints/step-000120/
      state-00000.safetensors ...  fp32 weights, optimizer state, random states; a file holds about FILE_BYTES
      rank-00001-00000.safetensors ...  the same of process 1 and so on, where several train: its rows of the weights, or
                                   where each holds all of them its random states alone
      checkpoint.json              step, epoch, figures so far, pack cap, and the fingerprint of the job
      steps.jsonl                  the metrics of the steps so far: train/steps.jsonl is cut back to them
      SHA256SUMS                   the digests of those

The schedule and the order of the pairs are functions of the step, so the step is their whole state.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfplay import store
from selfplay.errors import StorageError
from selfplay.train.optim import Masters, load_state, state_tensors
from selfplay.train.settings import KEPT_CHECKPOINTS, TrainJob
from selfplay.train.world import World

FILE_BYTES = 1 << 28  # safetensors builds a file in memory before it writes it, and fp32 weights are made for it
# save_steps: auto. At most this much training is lost to a kill, unless writing takes so long that it would cost more than
# a twentieth of the time.
AUTO_SECONDS = 600.0
AUTO_SHARE = 20.0


@dataclass(frozen=True, slots=True)
class Found:
    """A valid checkpoint: where it is, and what its JSON says."""

    folder: Path
    step: int
    max_pack_tokens: int
    result: dict[str, Any]
    rows: list[dict[str, Any]]
    world: World

    def restore(self, masters: Masters, optimizer: torch.optim.Optimizer) -> None:
        """Weights, optimizer and random states as they were after the step."""
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}, "random": {}}
        ranks = (self.world.rank,) if self.world.sharding is not None else (0, self.world.rank)
        for name, tensor in _stored(self.folder, dict.fromkeys(ranks)):
            part, _, key = name.partition("/")
            parts[part][key] = tensor
        masters.load(parts["weights"].items())
        load_state(optimizer, parts["optimizer"])
        _set_random_states(parts["random"])


class Checkpoints:
    """Those of one job, in `folder`. `note` takes a line for the user."""

    def __init__(self, folder: Path, job: TrainJob, *, note: Callable[[str], None], world: World) -> None:
        self.folder, self.job, self.note, self.world = folder, job, note, world

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What makes this job's steps what they are. Read late: digests of large weights take their time."""
        job, settings = self.job, asdict(self.job.settings)
        del settings["save_steps"]
        state = job.optimizer_state
        return {
            "policy": store.weights_digest(Path(job.policy)),
            "reference": store.weights_digest(Path(job.reference)) if job.reference is not None else None,
            "ref_model_mixup_alpha": job.ref_model_mixup_alpha,
            "pairs": store.file_digest(Path(job.pairs)),
            "optimizer_state": store.file_digest(Path(state)) if state is not None else None,
            "schedule": job.schedule,
            "seed": job.seed,
            "processes": processes_line(self.world),
            "settings": settings,
        }

    def newest(self) -> Found | None:
        """The last valid checkpoint; None where there is none. Damaged ones are removed, with a line each. StorageError
        where they are of another job.
        """
        name = self.world.first(self._newest)
        if name is None:
            return None
        data = json.loads((self.folder / name / "checkpoint.json").read_text())
        rows = store.read_json_lines(self.folder / name / "steps.jsonl")
        return Found(self.folder / name, data["step"], data["max_pack_tokens"], data["result"], rows, self.world)

    def _newest(self) -> str | None:
        for folder in reversed(self._folders()):
            try:
                store.check_folder(folder)
            except StorageError as error:
                self.note(f"training: a checkpoint is damaged and not used ({error})")
                store.remove_folder(folder)
                continue
            data = json.loads((folder / "checkpoint.json").read_text())
            self._require_own(folder, data["fingerprint"])
            self.note(f"training: going on from the checkpoint of step {data['step']}")
            return folder.name
        return None

    def _require_own(self, folder: Path, found: dict[str, Any]) -> None:
        own = json.loads(json.dumps(self.fingerprint))
        if own["processes"] != found.get("processes"):
            raise StorageError(
                f"{folder}: this checkpoint was written by {found.get('processes')}, and this is {own['processes']}. Go on "
                f"with the devices that it began with, or delete the folder {self.folder} to train from the start"
            )
        if other := [key for key in own | found if own.get(key) != found.get(key)]:
            raise StorageError(
                f"{folder}: a checkpoint of another training job: its {', '.join(other)} differ. Delete the folder "
                f"{self.folder} to train from the start, or take another --out"
            )

    def save(
        self,
        masters: Masters,
        optimizer: torch.optim.Optimizer,
        *,
        max_pack_tokens: int,
        result: dict[str, Any],
        rows: list[dict[str, Any]],
    ) -> Path:
        """Writes one, of the step that `rows` end with, and removes all but the last KEPT_CHECKPOINTS. Every process writes
        its part, and returns when all have.
        """
        step, epoch = rows[-1]["step"], rows[-1]["epoch"]
        data = {"step": step, "epoch": epoch, "max_pack_tokens": max_pack_tokens, "result": result}

        def write(folder: Path) -> None:
            self.world.wait()  # the folder is there
            _write_tensors(folder, _tensors(masters, optimizer), _prefix(0))
            text = json.dumps(data | {"fingerprint": self.fingerprint}, indent=2, allow_nan=False) + "\n"
            (folder / "checkpoint.json").write_text(text)
            (folder / "steps.jsonl").write_bytes(store.json_lines(rows))

        def others() -> dict[str, str]:
            return {name: digest for part in self.world.gather({}) for name, digest in part.items()}

        path = self.folder / f"step-{step:06d}"
        if self.world.is_first:
            store.write_folder(path, write, others=others)
            for old in self._folders()[:-KEPT_CHECKPOINTS]:
                store.remove_folder(old)
        else:
            self.world.wait()
            own = _tensors(masters, optimizer) if self.world.sharding is not None else _random_tensors()
            self.world.gather(
                store.write_part(path, lambda folder: _write_tensors(folder, own, _prefix(self.world.rank)))
            )
        self.world.wait()
        return path

    def _folders(self) -> list[Path]:
        return [folder for _, folder in finished_checkpoints(self.folder)]


def finished_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of those in `folder`, the newest last. What else lies there is none of ours."""
    steps = ((f.name.removeprefix("step-"), f) for f in folder.glob("step-*"))
    return sorted((int(step), f) for step, f in steps if step.isdecimal())


class Due:
    """Says after which steps a checkpoint is written."""

    def __init__(self, save_steps: int | str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.every = None if save_steps == "auto" else int(save_steps)
        self.clock = clock
        self.last, self.cost = clock(), 0.0

    def after(self, step: int) -> bool:
        if self.every is not None:
            return step % self.every == 0
        return self.clock() - self.last >= max(AUTO_SECONDS, AUTO_SHARE * self.cost)

    def written(self, started: float) -> None:
        """Counts the seconds that writing took since `started`."""
        self.last = self.clock()
        self.cost = self.last - started


def processes_line(world: World) -> str:
    """How many processes train, in words; the order of sums follows from it, and with FSDP who keeps which rows."""
    if world.size == 1:
        return "1 process"
    return f"{world.size} processes ({'DDP' if world.sharding is None else 'FSDP2'})"


def _tensors(masters: Masters, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, weight in masters.named():
        yield f"weights/{name}", weight
    for name, tensor in state_tensors(optimizer).items():
        yield f"optimizer/{name}", tensor
    yield from _random_tensors()


def _random_tensors() -> Iterator[tuple[str, Tensor]]:
    yield "random/cpu", torch.get_rng_state()
    for n, state in enumerate(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []):
        yield f"random/{n}", state


def _set_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states.pop("cpu"))
    if torch.cuda.is_available() and len(states) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([states[str(n)] for n in range(len(states))])


def _prefix(rank: int) -> str:
    return f"rank-{rank:05d}" if rank else "state"


def _write_tensors(folder: Path, tensors: Iterator[tuple[str, Tensor]], prefix: str) -> list[str]:
    """The names of the files that were written."""
    from safetensors.torch import save_file

    names, held, size = list[str](), dict[str, Tensor](), 0

    def write() -> None:
        names.append(f"{prefix}-{len(names):05d}.safetensors")
        save_file(held, folder / names[-1])

    for name, tensor in tensors:
        held[name] = tensor.contiguous()
        size += tensor.nbytes
        if size >= FILE_BYTES:
            write()
            held, size = {}, 0
    if held:
        write()
    return names


def _stored(folder: Path, ranks: Iterable[int]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for path in (path for rank in ranks for path in sorted(folder.glob(f"{_prefix(rank)}-*.safetensors"))):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                yield name, file.get_tensor(name)
