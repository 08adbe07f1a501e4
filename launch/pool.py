"""A pool of worker processes on this machine: runs in, failures out, whatever happens to a worker.

    failures = Pool(packs, experiment, shares(workers=2, planned=len(runs))).run()

A worker trains a pack at a time, of one run or of several (packs.py); where a pack of several fails, or its
worker has died twice, each of them is tried alone. The biggest come first, so that the last ones to end are
short, and a worker goes on with the program that it has compiled. A branch waits until its trunk's checkpoint
stands, or will not come any more. A worker that dies is replaced, and its runs go on from their checkpoints.
Two pools may work on the same runs: each run belongs to the process that writes in its folder, and whoever
comes second takes another and looks in again.
"""

import collections
import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from launch.packs import Pack
from launch.sweep import LOG, Planned
from llm_jax.config import UserError
from llm_jax.program import Shape
from llm_jax.progress import Status, SweepProgress

TRIES = 3
SECONDS_BETWEEN_LOOKS = 1.0  # at runs that another launcher has
MOST_WORKERS = 8  # if nobody says how many: each takes half a gigabyte
SECONDS_TO_STOP = 120.0  # a worker has to end its step and save its state


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
    them and divide their memory.
    """
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


def gpus() -> list[str]:
    """The names that CUDA_VISIBLE_DEVICES knows this machine's NVIDIA GPUs by."""
    if os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return []
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in chosen.split(",") if name]
    return [str(n) for n in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


class Worker:
    """A worker process, the pipe of its messages, its pack, and those of the runs that haven't ended."""

    def __init__(self, experiment: Path, share: Share) -> None:
        self.share = share
        self.pack: Pack | None = None
        self.open: list[Planned] = []
        self.compiled: set[tuple[int, int]] = set()  # programs
        self.state: Literal["starting", "taking", "training", "leaving"] = "starting"
        self.silent = False  # it has closed its pipe
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
                env=os.environ | dict(share.environment),
                start_new_session=True,  # Ctrl-C reaches the launcher only, which ends its workers itself
            )
        os.close(write)

    def give(self, pack: Pack) -> None:
        self.pack, self.open = pack, list(pack.runs)
        with contextlib.suppress(BrokenPipeError):  # it has just died: the pool will see
            self.process.stdin.write(json.dumps(pack.task()).encode() + b"\n")
            self.process.stdin.flush()

    def messages(self) -> Iterator[dict[str, Any]]:
        """What it has said since the last call."""
        data = os.read(self.pipe, 1 << 16)
        self.silent = not data
        *lines, self._unread = (self._unread + data).split(b"\n")
        yield from map(json.loads, lines)

    def printed(self) -> str:
        """What it printed before its first run."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace").strip()

    def cause_of_death(self) -> str:
        code = self.process.wait()
        if code < 0:
            guess = " (out of memory?)" if -code == signal.SIGKILL else ""
            return f"its worker was killed by {signal.Signals(-code).name}{guess}"
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


def origin(run: Planned, shared: int) -> str:
    """What to say of where a run started from: it ends with `shared` steps of another's."""
    if shared:
        return f"; {shared:,} of {run.run.steps:,} steps were its trunk's"
    return f"; {run.trunk.label} left it no checkpoint, all steps are its own" if run.trunk else ""


class Pool:
    """Trains the runs of `packs`, at most one worker process for each share.

    planned: how many runs the stage has, the complete ones included (0: these are all).
    """

    def __init__(
        self, packs: Sequence[Pack], experiment: Path, shares: Sequence[Share], planned: int = 0
    ) -> None:
        self._waiting = collections.deque(sorted(packs, key=lambda pack: -pack.price))
        self._runs = runs = [run for pack in packs for run in pack.runs]
        numbers: dict[Shape, int] = {}  # hashing a shape takes a while
        self._shape = {run: numbers.setdefault(run.shape, len(numbers)) for run in runs}
        self._elsewhere: list[Planned] = []  # other launchers have them
        self._experiment, self._free = experiment, list(shares)
        self._workers: list[Worker] = []
        self._tries: collections.Counter[Planned] = collections.Counter()
        self._stillborn = 0
        self._failures: dict[Planned, str] = {}
        self._refusals: list[str] = []  # those among the failures that are UserErrors
        self._said: set[str] = set()  # why packs are as wide as they are
        self._looked = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._display = SweepProgress({run.label: run.price for run in runs}, planned=planned)

    def run(self, before: Callable[[], None] = lambda: None) -> dict[Planned, str]:
        """Blocks until every run is complete or has failed; returns the reasons of those that failed.

        before: what must be done before a run begins, while workers start, which takes them seconds.
        Raises UserError as soon as a run is refused that never began (its configuration is wrong), or at the
        end if all were refused for one and the same reason; damage in the folder of a run is a failure of
        that run. However it ends, no worker is left, and runs in flight have saved their state.
        """
        for run in self._runs:
            run.forget_failure()  # all are tried again, and no branch should take its trunk for given up
        try:
            self._occupy()
            before()
            while self._waiting or self._elsewhere or any(worker.open for worker in self._workers):
                self._look_elsewhere()
                self._occupy()
                for key, _ in self._selector.select(timeout=SECONDS_BETWEEN_LOOKS):
                    self._listen(key.data)
            if len(self._refusals) == len(self._runs) and len(set(self._refusals)) == 1:
                raise UserError(self._refusals[0])
            return self._failures
        except KeyboardInterrupt:
            self._display.say("stopping: runs in flight save their state (Ctrl-C again: they don't)")
            raise
        finally:
            self._display.close()
            self._stop()

    # ---- runs ----

    def _next(self, worker: Worker) -> Pack | None:
        """The next pack that is ready, without the runs that somebody else has.

        Best it has a program that this worker, or else no other, has compiled.
        """
        mine = worker.compiled
        others = set().union(*(other.compiled for other in self._workers)) - mine
        while ready := [pack for pack in self._waiting if pack.ready]:
            pack = min(
                ready, key=lambda pack: (self._program(pack) not in mine, self._program(pack) in others)
            )
            self._waiting.remove(pack)
            taken = [run for run in pack.runs if run.status == "running"]
            for run in taken:
                self._leave(run)
            if free := pack.of(set(pack.runs) - set(taken)).runs:
                mine.add(self._program(pack))
                return pack.of(free)
        return None

    def _program(self, pack: Pack) -> tuple[int, int]:
        """Equal for packs that one compiled program serves."""
        return self._shape[pack.runs[0]], len(pack.runs)

    def _leave(self, run: Planned) -> None:
        self._display.say(f"{run.label}: another process is at it")
        self._elsewhere.append(run)

    def _look_elsewhere(self) -> None:
        """What other launchers had is complete by now, or free again because its process has died."""
        if not self._elsewhere or time.monotonic() - self._looked < SECONDS_BETWEEN_LOOKS:
            return
        self._looked = time.monotonic()
        for run in list(self._elsewhere):
            if (status := run.status) != "running":
                self._elsewhere.remove(run)
                if run.complete:
                    self._end(run, f"{status}, by another launcher")
                else:
                    self._waiting.append(Pack((run,)))

    def _end(self, run: Planned, note: str) -> None:
        self._display.end(run.label, note, good=note.startswith("done"))

    def _fail(self, run: Planned, reason: str) -> None:
        run.record_failure(reason)
        self._failures[run] = reason
        self._end(run, f"failed: {reason}; see {run.folder / LOG}")

    # ---- workers ----

    def _occupy(self) -> None:
        """Gives the packs that wait to idle workers, and starts workers for the rest."""
        for worker in self._workers:
            if worker.state == "taking" and not worker.open and (pack := self._next(worker)):
                worker.state = "training"
                worker.give(pack)
        starting = sum(worker.state == "starting" for worker in self._workers)
        while self._free and len(self._waiting) > starting:
            worker = Worker(self._experiment, self._free.pop())
            self._workers.append(worker)
            self._selector.register(worker.pipe, selectors.EVENT_READ, worker)
            starting += 1

    def _listen(self, worker: Worker) -> None:
        for message in worker.messages():
            match message:
                case {"kind": "ready"}:
                    worker.state = "taking"
                case {"kind": "progress", "status": status}:
                    self._display.show(Status(*status))
                case {"kind": "continues", "run": number, "step": step}:
                    self._display.say(f"{worker.pack.runs[number].label}: continued from step {step:,}")
                case {"kind": "packed", "members": members, "why": why}:
                    if why not in self._said:
                        self._said.add(why)
                        self._display.say(f"{worker.pack.label}: {why}")
                    if rest := worker.pack.runs[members:]:
                        self._waiting.appendleft(Pack(rest))
                        worker.open = [run for run in worker.open if run not in rest]
                case {
                    "kind": "finished",
                    "run": number,
                    "status": status,
                    "loss": loss,
                    "steps_shared": shared,
                }:
                    run, note = (
                        worker.pack.runs[number],
                        status if loss is None else f"{status}, loss {loss:.4f}",
                    )
                    self._end(run, note + origin(run, shared))
                    worker.open.remove(run)
                case {"kind": "failed" | "refused" as kind, "message": reason}:
                    worker.state, runs = "leaving", worker.open
                    worker.open = []
                    if len(runs) > 1:
                        self._display.say(f"{worker.pack.label}: {reason}; each is tried alone")
                        self._waiting.extendleft(Pack((run,)) for run in reversed(runs))
                    elif kind == "failed":
                        self._fail(runs[0], reason)
                    else:
                        self._refused(worker, runs[0], reason)
        if worker.silent:
            self._bury(worker)

    def _refused(self, worker: Worker, run: Planned, reason: str) -> None:
        """A run's UserError: another launcher was faster, or its folder is damaged, or the sweep is wrong."""
        worker.process.wait()  # so that what the run's folder says isn't about this worker
        if run.status == "running" or run.complete:
            self._leave(run)
        elif run.begun:
            self._refusals.append(reason)
            self._fail(run, reason)
        else:
            run.clear()
            raise UserError(reason)

    def _bury(self, worker: Worker) -> None:
        """A worker has ended; the runs that it still had wait again, or have failed."""
        self._selector.unregister(worker.pipe)
        self._workers.remove(worker)
        self._free.append(worker.share)
        cause = worker.cause_of_death()
        for run in worker.open:
            self._tries[run] += 1
            if self._tries[run] == TRIES:
                self._fail(run, f"{cause}, {TRIES} times")
            else:
                self._display.say(f"{run.label}: {cause}; try {self._tries[run] + 1} of {TRIES} continues it")
        again = [run for run in worker.open if self._tries[run] < TRIES]
        if len(again) > 1 and max(self._tries[run] for run in again) == TRIES - 1:
            # One of them may be the cause, or all together too large.
            self._display.say(f"{worker.pack.label}: each is tried alone")
            self._waiting.extendleft(Pack((run,)) for run in reversed(again))
        elif again:
            self._waiting.appendleft(worker.pack.of(again))
        elif worker.state == "starting":
            self._stillborn += 1
            if self._stillborn >= TRIES:
                raise RuntimeError(f"workers can't start: {cause}\n{worker.printed()}")
        worker.close()

    def _stop(self) -> None:
        """Ends all workers: they save what they are at; whoever takes too long, or a second Ctrl-C, kills."""
        for worker in self._workers:
            worker.process.terminate()
        deadline = time.monotonic() + SECONDS_TO_STOP
        try:
            for worker in self._workers:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(max(0.0, deadline - time.monotonic()))
        finally:
            for worker in self._workers:
                worker.process.kill()
                worker.process.wait()
                worker.close()
            self._selector.close()
