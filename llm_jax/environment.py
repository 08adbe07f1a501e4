"""What a run runs on: versions, device, git revision; collected once a process, without slow imports."""

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("llm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@functools.cache
def environment() -> dict[str, Any]:
    """The facts of a start: `versions`, `device` (its kind), how many devices and processes, `platform`, and

    `git_revision` of this code ("+dirty" if tracked files were changed since), None outside a repository.
    """
    import jax

    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "platform": platform.platform(),
        "git_revision": git_revision(),
    }


def git_revision() -> str | None:
    """The revision of the repository that this file stands in."""

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        dirty = ask("status", "--porcelain", "--untracked-files=no")
        return ask("rev-parse", "HEAD") + ("+dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
