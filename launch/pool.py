"""A pool of worker processes on this machine: runs in, failures out, whatever happens to a worker.

    failures = Pool(packs, experiment, shares(workers=2, planned=len(runs))).run()

A worker trains a pack at a time, of one run or of several (packs.py); where a pack of several fails, or its
worker has died twice, each of them is tried alone. The biggest come first, so that the last ones to end are
short, and a worker goes on with the program that it has compiled. A branch waits until its trunk's checkpoint
stands, or will not come any more. A worker that dies is replaced, and its runs go on from their checkpoints.
Two pools may work on the same runs: each run belongs to the process that writes in its folder, and whoever
comes second takes another and looks in again (llm_jax/claims.py). A folder that doesn't answer ends nothing
for a while: whoever decides looks at all it needs first, and acts then, so that it can be asked again.
"""

import collections
import math
import selectors
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch import sweep
from launch.hosts import Followers
from launch.outage import Outage
from launch.packs import Pack
from launch.processes import SECONDS_TO_STOP, Share, Worker
from launch.sweep import LOG, Planned
from llm_jax import claims, files
from llm_jax.config import UserError
from llm_jax.program import Shape
from llm_jax.progress import Status, SweepProgress

TRIES = 3  # of a run, from one checkpoint
SECONDS_BETWEEN_LOOKS = 1.0  # at workers, and at runs on a disk that another launcher has
SECONDS_BETWEEN_REQUESTS = 10.0  # at those in a bucket
SECONDS_OF_SILENCE = 300.0  # after which a worker is taken for dead; it speaks every ten


class WorkersError(RuntimeError):
    """Workers end before any run begins, again and again: something about their place, or the code."""


def origin(run: Planned, shared: int) -> str:
    """What to say of where a run started from: it ends with `shared` steps of another's."""
    if shared:
        return f"; {shared:,} of {run.run.steps:,} steps were its trunk's"
    return f"; {run.trunk.label} left it no checkpoint, all steps are its own" if run.trunk else ""


class Pool:
    """Trains the runs of `packs`, at most one worker process for each share.

    planned: how many runs the stage has, the complete ones included (0: these are all). joins: it is one of
    several that some launcher started, and leaves when there is nothing left that it could begin. again: what
    the launch has given up so far stays so. stop: it ends as by Ctrl-C once this is true. others: hosts that
    train together with this one, each run by one worker on each; there is one share then.
    """

    def __init__(
        self,
        packs: Sequence[Pack],
        experiment: Path,
        shares: Sequence[Share],
        planned: int = 0,
        joins: bool = False,
        again: bool = False,
        stop: Callable[[], bool] = lambda: False,
        others: Followers | None = None,
    ) -> None:
        self._others = others
        self._joins, self._again, self._asked_to_stop = joins, again or joins, stop
        self._waiting = collections.deque(sorted(packs, key=lambda pack: -pack.price))
        self._runs = runs = [run for pack in packs for run in pack.runs]
        numbers: dict[Shape, int] = {}  # hashing a shape takes a while
        self._shape = {run: numbers.setdefault(run.shape, len(numbers)) for run in runs}
        self._elsewhere: list[Planned] = []  # other launchers have them
        self._startable = {run for run in runs if run.trunk is None}
        self._experiment, self._free = experiment, list(shares)
        self._workers: list[Worker] = []
        self._heard: collections.deque[tuple[Worker, dict[str, Any]]] = collections.deque()
        self._tries: collections.Counter[tuple[Planned, int]] = collections.Counter()
        self._stillborn = 0
        self._failures: dict[Planned, str] = {}
        self._refusals: list[str] = []  # those among the failures that are UserErrors
        self._said: set[str] = set()  # of packs: why they are as wide as they are, and where they lie
        self._looked = self._looked_elsewhere = self._left = time.monotonic()
        self._looked_at_trunks = -math.inf
        self._selector = selectors.DefaultSelector()
        self._display = SweepProgress({run.label: run.price for run in runs}, planned=planned)
        self._outage = Outage(self._display.say)

    def run(self, before: Callable[[], None] = lambda: None) -> dict[Planned, str]:
        """Blocks until every run is complete or has failed; returns the reasons of those that failed.

        before: what must be done before a run begins, while workers start, which takes them seconds.
        Raises UserError as soon as a run is refused that never began (its configuration is wrong), or at the
        end if all were refused for one and the same reason; damage in the folder of a run is a failure of
        that run. However it ends, no worker is left, and runs in flight have saved their state.
        """
        if not self._again:  # all are tried again, and no branch should take its trunk for given up
            files.each(Planned.forget_failure, self._runs, self._runs[0].folder)
        try:
            self._occupy()
            before()
            while self._turn():
                for key, _ in self._selector.select(timeout=SECONDS_BETWEEN_LOOKS):
                    self._listen(key.data)
            if len(self._refusals) == len(self._runs) and len(set(self._refusals)) == 1:
                raise UserError(self._refusals[0])
            return self._failures
        except KeyboardInterrupt:
            self._display.say("stopping: runs in flight save their state (by Ctrl-C now they don't)")
            raise
        finally:
            self._display.close()
            self._stop()

    def _turn(self) -> bool:
        """Does what is due; whether there will be more. What the folder doesn't let it do waits."""
        with self._outage.borne():
            while self._heard:
                self._heed(*self._heard[0])
                self._heard.popleft()
            self._look_around()
            self._occupy()
            return self._goes_on()
        time.sleep(SECONDS_BETWEEN_LOOKS)
        return True

    def _goes_on(self) -> bool:
        if any(worker.open for worker in self._workers):
            return True
        if self._joins:
            # Whether the owners that it found are alive is known after a lease.
            looks_on = time.monotonic() - self._left < claims.LEASE + 2 * SECONDS_BETWEEN_LOOKS
            return (looks_on and bool(self._elsewhere)) or bool(self._ready())
        return bool(self._waiting or self._elsewhere)

    # ---- runs ----

    def _next(self, worker: Worker) -> Pack | None:
        """The next pack that is ready, without the runs that somebody else has.

        Best it has a program that this worker, or else no other, has compiled.
        """
        mine = worker.compiled
        others = set().union(*(other.compiled for other in self._workers)) - mine
        while ready := self._ready():
            pack = min(
                ready, key=lambda pack: (self._program(pack) not in mine, self._program(pack) in others)
            )
            stand = files.each(_stand, pack.runs, pack.runs[0].folder)
            self._waiting.remove(pack)
            free = [run for run, how in zip(pack.runs, stand, strict=True) if not self._is_taken(run, *how)]
            if free:
                mine.add(self._program(pack))
                return pack.of(free)
        return None

    def _ready(self) -> list[Pack]:
        """Those that need not wait any more; whether the others still must is asked now and then."""
        if time.monotonic() - self._looked_at_trunks >= self._between:
            wait = [run for pack in self._waiting for run in pack.runs if run not in self._startable]
            self._startable |= set(files.those(lambda run: run.ready, wait, self._runs[0].folder))
            self._looked_at_trunks = time.monotonic()
        return [pack for pack in self._waiting if self._startable.issuperset(pack.runs)]

    @property
    def _between(self) -> float:
        """Seconds between two looks at the runs of others."""
        return SECONDS_BETWEEN_REQUESTS if files.in_bucket(self._runs[0].folder) else SECONDS_BETWEEN_LOOKS

    def _program(self, pack: Pack) -> tuple[int, int]:
        """Equal for packs that one compiled program serves."""
        return self._shape[pack.runs[0]], len(pack.runs)

    def _is_taken(self, run: Planned, status: str, why: str) -> bool:
        """Whether another launcher has it, or it has come to its end; what `_stand` says of it."""
        if status == "running":
            self._leave(run)
        elif status in sweep.ENDS:
            self._end(run, f"{status}, by another launcher")
        elif status == "failed":
            self._failures[run] = why
            self._end(run, f"failed: {why}")
        elif status == "worn out":
            self._fail(run, why)
        else:
            return False
        return True

    def _leave(self, run: Planned) -> None:
        self._display.say(f"{run.label}: another process is at it")
        self._elsewhere.append(run)
        self._left = time.monotonic()

    def _look_around(self) -> None:
        """What other launchers had is complete by now, or free again because its process has died."""
        passed = time.monotonic() - self._looked
        if passed < SECONDS_BETWEEN_LOOKS:
            return
        self._looked = time.monotonic()
        if self._asked_to_stop():
            raise KeyboardInterrupt
        if self._others is not None:
            self._others.check()
        for worker in self._workers:
            if self._others is not None and self._others.death():
                worker.lost = True
                worker.process.kill()
            worker.silence += min(passed, 2 * SECONDS_BETWEEN_LOOKS)  # not while this process was stopped
            if worker.silence > SECONDS_OF_SILENCE:
                worker.process.kill()
        self._look_elsewhere()

    def _look_elsewhere(self) -> None:
        if not self._elsewhere or self._looked - self._looked_elsewhere < self._between:
            return
        self._looked_elsewhere = self._looked
        runs, stand = self._elsewhere, files.each(_stand, self._elsewhere, self._runs[0].folder)
        self._elsewhere = []
        for run, (status, why) in zip(runs, stand, strict=True):
            if status == "running":
                self._elsewhere.append(run)
            elif not self._is_taken(run, status, why):
                self._waiting.append(Pack((run,)))

    def _end(self, run: Planned, note: str) -> None:
        self._startable |= {branch for branch in self._runs if branch.trunk is run}
        self._display.end(run.label, note, good=note.startswith("done"))

    def _fail(self, run: Planned, reason: str) -> None:
        try:
            run.record_failure(reason)
        except OSError as error:  # a full disk may be why
            self._display.say(f"{run.folder}: its failure can't be recorded: {error.strerror}")
        self._failures[run] = reason
        self._end(run, f"failed: {reason}; see {run.folder / LOG}")

    # ---- workers ----

    def _occupy(self) -> None:
        """Gives the packs that wait to idle workers, and starts workers for the rest."""
        for worker in self._workers:
            if worker.state == "taking" and not worker.open and (pack := self._next(worker)):
                try:
                    worker.give(pack)
                except OSError:
                    self._waiting.appendleft(pack)
                    raise
                worker.state = "training"
        starting = sum(worker.state == "starting" for worker in self._workers)
        while self._free and len(self._waiting) > starting:
            worker = Worker(self._experiment, self._free[-1], self._others)
            self._workers.append(worker)
            self._free.pop()
            self._selector.register(worker.pipe, selectors.EVENT_READ, worker)
            starting += 1

    def _listen(self, worker: Worker) -> None:
        self._heard += ((worker, message) for message in worker.messages())
        if worker.closed:
            self._selector.unregister(worker.pipe)
            self._heard.append((worker, {"kind": "closed"}))

    def _heed(self, worker: Worker, message: dict[str, Any]) -> None:
        match message:
            case {"kind": "ready"}:
                worker.state = "taking"
            case {"kind": "progress", "status": status}:
                self._display.show(Status(*status))
            case {"kind": "continues", "run": number, "step": step}:
                self._display.say(f"{worker.pack.runs[number].label}: continued from step {step:,}")
            case {"kind": "placed", "lines": lines}:
                self._say_once(worker, "\n".join(lines))
            case {"kind": "packed", "members": members, "why": why}:
                self._say_once(worker, why)
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
            case {"kind": "failed" | "refused" | "taken" | "broken" as kind, "message": reason}:
                runs = worker.open
                if len(runs) > 1:
                    self._display.say(f"{worker.pack.label}: {reason}; each is tried alone")
                    self._waiting.extendleft(Pack((run,)) for run in reversed(runs))
                elif kind == "failed":
                    self._fail(runs[0], reason)
                elif kind == "taken":
                    self._leave(runs[0])
                elif kind == "broken":
                    if self._tries_left(runs, reason)[runs[0]]:
                        self._waiting.appendleft(Pack((runs[0],)))
                else:
                    self._refused(worker, runs[0], reason)
                worker.state, worker.open = "leaving", []
            case {"kind": "closed"}:
                self._bury(worker)

    def _say_once(self, worker: Worker, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self._display.say(f"{worker.pack.label}: {what}")

    def _refused(self, worker: Worker, run: Planned, reason: str) -> None:
        """A run's UserError: its folder is damaged, or the sweep is wrong."""
        worker.process.wait()  # so that what the run's folder says isn't about this worker
        if run.begun:
            self._refusals.append(reason)
            self._fail(run, reason)
        else:
            run.clear()
            raise UserError(reason)

    def _bury(self, worker: Worker) -> None:
        """A worker has ended; the runs that it still had wait again, or have failed."""
        cause = worker.cause_of_death()
        left = self._tries_left(worker.open, cause)
        self._workers.remove(worker)
        self._free.append(worker.share)
        if worker.open and files.in_bucket(worker.open[0].folder):  # it couldn't any more
            sweep.add_to_log(worker.pack.runs[0].folder, worker.printed())
        again = [run for run in worker.open if left[run]]
        if len(again) > 1 and min(left[run] for run in again) == 1:
            # One of them may be the cause, or all together too large.
            self._display.say(f"{worker.pack.label}: each is tried alone")
            self._waiting.extendleft(Pack((run,)) for run in reversed(again))
        elif again:
            self._waiting.appendleft(worker.pack.of(again))
        elif worker.state == "starting":
            self._stillborn += 1
            if self._stillborn >= TRIES:
                raise WorkersError(f"workers can't start: {cause}\n{worker.printed()}")
        worker.close()

    def _tries_left(self, runs: Sequence[Planned], cause: str) -> dict[Planned, int]:
        """How often runs that have died may be tried again from where they stand; at 0 they are given up.

        Deaths elsewhere count too.
        """
        stood = files.each(lambda run: (run.standing, claims.deaths(run.folder)), runs, self._runs[0].folder)
        left = {}
        for run, (place, (elsewhere, there)) in zip(runs, stood, strict=True):
            self._tries[run, place] += 1
            tries = max(self._tries[run, place], elsewhere if there == place else 0)
            left[run] = max(TRIES - tries, 0)
            if left[run]:
                self._display.say(f"{run.label}: {cause}; try {tries + 1} of {TRIES} continues it")
            else:
                self._fail(run, f"{cause}, {tries} times at step {place:,}")
        return left

    def _stop(self) -> None:
        """Ends all workers: they save what they are at; whoever takes too long, or a second Ctrl-C, kills."""
        for worker in self._workers:
            worker.stop()
        deadline = time.monotonic() + SECONDS_TO_STOP
        try:
            for worker in self._workers:
                worker.wait(deadline)
        finally:
            for worker in self._workers:
                worker.end()
            self._selector.close()


def _stand(run: Planned) -> tuple[str, str]:
    """(a run's status, why it failed); worn out is one that died too often, and its place with it."""
    if (status := run.status) == "failed":
        return status, run.failure
    deaths, step = claims.deaths(run.folder) if status == "missing" else (0, 0)
    if deaths >= TRIES and step == run.standing:
        return "worn out", f"the process that trained it died, {deaths} times at step {step:,}"
    return status, ""
