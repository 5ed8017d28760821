"""What runs inside an engine's child process: `python -m selfplay.generators.child FD PARENT_PID KIND`.

It imports what an engine of that KIND needs and waits for its settings: the process may be started before they are known.
FD is one end of a socket pair; messages are JSON. The child never outlives its parent: a thread kills the whole process
group, and so whatever processes the engine has started, as soon as the parent is gone.

    to the child                                    from the child
    {"settings": ...}                               {"ready": max_model_len}
    {"run": [request, ...]}                         {"results": [...]} ... {"done": true}
    {"score": [ids, ...], "labels": [...]}          {"scores": [[place, logps], ...]} ... {"done": true}
    {"reward": [ids, ...], "max_batch_tokens": n}   {"rewards": [[place, reward], ...]} ... {"done": true}
    {"close": true}                                 {"closed": true}
                                                    {"error": text, "kind": class, "fatal": bool} at any time
"""

import gc
import importlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from selfplay.errors import SelfplayError
from selfplay.generators.engine import (
    Engine,
    EngineSettings,
    Scorer,
    request_from_json,
    settings_from_json,
    start_engine,
    start_scorer,
)
from selfplay.generators.process_group import watch_helpers

WATCH_SECONDS = 0.25
Answers = Callable[[dict[str, Any]], Iterator[dict[str, Any]]]  # a message to the messages that answer it


class HungUpError(Exception):
    """The other end of a channel is closed: its process is gone."""


class Channel:
    """JSON messages over one end of a socket pair. Both methods raise HungUpError."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self.connection = connection

    def send(self, **message: Any) -> None:
        try:
            self.connection.send_bytes(json.dumps(message).encode())
        except (BrokenPipeError, ConnectionResetError):
            raise HungUpError from None

    def receive(self) -> dict[str, Any]:
        """The next message, waiting for it."""
        try:
            message: dict[str, Any] = json.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            raise HungUpError from None
        return message


def main(fd: int, parent: int, kind: str) -> None:
    threading.Thread(target=die_with, args=(parent,), daemon=True).start()
    os.set_inheritable(fd, False)  # a grandchild holding it would hide our end from the parent
    channel = Channel(Connection(fd))
    try:
        with _reported(channel):
            _import_engine(kind)
            max_model_len, answers = _start(settings_from_json(channel.receive()["settings"]))
            watch_helpers(multiprocessing.active_children())
            channel.send(ready=max_model_len)
            while _serve(answers, channel):
                pass
        channel.send(closed=True)
    except HungUpError:  # at once: an interpreter takes seconds to end, and its threads stop before it does
        os.killpg(0, signal.SIGKILL)
    # No orderly exit: interpreters that end with an engine loaded have hung, and the parent kills the group anyway.
    os._exit(0)


def _import_engine(kind: str) -> None:
    # Looking for garbage among a million new objects, all of which stay, takes a fifth of the time; frozen, they are not
    # looked at again by the collections that vLLM asks for while it starts.
    gc.disable()
    importlib.import_module(f"selfplay.generators.{kind}")
    gc.freeze()
    gc.enable()


def _start(settings: EngineSettings) -> tuple[int, Answers]:
    """The most tokens of a sequence, and what answers messages. A scorer is asked for no length: its caller knows it."""
    if settings.kind == "reward_model":
        return 0, partial(_rewards, start_scorer(settings))
    engine = start_engine(settings)
    return engine.max_model_len, partial(_completions, engine)


def _completions(engine: Engine, message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "run" in message:
        for result in engine.run([request_from_json(row) for row in message["run"]]):
            yield {"results": [asdict(result)]}
    else:
        for place, logps in engine.score_labels([tuple(ids) for ids in message["score"]], message["labels"]):
            yield {"scores": [[place, logps]]}


def _rewards(scorer: Scorer, message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for place, reward in scorer.rewards([tuple(ids) for ids in message["reward"]], message["max_batch_tokens"]):
        yield {"rewards": [[place, reward]]}


def _serve(answers: Answers, channel: Channel) -> bool:
    """Handles one message; False when it was the last. A user's error is reported and the engine goes on."""
    message = channel.receive()
    if "close" in message:
        return False
    try:
        for answer in answers(message):
            channel.send(**answer)
    except SelfplayError as error:
        channel.send(error=str(error), kind=type(error).__name__, fatal=False)
    else:
        channel.send(done=True)
    return True


@contextmanager
def _reported(channel: Channel) -> Iterator[None]:
    """Tells the parent what ended this process, then lets it end: the traceback goes to the log."""
    try:
        yield
    finally:
        gc.unfreeze()  # else an interpreter that ends lists what was never collected, and the log's end is no traceback
        kind, error, _ = sys.exc_info()
        if kind is not None and not isinstance(error, HungUpError):
            channel.send(error=f"{kind.__name__}: {error}", kind=kind.__name__, fatal=True)


def die_with(parent: int) -> None:
    """Kills this process's group as soon as the parent is gone; never returns before."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
