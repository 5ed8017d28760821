"""Python's garbage collector around large imports."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """In the block nothing looks for garbage: importing torch and transformers makes a million objects that all stay, and
    going through them again and again takes a quarter of the time.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
