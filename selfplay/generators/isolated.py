"""An engine in child processes: one per replica, each in a session of its own, so that the terminal's Ctrl-C reaches only
us and a replica's whole process group can be ended at once. `child.py` is the other side.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any

from selfplay.errors import DataError, GeneratorError, RecipeError, SecurityError, SelfplayError
from selfplay.generators.child import Channel, HungUpError
from selfplay.generators.child_log import errors_in, quote
from selfplay.generators.engine import (
    EngineSettings,
    Request,
    Result,
    request_to_json,
    result_from_json,
)
from selfplay.generators.environment import child_environment
from selfplay.generators.process_group import end_group

POLL_SECONDS = 0.5
CLOSE_SECONDS = 5.0
CORE_DEAD = "EngineDeadError"  # vLLM's, of a core in a process of its own that has ended
ERRORS: Mapping[str, type[SelfplayError]] = {
    kind.__name__: kind for kind in (DataError, GeneratorError, RecipeError, SecurityError)
}
# what to change where a GPU's memory ran out, by kind of engine
SMALLER: Mapping[str, str] = {
    "vllm": "generator.max_batch_size, max_model_len or gpu_memory_utilization, or raise tensor_parallel_size",
    "transformers": "generator.max_batch_size",
    "reward_model": "judge.max_batch_tokens or max_length",
}


class EngineDiedError(GeneratorError):
    """A signal ended an engine's process while it worked: another process may do better."""


class IsolatedEngine:
    """Serves requests on `settings.data_parallel_size` replicas. Equal prompts go to one replica, which prefills them once;
    which one depends on their order alone.
    """

    def __init__(self, settings: EngineSettings, *, log_path: Path | None = None) -> None:
        with ExitStack() as stack:
            self._replicas = [
                stack.enter_context(_Replica(settings, n, _numbered(log_path, n)))
                for n in range(settings.data_parallel_size)
            ]
            ready: list[int] = [message["ready"] for _, message in _messages(self._replicas, until="ready")]
            self._stack = stack.pop_all()
        self._max_model_len = min(ready)

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def process_ids(self) -> tuple[int, ...]:
        """One per replica; each is also the id of that replica's process group."""
        return tuple(replica.process.pid for replica in self._replicas)

    def run(self, requests: Sequence[Request]) -> Iterator[Result]:
        shares = _deal([r.prompt_token_ids for r in requests], len(self._replicas))
        for replica, share in zip(self._replicas, shares, strict=True):
            replica.ask(run=[request_to_json(requests[n]) for n in share])
        for _, message in _messages(self._replicas, until="done"):
            yield from map(result_from_json, message.get("results", ()))

    def score_labels(
        self, prompts: Sequence[tuple[int, ...]], label_token_ids: Sequence[int]
    ) -> Iterator[tuple[int, list[float]]]:
        shares = _deal(prompts, len(self._replicas))
        for replica, share in zip(self._replicas, shares, strict=True):
            replica.ask(score=[prompts[n] for n in share], labels=list(label_token_ids))
        for replica, message in _messages(self._replicas, until="done"):
            share = shares[self._replicas.index(replica)]
            yield from ((share[place], logps) for place, logps in message.get("scores", ()))

    def rewards(self, sequences: Sequence[tuple[int, ...]], max_batch_tokens: int) -> Iterator[tuple[int, float]]:
        shares = _deal(sequences, len(self._replicas))
        for replica, share in zip(self._replicas, shares, strict=True):
            replica.ask(reward=[sequences[n] for n in share], max_batch_tokens=max_batch_tokens)
        for replica, message in _messages(self._replicas, until="done"):
            share = shares[self._replicas.index(replica)]
            yield from ((share[place], reward) for place, reward in message.get("rewards", ()))

    def close(self) -> None:
        """Returns when the process groups are gone and what they held is free."""
        self._stack.close()


@dataclass(frozen=True, slots=True)
class _Child:
    """A process that has not been told its settings yet, and what decides whether it can serve an engine."""

    kind: str
    environment: Mapping[str, str]
    log_path: Path | None
    process: "subprocess.Popen[bytes]"
    channel: Channel
    log: IO[bytes]
    log_begin: int


def _spawn(kind: str, environment: Mapping[str, str], log_path: Path | None) -> _Child:
    ours, theirs = socket.socketpair()
    with ExitStack() as stack:
        stack.enter_context(theirs)
        stack.enter_context(ours)
        log: IO[bytes] = stack.enter_context(_open_log(log_path))
        begin = log.seek(0, os.SEEK_END)
        fd = theirs.fileno()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "selfplay.generators.child", str(fd), str(os.getpid()), kind],
            pass_fds=[fd],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=environment,
        )
        channel = Channel(Connection(ours.detach()))
        stack.pop_all()
    theirs.close()
    return _Child(kind, environment, log_path, process, channel, log, begin)


_ahead: list[_Child] = []  # those that nobody has taken


@contextlib.contextmanager
def started_ahead(settings: EngineSettings) -> Iterator[None]:
    """Starts the process of an engine whose settings are not all known: in the block the first engine of this kind and
    environment takes it, and has its imports behind it. What is left over is ended with the block. One replica.
    """
    child = _spawn(settings.kind, child_environment(settings, 0), None)
    _ahead.append(child)
    try:
        yield
    finally:
        if child in _ahead:
            _ahead.remove(child)
            _end(child.process, child.channel, child.log)


def _taken(kind: str, environment: Mapping[str, str], log_path: Path | None) -> _Child | None:
    for child in _ahead:
        same = (child.kind, child.log_path) == (kind, log_path)
        if same and _serves(child.environment, environment):
            _ahead.remove(child)
            return child
    return None


def _serves(had: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether a process that was started with these variables is as good as one started now. Packages add variables of
    their own while they are imported (scikit-learn does), which say nothing to an engine.
    """
    added = wanted.keys() - had.keys()
    return had.items() <= wanted.items() and not any(name.startswith(("VLLM_", "CUDA_")) for name in added)


class _Replica:
    """A child process with its channel and its log."""

    def __init__(self, settings: EngineSettings, number: int, log_path: Path | None) -> None:
        self.settings = settings
        self.log_path = log_path
        self.name = f"the {settings.kind} engine of {settings.model}"
        self.busy = True  # until it says that it is ready
        environment = child_environment(settings, number)
        child = _taken(settings.kind, environment, log_path) or _spawn(settings.kind, environment, log_path)
        self.process, self.channel = child.process, child.channel
        self.log, self.log_begin = child.log, child.log_begin
        # one that has failed says why in what it sent
        with contextlib.suppress(HungUpError):
            self.channel.send(settings=asdict(settings))

    def __enter__(self) -> "_Replica":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.busy and self.alive():
            self._ask_to_close()
        # The group outlives its leader where the engine has processes of its own. The leader isn't reaped before, so
        # its id can't have become somebody else's.
        _end(self.process, self.channel, self.log)

    def _ask_to_close(self) -> None:
        try:
            self.channel.send(close=True)
            self.channel.connection.poll(CLOSE_SECONDS)
        except HungUpError:  # it died between two calls
            return

    def alive(self) -> bool:
        """Whether the process runs. It is not reaped here: see __exit__."""
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def ask(self, **message: Any) -> None:
        """Sends a message that is answered by others, the last of them {"done": true}."""
        self.busy = True
        try:
            self.channel.send(**message)
        except HungUpError:
            raise self.died() from None

    def receive(self) -> dict[str, Any]:
        """The next message, which is there already. Raises what it reports, or what ended the process."""
        try:
            message = self.channel.receive()
        except HungUpError:
            raise self.died() from None
        if "error" not in message:
            self.busy = not ("done" in message or "ready" in message)
            return message
        self.busy = message["fatal"]
        if message["fatal"] and message["kind"] not in ERRORS:
            raise self.failed(message)
        raise ERRORS.get(message["kind"], GeneratorError)(f"{self.name}: {message['error']}")

    def failed(self, message: Mapping[str, Any]) -> GeneratorError:
        """What to raise for an exception that ended the process, and is none of ours."""
        self._await_end()  # the traceback is written after the message was sent
        text, errors = f"{self.name}: {message['error']}", errors_in(self.log_lines())
        if any("out of memory" in error for error in (message["error"], *errors)):
            text += (
                f"\nA GPU's memory ran out: lower {SMALLER[self.settings.kind]}; nvidia-smi tells what else is on it"
            )
        # a core that was killed left no error of its own
        died = message["kind"] == CORE_DEAD and all(CORE_DEAD in error for error in errors)
        return (EngineDiedError if died else GeneratorError)(f"{text}\n{self.quoted_log()}")

    def died(self) -> GeneratorError:
        """What to raise for a process that is gone, or whose channel is."""
        text, ended = self.name, self._await_end()
        if ended is None:
            return GeneratorError(f"{text} hung up\n{self.quoted_log()}")
        if ended.si_code == os.CLD_EXITED:
            return GeneratorError(f"{text} ended with exit code {ended.si_status}\n{self.quoted_log()}")
        text += f" was killed by {signal.Signals(ended.si_status).name}"
        if ended.si_status == signal.SIGKILL:
            text += (
                " (the system does that when memory runs out: lower max_batch_size, max_model_len or the cache's share, "
                "gpu_memory_utilization or VLLM_CPU_KVCACHE_SPACE)"
            )
        return EngineDiedError(f"{text}\n{self.quoted_log()}")

    def _await_end(self) -> "os.waitid_result | None":
        """How the process ended; None where it still runs after CLOSE_SECONDS. It is not reaped here: see __exit__."""
        deadline = time.monotonic() + CLOSE_SECONDS
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)

    def quoted_log(self) -> str:
        """The errors in the child's log, its last lines, and where all of it is."""
        return quote(self.log_lines(), f" ({self.log_path})" if self.log_path else "")

    def log_lines(self) -> list[str]:
        """What this child wrote: an earlier one may have had the same file."""
        self.log.flush()
        self.log.seek(self.log_begin)
        return self.log.read().decode(errors="replace").splitlines()


def _messages(replicas: Sequence[_Replica], until: str) -> Iterator[tuple[_Replica, dict[str, Any]]]:
    """Messages of all replicas as they come, the last of each being the one with the key `until`."""
    waiting = {replica.channel.connection: replica for replica in replicas}
    while waiting:
        # A grandchild may hold a dead child's end open, so silence alone does not say that the child lives.
        silent = not (heard := wait(list(waiting), POLL_SECONDS))
        for connection in heard:
            replica = waiting[connection]  # type: ignore[index]
            message = replica.receive()
            if until in message:
                del waiting[replica.channel.connection]
            yield replica, message
        for replica in waiting.values() if silent else ():
            if not replica.alive() and not replica.channel.connection.poll():
                raise replica.died()


def _deal(prompts: Sequence[tuple[int, ...]], count: int) -> list[list[int]]:
    """The places that each of `count` replicas serves: equal prompts together, distinct ones in turn."""
    owner: dict[tuple[int, ...], int] = {}
    shares: list[list[int]] = [[] for _ in range(count)]
    for place, prompt in enumerate(prompts):
        shares[owner.setdefault(prompt, len(owner) % count)].append(place)
    return shares


def _open_log(path: Path | None) -> IO[bytes]:
    return tempfile.TemporaryFile() if path is None else path.open("ab+")


def _end(process: "subprocess.Popen[bytes]", channel: Channel, log: IO[bytes]) -> None:
    end_group(process.pid)
    process.wait()
    channel.connection.close()
    log.close()


def _numbered(path: Path | None, number: int) -> Path | None:
    return path if path is None or number == 0 else path.with_name(f"{path.stem}-{number}{path.suffix}")
