"""Worker processes of this machine, and what of it each of them gets."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launch.packs import Pack
from launch.sweep import Planned
from llm_jax.config import UserError
from llm_jax.distributed import tpus
from llm_jax.values import AGAIN

if TYPE_CHECKING:
    from launch.hosts import Followers

MOST_WORKERS = 8  # if nobody says how many: each takes half a gigabyte
SECONDS_TO_STOP = 120.0  # a worker has to end its step and save its state
SECONDS_TO_TELL = 5.0  # other hosts have why their workers died, of which this host's own may know before


@dataclasses.dataclass(frozen=True)
class Share:
    """What of this machine one worker gets: cores (None: any) and environment variables."""

    cores: frozenset[int] | None = None
    environment: tuple[tuple[str, str], ...] = ()


def shares(workers: int | None, planned: int) -> list[Share]:
    """The machine divided among `workers` processes (None: as many as suit it), but no more than `planned`.

    planned: the runs of a plan's stage, complete ones included. On CPUs a result depends, in its last bits,
    on how many cores its process has, so that number must not change as a sweep gets on.

    Without GPUs each has cores of its own, all as many: small models leave a second core idle half the time,
    and threads that share cores spend 4 to 10% more on the same tokens. With GPUs, workers take turns at
    them and divide their memory. A machine with TPUs is one worker's, as libtpu serves one process: raises
    UserError where more are asked for.
    """
    if tpus(os.environ):
        if (workers or 1) > 1:
            raise UserError(
                f"{workers} workers on a machine with TPUs, which serve one process: ask for 1; its runs are "
                "packed, or spread over the chips by execution.mesh"
            )
        return [Share()]
    devices = gpus()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    count = max(1, min(workers or len(devices) or min(len(cores), MOST_WORKERS), planned))
    if devices:
        if count == 1 and workers == 1:
            return [Share()]
        fraction = ("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / -(-count // len(devices)):.3f}")
        return [
            Share(environment=(("CUDA_VISIBLE_DEVICES", devices[n % len(devices)]), fraction))
            for n in range(count)
        ]
    if count == 1 or count > len(cores):
        return [Share()] * count
    size = len(cores) // count
    return [Share(frozenset(cores[n * size : (n + 1) * size])) for n in range(count)]


def one_core_each(parts: Sequence[Share]) -> bool:
    """Whether a run alone leaves its worker nothing that a pack could fill (analysis/packing.md)."""
    return all(part.cores is not None and len(part.cores) == 1 for part in parts)


def on_cpus() -> bool:
    """Whether workers train on CPUs; what other devices there are, they alone see."""
    return not gpus() and not tpus(os.environ)


def gpus() -> list[str]:
    """The names that CUDA_VISIBLE_DEVICES knows this machine's NVIDIA GPUs by."""
    if os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return []
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in chosen.split(",") if name]
    return [str(n) for n in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


class Worker:
    """A worker process, the pipe of its messages, its pack, and those of the runs that haven't ended.

    others: the other hosts of its place, whose workers do all that this one does.
    """

    def __init__(self, experiment: Path, share: Share, others: "Followers | None" = None) -> None:
        self.share, self.others = share, others
        self.pack: Pack | None = None
        self.open: list[Planned] = []
        self.compiled: set[tuple[int, int]] = set()  # programs
        self.state: Literal["starting", "taking", "training", "leaving"] = "starting"
        self.closed = False  # it has closed its pipe
        self.silence = 0.0  # seconds since it last said something
        self.lost = False  # it was killed because another worker of its place has died
        self.pipe, write = os.pipe()
        self._unread = b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, "-m", "launch.worker", f"--experiment={experiment}", f"--messages={write}"]
        with inheriting(share.cores):
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=self._errors,
                stderr=self._errors,
                pass_fds=(write,),
                env=os.environ | dict(share.environment) | (others.begin() if others else {}),
                start_new_session=True,  # Ctrl-C reaches the launcher only, which ends its workers itself
            )
        os.close(write)

    def give(self, pack: Pack) -> None:
        task = pack.task()  # which looks at folders
        self.pack, self.open = pack, list(pack.runs)
        if self.others:
            self.others.say(task=task)
        self.send(task)

    def send(self, task: Mapping[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has just died: whoever listens will see
            self.process.stdin.write(json.dumps(task).encode() + b"\n")
            self.process.stdin.flush()

    def stop(self) -> None:
        """Asks it to save and end."""
        if self.others:
            self.others.say(stop=True)
        self.process.terminate()

    def wait(self, deadline: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, deadline - time.monotonic()))

    def end(self) -> None:
        """Ends it now, if it hasn't by itself."""
        self.process.kill()
        self.process.wait()
        self.close()

    def messages(self) -> Iterator[dict[str, Any]]:
        """What it has said since the last call."""
        data = os.read(self.pipe, 1 << 16)
        self.closed, self.silence = not data, 0.0
        *lines, self._unread = (self._unread + data).split(b"\n")
        yield from map(json.loads, lines)

    def printed(self) -> str:
        """What it printed before its first run."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace").strip()

    def cause_of_death(self) -> str:
        code = self.process.wait()
        if self.others and (code == AGAIN or self.lost):
            return self.others.death(SECONDS_TO_TELL) or "one of the workers of its place hung, or died"
        if code < 0:
            guess = " (out of memory?)" if -code == signal.SIGKILL else ""
            return f"its worker was killed by {signal.Signals(-code).name}{guess}"
        if code == AGAIN:
            return "its worker hung"
        return f"its worker ended with exit code {code}"

    def close(self) -> None:
        os.close(self.pipe)
        self._errors.close()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


@contextlib.contextmanager
def inheriting(cores: frozenset[int] | None) -> Iterator[None]:
    """A process started inside may use these cores only; XLA makes its thread pools accordingly."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
