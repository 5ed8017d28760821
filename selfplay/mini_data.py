"""Fetch the small real data sets of the mini recipes out of published packages:  python -m selfplay.mini_data data/

The rows belong to their authors, so they are fetched, never shipped. Each package is pinned by version and SHA-256;
pip checks the digest before it unpacks anything, and each file is checked again as it is written.
"""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

from selfplay.errors import DataError, SelfplayError, StorageError


class Member(NamedTuple):
    """One file inside a package: where it lies there, what it is called here, and its SHA-256."""

    path: str
    name: str
    sha256: str


class Package(NamedTuple):
    """A source distribution that carries data."""

    requirement: str
    archive: str
    sha256: str
    members: tuple[Member, ...]


PACKAGES = (
    Package(  # Apache-2.0
        requirement="llamafactory==0.9.5",
        archive="llamafactory-0.9.5.tar.gz",
        sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        members=(
            Member(  # 999 rows: instruction, input, output
                path="llamafactory-0.9.5/data/alpaca_en_demo.json",
                name="alpaca_en_demo.json",
                sha256="bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318",
            ),
            Member(  # 300 preference pairs: conversations, chosen, rejected
                path="llamafactory-0.9.5/data/dpo_en_demo.json",
                name="dpo_en_demo.json",
                sha256="b949be2421cfa62744afcf1b479f95b299d643d1a4c1c97d1341b314a1aa5cb3",
            ),
        ),
    ),
)


def fetch(folder: Path, packages: tuple[Package, ...] = PACKAGES) -> list[Path]:
    """The data files in `folder`, fetched where they aren't there yet. A file with another content is an error."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        if all(present(folder, member) for member in package.members):
            continue
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch.") as scratch:
            archive = download(package, Path(scratch))
            for member in package.members:
                extract(archive, member, folder)
    return [folder / member.name for package in packages for member in package.members]


def present(folder: Path, member: Member) -> bool:
    """Whether the file is there. DataError where it is there and differs, rather than overwrite someone's edit."""
    path = folder / member.name
    if not path.exists():
        return False
    check_digest(path, path.read_bytes(), member.sha256, remedy="Remove it, then run the same command again.")
    return True


def download(package: Package, scratch: Path) -> Path:
    """The package's archive, fetched with pip from the index it is set up for."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    # The data is in the source archive alone. --require-hashes: pip runs a source archive's build file to learn its
    # name, and must not do so before the archive is known to be the right one.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--no-binary", ":all:", "--require-hashes", "-r", str(requirements), "-d", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DataError(
            f"pip could not fetch {package.requirement} (exit {done.returncode}). It said:\n{done.stderr.strip()}\n"
            "Check the network and the package index in pip's settings, then run the same command again."
        )
    return scratch / package.archive


def extract(archive: Path, member: Member, folder: Path) -> None:
    """Write one file of the archive. It appears whole or not at all."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            file = tar.extractfile(member.path)
            if file is None:
                raise DataError(f"{archive.name}: {member.path} is no file.")
            content = file.read()
    except (OSError, KeyError, tarfile.TarError, EOFError) as error:
        raise DataError(f"{archive.name}: can't read {member.path}: {error}") from error
    check_digest(archive / member.path, content, member.sha256, remedy="The package has changed; nothing was written.")
    partial = folder / f".{member.name}.partial"
    try:
        partial.write_bytes(content)
        partial.replace(folder / member.name)
    except OSError as error:
        raise StorageError(f"{folder / member.name}: can't write: {error}") from error


def check_digest(path: Path, content: bytes, sha256: str, *, remedy: str) -> None:
    """Raise DataError unless `content` has the SHA-256 `sha256`."""
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DataError(f"{path}: SHA-256 is {found}, expected {sha256}. {remedy}")


def main(arguments: list[str]) -> int:
    """Print the path of each data file in the folder named by the one argument; the exit code, as in errors.py."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m selfplay.mini_data FOLDER", file=sys.stderr)
        return 64
    try:
        for path in fetch(Path(arguments[0])):
            print(path)
    except SelfplayError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
