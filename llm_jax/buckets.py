"""Folders in an object store, gs://bucket/name: paths that are used as pathlib's are (files.path makes them).

There are no folders, only names with slashes: none is made, and one is there as long as something is in it.
An object is whole or not there, and can't be added to; nothing is cached, as others write here too. By gcsfs
(the extra gs); STORAGE_EMULATOR_HOST names an emulator. All that goes wrong is an OSError with its reason.
"""

import errno
import fnmatch
import functools
import io
import logging
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from etils.epath.gpath import PosixGPath

from llm_jax.values import LEASE, UserError

SECONDS_TO_ANSWER = LEASE / 4  # a request; then it is asked once more
SECONDS_TO_CONNECT = 5.0


class BucketPath(PosixGPath):
    """What orbax takes too; each method is one request, or one for every thousand names listed."""

    def absolute(self) -> "BucketPath":
        return self

    def resolve(self, strict: bool = False) -> "BucketPath":
        return self

    def read_bytes(self) -> bytes:
        return self._ask("cat_file")

    def read_text(self, encoding: str | None = None, errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors)

    def write_bytes(self, data: bytes) -> int:
        self._ask("pipe_file", data)
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str = "strict") -> int:
        return self.write_bytes(data.encode(encoding or "utf-8", errors))

    def create_bytes(self, data: bytes) -> None:
        """Writes it unless it is there, which raises FileExistsError; one of many who try does."""
        try:
            self._ask("pipe_file", data, mode="create")
        except FileExistsError:  # the upload is tried again where its answer was lost, and then finds itself
            if self.read_bytes() != data:
                raise

    def open(self, mode: str = "r", **_: Any) -> Any:
        """To write in is a file that stands there once it is closed."""
        if mode in ("r", "rb"):
            return io.BytesIO(self.read_bytes()) if mode == "rb" else io.StringIO(self.read_text())
        if mode in ("wb", "xb"):
            return self._ask("open", "wb")
        raise OSError(errno.EINVAL, f"objects can't be opened by {mode!r}", str(self))

    def exists(self) -> bool:
        return bool(self._kind())

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def is_file(self) -> bool:
        return self._kind() == "file"

    def iterdir(self) -> Iterator["BucketPath"]:
        return iter(self._listed("file", "directory"))

    def folders(self) -> list["BucketPath"]:
        return self._listed("directory")

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """Of names in this folder alone."""
        assert "/" not in pattern and "**" not in pattern, f"{pattern}: `objects` has what is further down"
        try:
            return iter([path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern)])
        except FileNotFoundError:
            return iter(())

    def objects(self) -> dict[str, list]:
        """{name below this folder: [bytes, MD5]} of all that is in it, as the store itself knows them.

        Where it was uploaded in parts, the store has its CRC-32C alone.
        """
        root = len(str(self).removeprefix("gs://")) + 1
        found = self._ask("find", detail=True).items()
        return {name[root:]: [int(x["size"]), x.get("md5Hash") or x["crc32c"]] for name, x in found}

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        pass

    def rmdir(self) -> None:
        pass

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        self.write_bytes(b"")

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._ask("rm_file")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self, missing_ok: bool = False) -> None:
        try:
            self._ask("rm", recursive=True)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def _listed(self, *kinds: str) -> list["BucketPath"]:
        found = self._ask("ls", detail=True)
        names = sorted(facts["name"].rstrip("/") for facts in found if facts["type"] in kinds)
        return [path for path in map(BucketPath, (f"gs://{name}" for name in names)) if path != self]

    def _kind(self) -> str:
        try:
            return self._ask("info")["type"]
        except FileNotFoundError:
            return ""

    def _ask(self, method: str, *given: Any, **options: Any) -> Any:
        def ask() -> Any:
            return getattr(_store(), method)(str(self), *given, **options)

        try:
            try:
                return ask()
            except TimeoutError:  # most often one connection is dead, not the store
                return ask()
        except UserError:
            raise
        except Exception as error:
            kind = next((kind for kind in _KNOWN if isinstance(error, kind)), OSError)
            reason = _REASONS.get(kind) or " ".join(str(error).split()) or type(error).__name__
            raise kind(_KNOWN[kind], reason, str(self)) from error


_KNOWN = {
    FileNotFoundError: errno.ENOENT,
    FileExistsError: errno.EEXIST,
    PermissionError: errno.EACCES,
    TimeoutError: errno.ETIMEDOUT,
    OSError: errno.EIO,
}
_REASONS = {
    FileNotFoundError: "no such bucket or object",
    TimeoutError: f"twice no answer within {SECONDS_TO_ANSWER:.0f} s",
}
_opening = threading.Lock()


def _store() -> Any:
    if not _opened.cache_info().currsize:
        _check_reachable()  # not one after the other
    with _opening:
        return _opened()


def _check_reachable() -> None:
    """Raises OSError where no connection can be had: the libraries below try for minutes, each in turn."""
    try:
        import fsspec
        import gcsfs  # noqa: F401
    except ImportError:
        raise UserError('folders in a bucket need the extra gs: pip install "llm-jax[gs]"') from None
    if "session_kwargs" in fsspec.config.conf.get("gs", {}):
        return  # by a proxy, say
    where = urlsplit(os.environ.get("STORAGE_EMULATOR_HOST") or "https://storage.googleapis.com")
    try:
        address = where.hostname, where.port or (443 if where.scheme == "https" else 80)
        socket.create_connection(address, timeout=SECONDS_TO_CONNECT).close()
    except OSError as error:
        raise OSError(f"{where.netloc} can't be reached ({error.strerror or error})") from None


@functools.cache
def _opened() -> Any:
    import fsspec

    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):  # what orbax writes arrays by has it from here
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
        os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    options = {"use_listings_cache": False, "requests_timeout": SECONDS_TO_ANSWER}
    fsspec.config.conf.setdefault("gs", {}).update(options)  # orbax lists too
    for name in ("gcsfs", "aiohttp", "google.auth"):  # what they raise we tell ourselves
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return fsspec.filesystem("gs")
