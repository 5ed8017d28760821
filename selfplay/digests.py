"""Digests of large files that this process has read already."""

import time
from collections.abc import Callable
from pathlib import Path

SETTLED_NS = 2_000_000_000

_known: dict[tuple[int, ...], str] = {}


def known_digest(path: Path, read: Callable[[Path], str]) -> str:
    """What `read` returned for this file, while nothing has been written to it since: then device, inode, size and both times
    are the same. A file changed within the last SETTLED_NS is read each time, for it may change again within one tick of the
    file system's clock. What a disk does to a file unasked is not seen: `store.check_folder` reads every byte.
    """
    found = path.stat()
    key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    if key in _known:
        return _known[key]
    settled = time.time_ns() - found.st_ctime_ns > SETTLED_NS
    digest = read(path)
    if settled:
        _known[key] = digest
    return digest
