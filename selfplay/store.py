"""The only module that writes artifacts. A file that exists is finished.

Every artifact is written under a temporary name, synced and renamed. Beside it stands NAME.sha256 in the format of
`sha256sum`, renamed into place first, so a finished file always has its digest; reading checks it. A temporary name ends
with TEMPORARY, which nobody else uses: what a kill leaves under it is swept away when the folder is next worked on.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from selfplay import faults
from selfplay.adapters import base_folder, is_adapter
from selfplay.digests import known_digest
from selfplay.errors import StorageError
from selfplay.types import Demonstration, Drop, Group, Judgement, PreferencePair, Prompt

R = TypeVar("R")
TEMPORARY = ".unfinished"
# safetensors reports a full disk as an error of its own, which is no OSError
WRITE_ERRORS = (OSError, SafetensorError)

_ADAPTERS: dict[Any, TypeAdapter[Any]] = {
    kind: TypeAdapter(kind) for kind in (Demonstration, Drop, Group, Judgement, PreferencePair, Prompt)
}


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(folder: Path) -> str:
    """SHA-256 over the weight files of a model folder, an adapter's base included: what a policy is, wherever it lies. A file
    that this process has read and nobody has written to since is not read again: a round asks about its policies four times.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise StorageError(f"{folder}: no .safetensors weights in this folder")
    if is_adapter(folder):
        files += sorted(base_folder(folder).glob("*.safetensors"))
    return hashlib.sha256("".join(known_digest(file, file_digest) for file in files).encode()).hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """`data` at `path`, whole or not at all, with its digest beside it. StorageError where the disk refuses."""
    _commit(path, lambda temporary: temporary.write_bytes(data))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """The same for a file that `write` makes at the temporary path that it is given."""
    _commit(path, write)


def _commit(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        faults.hit("store.file")
        write(temporary)
        faults.hit("store.file.temporary")
        _sync(temporary)
        _replace(_digest_path(path), f"{file_digest(temporary)}  {path.name}\n".encode())
        faults.hit("store.file.digest")
        temporary.replace(path)
        _sync(path.parent)
        faults.hit("store.file.done")
    except WRITE_ERRORS as error:
        with contextlib.suppress(OSError):  # it may not be there, or its folder may not be one
            temporary.unlink()
        raise StorageError(
            f"{path}: can't be written ({_reason(error)}). Free space or mend the permissions; "
            "the same command then goes on from the last finished file"
        ) from error


def _reason(error: OSError | SafetensorError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def rewrite(path: Path, data: bytes) -> None:
    """`data` at `path`, whole or not at all, for the few files that change: they have no digest, which a kill between two
    renames would leave at odds with the file. StorageError where the disk refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, data)
    except OSError as error:
        raise StorageError(
            f"{path}: can't be written ({error.strerror}). Free space, then run the same command"
        ) from error


def append_json_line(path: Path, row: Any) -> None:
    """One more line of a file that grows while it is worked on, such as train/steps.jsonl. It has no digest, and a kill may
    leave half a line: whoever goes on writes the file anew (`rewrite`) up to where he goes on from.
    """
    try:
        faults.hit("store.append")
        with path.open("ab") as file:
            file.write(_json_line(row))
    except OSError as error:
        raise StorageError(
            f"{path}: can't be written ({error.strerror}). Free space, then run the same command"
        ) from error


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.write_bytes(data)
    faults.hit("store.replace")
    _sync(temporary)
    temporary.replace(path)


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_bytes(path: Path) -> bytes:
    """The bytes of a finished file. StorageError where they aren't what was written."""
    with _open_whole(path) as file:
        return file.read()


def check_file(path: Path) -> None:
    """StorageError where a finished file differs from its digest."""
    expected = _digest_path(path).read_text().split()[0]
    if file_digest(path) != expected:
        raise StorageError(f"{path}: damaged: its bytes differ from its .sha256. Delete both to make it anew")


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    return json.loads(read_bytes(path))


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Plain mappings, one JSON line each."""
    write_bytes(path, json_lines(rows))


def json_lines(rows: Iterable[Any]) -> bytes:
    """The bytes of such a file."""
    return b"".join(map(_json_line, rows))


def _json_line(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def read_json_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in read_bytes(path).split(b"\n") if line]


def write_records(path: Path, records: Iterable[Any], kind: type[Any]) -> None:
    """Records of one kind as JSON lines, one at a time."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.writelines(record_line(record, kind) for record in records)

    write_file(path, write)


def record_line(record: Any, kind: type[Any]) -> bytes:
    """A record as a JSON line."""
    return _ADAPTERS[kind].dump_json(record) + b"\n"


def read_records(path: Path, kind: type[R]) -> list[R]:
    """The records of a JSON-lines file. StorageError names the line that is no such record."""
    return list(each_record(path, kind))


def each_record(path: Path, kind: type[R]) -> Iterator[R]:
    """The same one by one: the file may be larger than memory."""
    for number, line in enumerate(each_line(path), 1):
        if line != b"\n":
            yield parse_record(line, kind, path, number)


def each_line(path: Path) -> Iterator[bytes]:
    """The lines of a finished file, with their ends. StorageError, before the first, where they aren't what was written."""
    with _open_whole(path) as file:
        yield from file


@contextlib.contextmanager
def _open_whole(path: Path) -> Iterator[BinaryIO]:
    """A finished file, at its start, after a look at its digest."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        expected = _digest_path(path).read_text().split()[0] if _digest_path(path).exists() else None
        with path.open("rb") as file:
            if expected is None or hashlib.file_digest(file, "sha256").hexdigest() == expected:
                file.seek(0)
                yield file
                return
    except OSError as error:
        raise StorageError(f"{path}: can't be read ({error.strerror})") from error
    if temporary.is_file() and file_digest(temporary) == expected:
        # a kill between the two renames of a file written anew: its digest is new, its bytes are still under that name
        with temporary.open("rb") as file:
            yield file
            return
    raise StorageError(f"{path}: damaged: its bytes differ from its .sha256. Delete both to make it anew")


def parse_record(line: bytes, kind: type[R], path: Path, number: int) -> R:
    """The record of one line, which is the file's `number`-th."""
    try:
        record: R = _ADAPTERS[kind].validate_json(line)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise StorageError(f"{path}:{number}: not a {kind.__name__}: {key}: {fault['msg']}") from error
    return record


def write_folder(
    path: Path, write: Callable[[Path], object], *, others: Callable[[], Mapping[str, str]] = dict
) -> None:
    """A folder whose files `write` makes: whole or not at all, with a SHA256SUMS inside. `others` waits for what other
    processes add by `write_part`, and returns what that has returned to them: on their machines these files may be whole
    when this one does not see them yet.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        faults.hit("store.folder")
        write(temporary)
        faults.hit("store.folder.temporary")
        theirs = {temporary / name: digest for name, digest in others().items()}
        files = [f for f in temporary.rglob("*") if f.is_file() and f not in theirs]
        digests = {**theirs, **{f: file_digest(f) for f in files}}
        sums = "".join(f"{digests[f]}  {f.relative_to(temporary)}\n" for f in sorted(digests))
        (temporary / "SHA256SUMS").write_text(sums)
        for file in [*files, temporary / "SHA256SUMS", temporary]:
            _sync(file)
        faults.hit("store.folder.digest")
        temporary.replace(path)
        _sync(path.parent)
        faults.hit("store.folder.done")
    except WRITE_ERRORS as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StorageError(
            f"{path}: can't be written ({_reason(error)}). Free space, then run the same command"
        ) from error


def write_part(path: Path, write: Callable[[Path], Iterable[str]]) -> dict[str, str]:
    """What another process adds to a folder while `write_folder` makes it: the digest of each file, by the names that `write`
    returns. They are on disk then. StorageError where the disk refuses.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        files = {name: temporary / name for name in write(temporary)}
        for file in files.values():
            _sync(file)
        return {name: file_digest(file) for name, file in files.items()}
    except WRITE_ERRORS as error:
        raise StorageError(
            f"{path}: can't be written ({_reason(error)}). Free space, then run the same command"
        ) from error


def remove_folder(path: Path) -> None:
    """Removes a folder that was written, if it is there: as a whole, so a kill in between leaves no half of it in its place."""
    if path.exists():
        temporary = path.with_name(path.name + TEMPORARY)
        faults.hit("store.remove")
        shutil.rmtree(temporary, ignore_errors=True)
        path.replace(temporary)
        faults.hit("store.remove.renamed")
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(folder: Path) -> list[Path]:
    """Removes what stopped processes left unfinished below a folder, and returns those paths. Files of other names are
    never touched. A file whose new digest is in place already is finished by its last rename instead.
    """
    removed = []
    for path in sorted(folder.rglob("*" + TEMPORARY)):
        final = path.with_name(path.name.removesuffix(TEMPORARY))
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif _digest_path(final).exists() and _digest_path(final).read_text().startswith(file_digest(path)):
            path.replace(final)
            continue
        elif path.exists():
            path.unlink()
        else:  # in a folder that was removed just now
            continue
        removed.append(path)
    return removed


def check_folder(path: Path) -> None:
    """StorageError where a file of a finished folder is missing, differs from SHA256SUMS or isn't named there."""
    sums = path / "SHA256SUMS"
    listed = {sums}
    for line in sums.read_text(errors="replace").splitlines() if sums.is_file() else ():
        digest, _, name = line.partition("  ")
        listed.add(path / name)
        if not (path / name).is_file() or file_digest(path / name) != digest:
            raise StorageError(f"{path / name}: damaged or missing. Delete the folder {path} to make it anew")
    unlisted = sorted(f for f in path.rglob("*") if f.is_file() and f not in listed)
    if unlisted or not sums.is_file():
        raise StorageError(
            f"{sums}: damaged or missing: it names no {', '.join(f.name for f in unlisted)}. "
            f"Delete the folder {path} to make it anew"
        )
