"""Claims: which process a run belongs to, on whatever machine, by files in the run's folder alone.

    claims/00003         who made it; made once, by a process that found number 2 free, and never changed
    claims/00003.sign    that it lives: written by it every few seconds, and a last time when it is done
    claims/00003.forgiven    somebody wants the run tried again, whatever became of it up to here

Whoever makes the next number has the run. A store makes a name only once (store.py), so of many who try one
wins. A claim is free when its owner says so; when its owner is dead, which is asked of the system where both
are on one machine; or when there was no new sign for a LEASE by the looker's own monotonic clock. No clock is
compared with another one's, so clocks that jump or disagree change nothing.

An owner has its lease too: where its last sign is old, it goes on only once it has written another, and what
others build on (a checkpoint's manifest, a result) it writes only after a look that the claim is still its.
In the words of the field: claims are leases, signs heartbeats, and the numbers fencing tokens.
"""

import contextlib
import errno
import faulthandler
import functools
import json
import math
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_jax.config import UserError
from llm_jax.store import Store, store
from llm_jax.values import AGAIN, LEASE

BEAT = 10.0  # seconds
PLACE = "LLM_JAX_PLACE"  # what a launcher calls where this process runs
PATIENCE = 1800.0  # seconds without a step, or a part of an evaluation or a save, after which a run hangs

_NUMBER = re.compile(r"\d{5}")
_mine: set["Claim"] = set()
_given_up: set[tuple[str, int]] = set()  # claims of this process that it could not sign as ended
_seen: dict[tuple[str, int], tuple[int | None, float]] = {}  # the last new sign, and when it was first seen
_patience, _before_leaving = float("inf"), lambda: None


class TakenError(UserError):
    """Another process has the run."""


class Claim:
    """A claim of this process. lost: the error to raise once it is gone. still: seconds without a step."""

    def __init__(self, there: Store, number: int) -> None:
        self.lost: Exception | None = None
        self.still = 0.0
        self._store, self._number, self._signed = there, number, time.monotonic()
        self._sign: dict[str, Any] = {"beat": 0, "from": None, "step": 0}
        self._lock = threading.Lock()

    def begin(self, step: int) -> None:
        """The run goes on from `step`."""
        self._sign["from"] = step
        self.move(step)
        self.beat()

    def move(self, step: int) -> None:
        """The run has come to `step`; raises as `confirm` where the claim may be lost."""
        self._sign["step"], self.still = step, 0.0
        if self.lost or time.monotonic() - self._signed > LEASE / 2:
            self.confirm()

    def confirm(self) -> None:
        """A sign, after a look that the run is its own; raises `lost`, or OSError if none can be written."""
        try:
            self.beat()
        except OSError:
            raise
        except Exception as error:  # a bucket's
            raise OSError(errno.EIO, f"no sign can be written ({error})", str(self._store)) from error
        if self.lost:
            raise self.lost

    def beat(self, **more: Any) -> None:
        """A new sign; none once the claim is lost. Raises what the store does where it can't be written."""
        with self._lock:
            now = time.monotonic()
            last = _last(self._store)
            if last != self._number:
                gone = FileNotFoundError(errno.ENOENT, "the folder has gone", str(self._store))
                taken = TakenError(f"{self._store}: another process has taken this run over")
                self.lost = self.lost or (gone if last < self._number else taken)
            if not self.lost and "ended" not in self._sign:
                self._sign |= {"beat": self._sign["beat"] + 1, "time": time.time(), **more}
                self._store.write(_name(self._number, "sign"), json.dumps(self._sign).encode())
                self._signed = now

    def release(self) -> None:
        """Sets the run free; where that can't be written, for others this process's end or the lease does."""
        _mine.discard(self)
        try:
            self.beat(ended=True)
        except Exception:
            _given_up.add((str(self._store), self._number))


def take(folder: str | Path) -> Claim | None:
    """The claim of a run; None where another process has it.

    Whether one of another machine lives is known by its next sign or, after a LEASE, by none. Raises what the
    store does where nothing can be written; then this process may try again.
    """
    there = store(f"{folder}/claims")
    number = _last(there)
    _held(there, number)
    first = _seen.get((str(there), number))
    while _held(there, number):
        if _here(there, number) or _seen.get((str(there), number)) != first:
            return None
        time.sleep(min(1.0, LEASE / 20))
    owner = {"machine": _machine(), "pid": os.getpid(), "born": _born(os.getpid())}
    owner |= {"host": platform.node(), "begun": time.time(), "thread": threading.get_ident()}  # no two alike
    owner |= {"place": os.environ.get(PLACE, "")}
    if not there.create(_name(number + 1), json.dumps(owner).encode()):
        return None
    claim = Claim(there, number + 1)
    try:
        claim.beat()
    except Exception:
        claim.release()
        raise
    _mine.add(claim)
    _heart()
    return claim


def held(folder: str | Path) -> bool:
    """Whether a process has the run, as far as this one can know yet; nothing is written."""
    there = store(f"{folder}/claims")
    return _held(there, _last(there))


def deaths(folder: str | Path) -> tuple[int, int]:
    """(how many owners in a row, the last ones, died after they had begun from one step, that step)."""
    there = store(f"{folder}/claims")
    count, place, names = 0, 0, set(there.names())
    for number in range(_last(there), -1, -1):
        sign = _json(there.read(_name(number, "sign")))
        step = sign.get("from")
        if _name(number, "forgiven") in names or "ended" in sign or step is None or (count and step != place):
            break
        count, place = count + 1, step
    return count, place


def forgive(folder: str | Path) -> None:
    """Ends the row of deaths, wherever they were: from here on they are counted anew."""
    there = store(f"{folder}/claims")
    if (number := _last(there)) >= 0:
        there.create(_name(number, "forgiven"), b"{}")


def stale(folder: str | Path) -> tuple[int, int | None] | None:
    """(number, beat) of the last claim if it is of another machine and has run out; for `bury`."""
    there = store(f"{folder}/claims")
    number = _last(there)
    sign = _read(there, number, "sign")
    if number < 0 or "ended" in sign or _here(there, number) or _held(there, number):
        return None
    return number, sign.get("beat")


def bury(folder: str | Path, number: int, beat: int | None) -> None:
    """What another process of this machine has seen, `stale`, needs no second lease to be known here."""
    _seen[str(store(f"{folder}/claims")), number] = beat, -math.inf


def owner(folder: str | Path) -> dict[str, Any]:
    """What the last claim says: host, pid, step, time of its last sign ...; {} where there is none."""
    there = store(f"{folder}/claims")
    number = _last(there)
    return {name: value for part in ("", "sign") for name, value in _read(there, number, part).items()}


def leave_when_still(seconds: float, before: Callable[[], None] = lambda: None) -> None:
    """Ends this process with AGAIN, its stacks on stderr, when no run of its moves for so long.

    before: called first.
    """
    global _patience, _before_leaving
    _patience, _before_leaving = seconds, before


def stir() -> None:
    """Says that the runs of this process move, though by no step: a part of an evaluation, say, is done."""
    for claim in list(_mine):
        claim.still = 0.0


# ---- whether a claim is free ----


def _held(there: Store, number: int) -> bool:
    if number < 0 or (str(there), number) in _given_up or "ended" in (sign := _read(there, number, "sign")):
        return False
    if _here(there, number):
        made = _read(there, number)
        return _born(made["pid"]) == made["born"] is not None
    key, now = (str(there), number), time.monotonic()
    if key not in _seen or _seen[key][0] != sign.get("beat"):
        _seen[key] = sign.get("beat"), now
    return now - _seen[key][1] < LEASE


def _here(there: Store, number: int) -> bool:
    """Whether its owner is, or was, a process of this machine since it was started."""
    return _read(there, number).get("machine") == _machine()


@functools.cache
def _machine() -> str:
    """What processes have in common that can see each other by number."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return platform.node()


def _born(pid: int) -> str | None:
    """When a process began, as its system counts; None if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if stat[0] in "ZX" else stat[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:  # no /proc on this system
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "?"


# ---- signs ----


def _beat_all() -> None:
    while True:
        time.sleep(BEAT)
        for claim in list(_mine):
            with contextlib.suppress(Exception):  # a full disk, a bucket's error: tried again, see `move`
                claim.beat()


def _watch() -> None:
    """In a thread of its own: a store that doesn't answer holds up the beats."""
    looked = time.monotonic()
    while True:
        time.sleep(BEAT)
        passed = min(time.monotonic() - looked, 2 * BEAT)  # a process that was stopped (SIGSTOP) didn't hang
        looked = time.monotonic()
        for claim in list(_mine):
            claim.still += passed
        if min((claim.still for claim in list(_mine)), default=0.0) > _patience:
            print(f"no step for {_patience:.0f} s, here is where it hangs:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback()
            _before_leaving()
            os._exit(AGAIN)


@functools.cache
def _heart() -> None:
    for does in (_beat_all, _watch):
        threading.Thread(target=does, name="claims", daemon=True).start()


# ---- files ----


def _name(number: int, part: str = "") -> str:
    return f"{number:05d}.{part}" if part else f"{number:05d}"


def _last(there: Store) -> int:
    """The highest number, -1 if there is none."""
    return max((int(name) for name in there.names() if _NUMBER.fullmatch(name)), default=-1)


def _read(there: Store, number: int, part: str = "") -> dict[str, Any]:
    return _json(there.read(_name(number, part))) if number >= 0 else {}


def _json(data: bytes | None) -> dict[str, Any]:
    """{} for what isn't there, or not yet."""
    try:
        value = json.loads(data or b"{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
