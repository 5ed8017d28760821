"""What a stage can't hold in memory while it works. These files are no artifacts: they have no digest, and none is left."""

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.errors import StorageError


@contextlib.contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A folder for what a stage can't hold while it works; nothing of it is left after."""
    temporary = path.with_name(path.name + store.TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_scratch(records: Iterable[Any], files: Mapping[type[Any], Path]) -> None:
    """Records of several kinds, each into the file of its kind in a scratch folder: no artifacts, so without a digest."""
    with contextlib.ExitStack() as stack:
        with _disk(next(iter(files.values()))):
            for path in files.values():
                path.parent.mkdir(parents=True, exist_ok=True)
            opened = {kind: stack.enter_context(path.open("wb")) for kind, path in files.items()}
        # what makes the records may fail as well, and that is no matter of this disk
        for record in records:
            kind = next(kind for kind in files if isinstance(record, kind))
            with _disk(files[kind]):
                opened[kind].write(store.record_line(record, kind))
        for kind, file in opened.items():
            with _disk(files[kind]):
                file.flush()


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: can't be written ({error.strerror}). Free space, then run the same command"
        ) from error
