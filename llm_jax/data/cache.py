"""Where prepared data is kept, and how one process at a time prepares it."""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

from llm_jax.config import UserError


def cache_folder() -> pathlib.Path:
    """The folder of prepared data: the environment's LLM_JAX_CACHE, else ~/.cache/llm_jax."""
    return pathlib.Path(os.path.expanduser(os.environ.get("LLM_JAX_CACHE") or "~/.cache/llm_jax"))


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits of bytes, or of anything that JSON can write."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def once(path: pathlib.Path, build: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """`path`, made by `build(partial)` where it is missing.

    `build` writes a file or folder under another name, which takes its own only when it is complete. Of
    several processes one builds and the others wait; the system drops the lock of a process that is killed,
    and the next one finds what it left at `partial`. A UserError of `build` leaves nothing there.
    Raises UserError where the cache can't be written.
    """
    if path.exists():
        return path
    with _locked(path.with_name(path.name + ".lock")):
        if not path.exists():
            partial = path.with_name(path.name + ".partial")
            try:
                build(partial)
            except UserError:
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
                raise
            os.replace(partial, path)
    return path


@contextlib.contextmanager
def _locked(place: pathlib.Path) -> Iterator[None]:
    """Holds the lock file `place`, and removes it at the end.

    Who waited for it then holds a file that has no name any more, and begins anew.
    """
    while True:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            lock = open(place, "w")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"can't write the cache ({error}); set LLM_JAX_CACHE to another folder") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that prepares {place.stem}", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock.fileno()).st_nlink:
                try:
                    yield
                finally:
                    place.unlink(missing_ok=True)
                return
