"""Files, on a disk or in a bucket: whole or not there at all; and JSON of values that JSON doesn't know.

JSON has no numbers for nan and the infinities. What is read back here has them as the strings "NaN",
"Infinity" and "-Infinity", and a text that reads so with a backslash in front (`dumps`, `parsed`); what other
tools read has null (`with_nulls`).
"""

import concurrent.futures
import contextlib
import json
import math
import os
import posixpath
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llm_jax.values import UserError

AT_ONCE = 64  # requests to a bucket, each of which takes a twentieth of a second
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_LIKE_A_NUMBER = re.compile(r"\\*(NaN|-?Infinity)")
_within = threading.local()


def path(folder: str | Path, inside: str = "") -> Path:
    """A path on a disk or, where the name begins with gs://, in a bucket (buckets.py), used alike.

    inside: a path seen from there, or a whole one. Raises UserError for any other kind of place.
    """
    if "://" in inside or inside.startswith("/"):
        folder, inside = inside, ""
    if "://" not in str(folder):
        return Path(folder, inside)
    kind, _, name = f"{folder}/{inside}".partition("://")
    if kind != "gs" or not name.strip("/"):
        raise UserError(f"{folder}: folders are on a disk or in a bucket, gs://bucket/name")
    from llm_jax.buckets import BucketPath  # late: most need none

    return BucketPath(f"gs://{posixpath.normpath(name)}")


def in_bucket(path: str | Path) -> bool:
    return str(path).startswith("gs://")


def folders(place: Path) -> list[Path]:
    """Those in the folder `place`; none where there is no such."""
    try:
        if in_bucket(place):
            return place.folders()
        return [Path(entry.path) for entry in os.scandir(place) if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def relative(path: str | Path, start: str | Path) -> str:
    """`path` seen from the folder `start`; whole, where one is in a bucket and the other isn't."""
    if in_bucket(path) != in_bucket(start):
        return str(path) if in_bucket(path) else os.path.abspath(path)
    return os.path.relpath(path, start)  # of gs://bucket/x it keeps what matters here


def each(function: Callable[[Any], Any], items: Iterable[Any], folder: str | Path) -> list[Any]:
    """`function` of each item, many at once where they are things in a `folder` of a bucket.

    What it does itself for `each` of something is done one after the other.
    """
    if not in_bucket(folder) or getattr(_within, "each", False):
        return [function(item) for item in items]

    def one(item: Any) -> Any:
        _within.each = True
        return function(item)

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(one, items))


def those(function: Callable[[Any], Any], items: Iterable[Any], folder: str | Path) -> list[Any]:
    """The items of which `function` is true, looked at as by `each`."""
    items = list(items)
    found = each(function, items, folder)
    return [item for item, true in zip(items, found, strict=True) if true]


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[Path]:
    """A folder of a disk, for what can't write in a bucket: what is in it is in `folder` in the end."""
    if not in_bucket(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        try:
            yield Path(place)
        finally:
            found = [file for file in sorted(Path(place).rglob("*")) if file.is_file()]
            names = [str(file.relative_to(place)) for file in found]
            each(lambda name: (folder / name).write_bytes(Path(place, name).read_bytes()), names, folder)


def check_writable(folder: Path) -> None:
    """Raises OSError where nothing can be written in `folder`."""
    if in_bucket(folder):
        (folder / ".writable").touch()
        (folder / ".writable").unlink(missing_ok=True)  # others try too, and a request may be repeated
    else:
        tempfile.TemporaryFile(dir=folder).close()


def remove(folder: Path) -> None:
    """Removes a folder with all that is in it, if it is there."""
    if in_bucket(folder):
        folder.rmtree(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def write_atomically(path: Path, content: str | bytes, lasting: bool = True) -> None:
    """A reader, and whoever comes after a crash, finds the old content or the new one, never a part of it.

    Of several who write at once one is last. lasting: it survives the machine's crash, too.
    """
    if in_bucket(path):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return
    half = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with half.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        if lasting:
            file.flush()
            os.fsync(file.fileno())
    half.replace(path)


def dumps(value: Any, indent: int | None = None) -> str:
    """Valid JSON of plain values, arrays of one number, and numbers that aren't finite (as strings)."""
    return json.dumps(plain(value), indent=indent, allow_nan=False)


def plain(value: Any) -> Any:
    """`value` as JSON knows it."""

    def one(value: Any) -> Any:
        value = value.item() if hasattr(value, "item") else value
        if isinstance(value, float) and not math.isfinite(value):
            return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
        if value is None or isinstance(value, (int, float, bool)):
            return value
        text = str(value)
        return f"\\{text}" if _LIKE_A_NUMBER.fullmatch(text) else text

    return _mapped(one, value)


def parsed(value: Any) -> Any:
    """The inverse of `plain`."""

    def one(value: Any) -> Any:
        if not isinstance(value, str) or not _LIKE_A_NUMBER.fullmatch(value):
            return value
        return NOT_FINITE[value] if value in NOT_FINITE else value[1:]

    return _mapped(one, value)


def with_nulls(value: Any) -> Any:
    """numpy's numbers and arrays as JSON's, NaN and infinities as null."""

    def one(value: Any) -> Any:
        if hasattr(value, "tolist"):
            return _mapped(one, value.tolist())
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return _mapped(one, value)


def _mapped(one: Callable[[Any], Any], value: Any) -> Any:
    """`one` of every value in nested mappings and sequences, which become dicts and lists."""
    if isinstance(value, Mapping):
        return {str(key): _mapped(one, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(one, item) for item in value]
    return one(value)
