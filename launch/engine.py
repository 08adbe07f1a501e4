"""Engines: where workers run. What one must do is little; all else is the same for all of them.

An engine starts one command in as many places as asked: machines, parts of them, or several machines that
train one run at a time together, on each of which it is started. All see the folder of the experiment. The
command is `python -m launch.local --join ...`: it makes the plan from the same file, takes the runs that are
ready and that nobody has (llm_jax/claims.py), and ends when there is none left for it. So an engine need not
know what a run is. It says which places live, and `Crew` fills them up.

What a launcher keeps in the folder: jobs/, what it asked an engine for (jobs.py); stop, which ends it all.
"""

import contextlib
import functools
import os
import platform
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from absl import flags

from launch import jobs, order, status, sweep
from launch.outage import Outage
from launch.pool import TRIES, WorkersError
from launch.sweep import Plan, Planned
from llm_jax import claims, command_line, files, records
from llm_jax.command_line import Chosen
from llm_jax.config import UserError

SECONDS_BETWEEN_LOOKS, SECONDS_BETWEEN_LINES = 2.0, 30.0
SECONDS_TO_STOP = 300.0  # a place, however far away, has to save its state and end
STOP = "stop"


class Engine(Protocol):
    """Somewhere that a command can be started. A job is the engine's own name for one place at work."""

    name: str
    python: str  # what it is called there

    def start(self, command: Sequence[str]) -> str:
        """Starts `command` in another place, or asks for one; returns the job. What costs money until it is
        given back is listed before it is asked for (jobs.py). Raises UserError if there can't be one."""

    def living(self, jobs: Iterable[str]) -> set[str]:
        """Those that run, or wait for their place."""

    def stop(self, jobs: Iterable[str]) -> None:
        """Asks jobs to save and end (SIGTERM where there is such a thing), and gives their places back."""

    def lost(self, job: str) -> bool:
        """Whether the place of a job that ended was taken away: that says nothing of what ran there."""

    def tail(self, job: str) -> str:
        """The last that it printed, "" where that isn't known."""

    def waits(self) -> str:
        """Why places that were asked for aren't there yet, "" where that isn't known."""


class Crew:
    """Trains the runs of a plan in at most `places` places of an engine."""

    def __init__(self, engine: Engine, folder: Path, places: int, command: Sequence[str]) -> None:
        self._engine, self._folder, self._places, self._command = engine, folder, places, list(command)
        self._jobs: dict[str, str] = {}  # those that live, and what their places are called in claims
        self._started, self._outage = 0, Outage(functools.partial(print, flush=True))
        self._in_vain, self._progress = 0, (-1, -1)

    def train(
        self, missing: Sequence[Planned], planned: int, before: Callable[[], None]
    ) -> Mapping[Planned, str]:
        """As an order.Engine. Raises WorkersError if places end again and again before any run begins."""
        files.each(Planned.forget_failure, missing, self._folder)
        before()
        said, going_on = 0.0, True
        try:
            while going_on:
                begun = time.monotonic()
                with self._outage.borne():
                    if (self._folder / STOP).exists():
                        raise KeyboardInterrupt
                    if not (going_on := self._look(missing)):
                        break
                    if begun - said > SECONDS_BETWEEN_LINES:
                        said = begun
                        lines = [status.line(status.rows(self._folder)), self._engine.waits()]
                        print("; waits: ".join(filter(None, lines)), flush=True)
                # A look at many runs in a bucket takes a while, and each request money.
                time.sleep(max(SECONDS_BETWEEN_LOOKS, time.monotonic() - begun))
        except KeyboardInterrupt:
            with contextlib.suppress(OSError):
                (self._folder / STOP).touch()  # places that a signal doesn't reach see it too
            raise
        finally:
            self._engine.stop(self._engine.living(self._jobs))
        failures = files.each(lambda run: run.failure, missing, self._folder)
        return {run: why for run, why in zip(missing, failures, strict=True) if why}

    def _look(self, missing: Sequence[Planned]) -> bool:
        """Fills places up; False once every run is complete or given up."""
        found = files.each(lambda run: run.status, missing, self._folder)
        standing = dict(zip(missing, found, strict=True))
        left = [run for run in missing if standing[run] in ("missing", "running")]
        living = self._engine.living(self._jobs)
        for job in self._jobs.keys() - living:
            self._ended(job, (len(left), sum(files.each(lambda run: run.standing, left, self._folder))))
        self._jobs = {job: self._jobs[job] for job in living}
        running = [run.folder for run in left if standing[run] == "running"]
        busy = {owner.get("place") for owner in files.each(claims.owner, running, self._folder)}
        waits = [run for run in left if standing[run] == "missing"]
        ready = sum(files.each(lambda run: run.ready, waits, self._folder))
        free = sum(place not in busy for place in self._jobs.values())  # it will take one of these
        for _ in range(min(self._places - len(living), ready - free)):
            self._start()
        return bool(left)

    def _start(self) -> None:
        """Starts a place, or asks for one, under a name that no other launcher gives."""
        self._started += 1
        place = f"{platform.node()}-{os.getpid()}-{self._started}"
        job = self._engine.start([*self._command, f"--place={place}"])
        self._jobs[job] = place
        jobs.enlist(self._folder, self._engine.name, job, flags.FLAGS.dollars_per_hour)

    def _ended(self, job: str, progress: tuple[int, int]) -> None:
        """A place that ends has found nothing more, or has died; where none gets any run on, all give up."""
        if self._engine.lost(job):
            return
        self._in_vain = 0 if progress != self._progress else self._in_vain + 1
        self._progress = progress
        if self._in_vain >= TRIES * self._places:
            raise WorkersError(f"{self._engine.name}: workers get no run on\n{self._engine.tail(job)}")


# ---- the command ----


def refuse_each(hosts: int) -> None:
    """Raises UserError where a place of several hosts should train several runs at a time."""
    if hosts > 1 and (flags.FLAGS.each or 1) > 1:
        raise UserError(f"--each={flags.FLAGS.each}: the {hosts} hosts of a worker train one run together")


def define_flags(places: str) -> None:
    """The flags that all engines have beside --config; places: what --workers counts."""
    command_line.define_config()
    flags.DEFINE_integer("workers", 1, places, lower_bound=1)
    flags.DEFINE_integer("each", None, "processes that train at once in each of them", lower_bound=1)
    flags.DEFINE_bool("dry_run", False, "print the plan and all commands, and do nothing")
    flags.DEFINE_string("pack", "auto", "runs trained as one program: auto, off, or how many at most")
    flags.DEFINE_string("folder", None, "where the runs go, the same path everywhere")
    flags.DEFINE_float("dollars_per_hour", 0.0, "what one worker costs, for `launch.status`")


def folder_of(experiment: Chosen) -> Path:
    """Where the runs go; raises UserError for the folder of a single run."""
    folder = records.chosen_folder(flags.FLAGS.folder, sweep.folder_of(experiment))
    if not files.in_bucket(folder) and folder.exists() and not folder.is_dir():
        raise UserError(f"--folder={folder} is a file; name a folder")
    with contextlib.suppress(*_unseen()):
        if (folder / "config.json").exists():
            raise UserError(f"{folder} is the folder of a single run; name another by --folder")
    return folder


def plan_of(experiment: Chosen, folder: Path) -> Plan:
    """The plan; that of an empty folder in a dry run which can't look at it, as a bucket out of reach."""
    try:
        return sweep.make_plan(experiment, folder)
    except _unseen() as error:
        print(f"{error.filename}: {error.strerror}; planned as if nothing were there")
        with tempfile.TemporaryDirectory() as empty:
            return sweep.make_plan(experiment, Path(empty))


def _unseen() -> tuple[type[OSError], ...]:
    return (OSError,) if flags.FLAGS.dry_run else ()


def kept_here(folder: Path, name: str) -> Path:
    """Where the logs of an engine go: in the folder or, for a bucket's, in runs/ of this machine."""
    return (Path("runs") / folder.name if files.in_bucket(folder) else folder) / name


def command_of(experiment: Chosen, folder: Path, python: str, joins: bool = True) -> list[str]:
    """What a place runs, in this code's folder: a worker of the launch or, if it doesn't join, the rest."""
    file = Path(experiment.module.__file__)
    file = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
    where = f"{file}:{experiment.scale}"
    overrides = [f"--config.{path}={value}" for path, value in experiment.overrides]
    command = [python, "-m", "launch.local", f"--config={where}", *overrides]
    command += [f"--folder={folder.absolute()}", f"--pack={flags.FLAGS.pack}"]
    command += [f"--workers={flags.FLAGS.each}"] if flags.FLAGS.each else []
    return [*command, "--join" if joins else "--again"]


def planned(experiment: Chosen, folder: Path) -> Plan:
    """The plan, printed and, unless it is a dry run, written; the last launch's `stop` is forgotten."""
    order.check(experiment)
    if hasattr(experiment.module, "measure"):
        raise UserError(f"{experiment.module.__file__} measures, it trains no sweep: use launch.local")
    plan = plan_of(experiment, folder)
    print(f"{folder}: the plan of {experiment.module.__file__}:{experiment.scale}")
    print(sweep.summary(plan), flush=True)
    if not flags.FLAGS.dry_run:
        plan.write()
        (folder / STOP).unlink(missing_ok=True)
    return plan


def carry_out(engine: Engine) -> int:
    """The order of the chosen experiment, its runs trained by a crew; what an engine's command does."""
    experiment = command_line.chosen()
    folder = folder_of(experiment)
    plan, command = planned(experiment, folder), command_of(experiment, folder, engine.python)
    if flags.FLAGS.dry_run:
        print(f"{flags.FLAGS.workers} times: {shlex.join(command)}")
        return 0
    crew = Crew(engine, folder, flags.FLAGS.workers, command)
    return stoppable(engine.name, lambda: order.carry_out(plan, crew.train))


def stoppable(name: str, launch: Callable[[], int]) -> int:
    """The exit code of `launch`: 1 where no worker can work, with what the last one printed.

    130 or 143, and how to go on, if Ctrl-C, `stop`, SIGTERM or the end of its terminal ends it.
    """
    terminated = threading.Event()

    def terminate(number: int, _: Any) -> None:
        if number == signal.SIGHUP:  # nobody reads any more
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if not terminated.is_set():  # of a job's processes each may be told, and tell the others
            terminated.set()
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it: its terminal has been closed
        signal.signal(signal.SIGHUP, terminate)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without it
    try:
        return launch()
    except WorkersError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = [sys.executable, "-m", f"launch.{name}", *sys.argv[1:]]
        print(f"\nstopped; to continue: {shlex.join(again)}")
        return 143 if terminated.is_set() else 130
