"""A manifest of checksums: what a folder's files must be like to be trusted. It stands beside the folder.

00000100/  00000100.json = {"files": {path: [bytes, SHA-256]}, ..., "checksum": that of the rest}
"""

import concurrent.futures
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_jax.records import write_atomically


def place(folder: Path) -> Path:
    """Where the manifest of `folder` is."""
    return folder.with_name(f"{folder.name}.json")


def steps(checkpoints: Path) -> list[int]:
    """The steps of a run's checkpoints that have a manifest, ascending; their files are not checked."""
    return sorted(int(path.stem) for path in checkpoints.glob("*.json") if path.stem.isdecimal())


def write(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes the manifest of all files that are in `folder` now, with `facts` in it; whole or not at all."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {str(path.relative_to(folder)): found for path, found in zip(paths, _digests(paths), strict=True)}
    content = {**facts, "files": files}
    write_atomically(place(folder), json.dumps(content | {"checksum": _checksum(content)}))


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest's content; None if it isn't there or isn't as it was written."""
    try:
        content = json.loads(place(folder).read_bytes())
        return content if content.pop("checksum") == _checksum(content) else None
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None


def problem(folder: Path) -> str | None:
    """What is wrong with the files of `folder`, in a few words; None if they are as they were."""
    content = read(folder)
    if content is None:
        return "its manifest is damaged"
    names = list(content["files"])
    for name, found in zip(names, _digests([folder / name for name in names]), strict=True):
        wanted = content["files"][name]
        if found is None:
            return f"{name} is missing"
        if found != wanted:
            same_size = found[0] == wanted[0]
            return f"{name} has {'changed' if same_size else f'{found[0]} of {wanted[0]} bytes'}"
    return None


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digests(paths: Sequence[Path]) -> list[list | None]:
    """In threads: hashing releases the interpreter's lock, and a large checkpoint is many files."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return list(pool.map(_digest, paths))


def _digest(path: Path) -> list | None:
    """[bytes, SHA-256] of a file; None if it isn't there."""
    try:
        with path.open("rb") as file:
            return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
    except OSError:
        return None
