"""Stopping on request: what Ctrl-C (SIGINT) and SIGTERM do while training steps run."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPING = b"stopping after this training step, with a checkpoint; Ctrl-C again stops at once\n"


@dataclass(slots=True)
class Stop:
    """Whether somebody asked."""

    asked: bool = False


@contextmanager
def stopping() -> Iterator[Stop]:
    """In the block the first signal is a request, to be honoured at the next step boundary; the second one raises
    KeyboardInterrupt at once.
    """
    stop = Stop()

    def ask() -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        os.write(2, STOPPING)  # print isn't safe in a signal handler

    with handled(ask):
        yield stop


@contextmanager
def handled(handler: Callable[[], None]) -> Iterator[None]:
    """In the block SIGNALS call `handler`. Python allows that in the main thread only; elsewhere they are left as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [signal.signal(number, lambda *_: handler()) for number in SIGNALS]
    try:
        yield
    finally:
        for number, old in zip(SIGNALS, before, strict=True):
            signal.signal(number, old)
