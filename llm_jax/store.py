"""A folder of small files in which a name can be made only once: on a disk, or in a bucket (gs://...).

What processes of many machines agree by (claims.py). On a disk O_EXCL makes a name, which network file
systems keep too; in a bucket an upload with the precondition that the object has no generation yet.
"""

import contextlib
import os
from pathlib import Path
from typing import Protocol

from llm_jax.files import in_bucket, path, write_atomically


class Store(Protocol):
    """Names are without slashes. A reader finds what was written before or after, never a part of it."""

    def create(self, name: str, data: bytes) -> bool:
        """Makes `name` unless it is there; whether it has. One of many who try, by its data, is told True."""

    def write(self, name: str, data: bytes) -> None:
        """Puts `data` under `name`, whatever was there."""

    def read(self, name: str) -> bytes | None:
        """What stands there; None if nothing does."""

    def names(self) -> list[str]:
        """All names, sorted; none where there is no folder."""

    def __str__(self) -> str:
        """Where it is."""


def store(folder: str | Path) -> Store:
    """The store in `folder`, which is made when it is first written to."""
    place = path(folder).absolute()
    return _Bucket(place) if in_bucket(place) else _Disk(place)


class _Disk:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def create(self, name: str, data: bytes) -> bool:
        """The content comes a moment after the name: until then it reads as nothing, b""."""
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(self._folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            with os.fdopen(file, "wb") as writing:
                writing.write(data)
        except OSError:  # the disk is full: nobody has made it
            (self._folder / name).unlink()
            raise
        return True

    def write(self, name: str, data: bytes) -> None:
        write_atomically(self._folder / name, data, lasting=False)

    def read(self, name: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return (self._folder / name).read_bytes()
        return None

    def names(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return sorted(name for name in os.listdir(self._folder) if not name.startswith("."))
        return []


class _Bucket:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def create(self, name: str, data: bytes) -> bool:
        try:
            (self._folder / name).create_bytes(data)
        except FileExistsError:
            return False
        return True

    def write(self, name: str, data: bytes) -> None:
        (self._folder / name).write_bytes(data)

    def read(self, name: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return (self._folder / name).read_bytes()
        return None

    def names(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return sorted(found.name for found in self._folder.iterdir())
        return []
