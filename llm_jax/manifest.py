"""A manifest of checksums: what a folder's files must be like to be trusted. It stands beside the folder.

00000100/  00000100.json = {"files": {path: [bytes, SHA-256]}, ..., "checksum": that of the rest}

A bucket's store has checksums of its objects itself, so that none has to be read: [bytes, MD5 or CRC-32C].
"""

import concurrent.futures
import errno
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from llm_jax import claims
from llm_jax.distributed import agreed, leads, spread
from llm_jax.files import in_bucket, write_atomically

_WROTE = re.compile(r"process_(\d+)")  # in the names that orbax gives to what each process writes


def place(folder: Path) -> Path:
    """Where the manifest of `folder` is."""
    return folder.with_name(f"{folder.name}.json")


def steps(checkpoints: Path) -> list[int]:
    """The steps of a run's checkpoints that have a manifest, ascending; their files are not checked."""
    return sorted(int(path.stem) for path in checkpoints.glob("*.json") if path.stem.isdecimal())


def write(folder: Path, files: Mapping[str, list | None], facts: Mapping[str, Any]) -> None:
    """Writes the manifest of a folder whose `digests` are these, with `facts` in it; whole or not at all.

    Raises OSError where one of its files couldn't be read.
    """
    if unread := [name for name, found in files.items() if found is None]:
        raise OSError(errno.EIO, "what was written can't be read", str(folder / unread[0]))
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
    """What is wrong with the files of `folder`, in a few words; None if they are as they were.

    All processes of a run call it: each reads its own files.
    """
    content = read(folder) if leads() else None
    found = digests(folder, lambda: content["files"] if content else ())
    return agreed(lambda: _difference(content, found))


def digests(folder: Path, names: Callable[[], Iterable[str]] | None = None) -> dict[str, list | None]:
    """Size and checksum of the files of `folder`, all or those named, None for one that can't be read.

    All processes of a run call it, as often: each reads what it wrote, process 0 what many wrote, and is told
    of all.
    """
    if in_bucket(folder):
        return folder.objects() if leads() else {}

    def parts() -> list[list[str]]:
        every = names or (
            lambda: (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        )
        found: list[list[str]] = [[] for _ in range(jax.process_count())]
        for name in sorted(every()):
            wrote = _WROTE.search(name)
            found[int(wrote[1]) % len(found) if wrote else 0].append(name)
        return found

    def read(part: list[str]) -> dict[str, list | None]:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:  # hashing releases the interpreter's lock
            return dict(zip(part, pool.map(_digest, [folder / name for name in part]), strict=True))

    return spread(str(folder), parts, read)


def _difference(content: Mapping[str, Any] | None, found: Mapping[str, list | None]) -> str | None:
    if content is None:
        return "its manifest is damaged"
    for name, wanted in content["files"].items():
        there = found.get(name)
        if wanted is None:
            return "its manifest is damaged"
        if there is None:
            return f"{name} is missing"
        if there != wanted:
            same_size = there[0] == wanted[0]
            return f"{name} has {'changed' if same_size else f'{there[0]} of {wanted[0]} bytes'}"
    return None


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> list | None:
    """[bytes, SHA-256] of a file; None if it can't be read."""
    try:
        with path.open("rb") as file:
            return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
    except OSError:
        return None
    finally:
        claims.stir()
