"""A folder of small files in which a name can be made only once: on a disk, or in a bucket (gs://...).

What processes of many machines agree by (claims.py). On a disk O_EXCL makes a name, which network file
systems keep too; in a bucket an upload with the precondition that the object has no generation yet.
"""

import contextlib
import os
import threading
from pathlib import Path
from typing import Any, Protocol


class Store(Protocol):
    """Names are without slashes. A reader finds what was written before or after, never a part of it."""

    def create(self, name: str, data: bytes) -> bool:
        """Makes `name` unless it is there; whether it has. Of many who try, one is told True."""

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
    return _Bucket(str(folder)) if "://" in str(folder) else _Disk(Path(folder).absolute())


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
        half = self._folder / f".{name}.{os.getpid()}-{threading.get_ident()}.tmp"
        half.write_bytes(data)
        half.replace(self._folder / name)

    def read(self, name: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return (self._folder / name).read_bytes()
        return None

    def names(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return sorted(name for name in os.listdir(self._folder) if not name.startswith("."))
        return []


class _Bucket:
    """By gcsfs; STORAGE_EMULATOR_HOST names an emulator. Nothing is cached: others write here too."""

    def __init__(self, folder: str) -> None:
        import fsspec

        protocol, _, self._folder = folder.rstrip("/").partition("://")
        self._files: Any = fsspec.filesystem(protocol, use_listings_cache=False)

    def __str__(self) -> str:
        return self._folder

    def create(self, name: str, data: bytes) -> bool:
        try:
            self._files.pipe_file(f"{self._folder}/{name}", data, mode="create")
        except FileExistsError:
            return False
        return True

    def write(self, name: str, data: bytes) -> None:
        self._files.pipe_file(f"{self._folder}/{name}", data)

    def read(self, name: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return self._files.cat_file(f"{self._folder}/{name}")
        return None

    def names(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return sorted(path.rpartition("/")[2] for path in self._files.ls(self._folder, detail=False))
        return []
