"""What a launch has asked engines for, in the folder of its sweep: jobs/, a file each.

A file is written before its job is asked for, and says that it has ended only once its place is known to be
given back. So what costs money is listed, whatever became of the launchers, of which there may be several.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from llm_jax.store import Store, store


def enlist(folder: Path, engine: str, job: str, dollars_per_hour: float = 0.0) -> None:
    """Lists a job of an engine's; twice is once."""
    content = {"engine": engine, "dollars_per_hour": dollars_per_hour}
    _files(folder).create(quote(job, safe=""), json.dumps(content).encode())


def strike(folder: Path, jobs: Iterable[str]) -> None:
    """Says that jobs have ended, and hold no place any more."""
    for job in jobs:
        _files(folder).write(quote(job, safe=""), json.dumps(_read(folder, job) | {"ended": True}).encode())


def listed(folder: Path) -> dict[str, list[str]]:
    """The jobs that haven't ended, as far as is known, by engine."""
    found: dict[str, list[str]] = {}
    for job in map(unquote, _files(folder).names()):
        content = _read(folder, job)
        if content and "ended" not in content:
            found.setdefault(content["engine"], []).append(job)
    return found


def dollars_per_hour(folder: Path) -> float:
    """What a worker costs, by the job that was told the most; 0.0 where nobody said."""
    told = [_read(folder, unquote(name)).get("dollars_per_hour", 0.0) for name in _files(folder).names()]
    return max(told, default=0.0)


def _files(folder: Path) -> Store:
    return store(f"{folder}/jobs")


def _read(folder: Path, job: str) -> dict[str, Any]:
    """{} for a file that is just being written."""
    return json.loads(_files(folder).read(quote(job, safe="")) or b"{}")
