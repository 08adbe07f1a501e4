"""Runs an experiment on Cloud TPUs: slices are asked for as queued resources, set up, used and deleted.

    python -m launch.tpu --config=experiments/isoflop.py --workers=4 --accelerator=v5litepod-8 --spot \\
        --zone=us-west4-a --folder=/mnt/runs/isoflop --mount="sudo mount ..."
    python -m launch.tpu ... --dry_run            # prints every command, and does nothing

A slice is one worker: where it is of several hosts (v5litepod-16), they train one run at a time together.
One that is taken back (--spot), or breaks, is deleted and asked for again, and what it trained goes on from
its checkpoints. What gcloud refuses for a reason that lasts (no project, no such zone) ends the launch; where
slices or quota are wanting, it says so and asks again. Slices are listed in the folder until they are known
to have gone: those of a launcher that died are deleted by the next one, and all of them by launch.stop. The
code is of the last commit. The folder is in a bucket, --folder=gs://..., or on a disk that all slices and
this machine see: --mount is the command that brings it to a slice. For slices of several hosts gcloud's ssh
goes by your key, which an agent has to have: ssh-add ~/.ssh/google_compute_engine.
"""

import concurrent.futures
import contextlib
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from absl import flags

from launch import engine, gcloud, jobs
from launch.engine import SECONDS_TO_STOP
from launch.gcloud import NO_SUCH
from llm_jax import claims, command_line, files
from llm_jax.config import UserError

SECONDS_BETWEEN_LOOKS = 20.0  # at a slice that is waited for
SECONDS_BETWEEN_DELETIONS = 60.0  # after DELETIONS in vain
SECONDS_TO_LAND = 60.0  # a request that a launcher made before it died
SET_UPS, DELETIONS = 5, 5  # a slice that has just come, or a network, may not answer at once
ALIVE = ["--ssh-flag=-oServerAliveInterval=30", "--ssh-flag=-oServerAliveCountMax=4"]  # or ssh waits for ever
TAKEN = ("SUSPENDED", "SUSPENDING", "DELETING")
ENDED = ("FAILED", *TAKEN)
SET_UP = (  # uv brings a Python that is new enough, whatever the image has
    "rm -rf llm_jax && mkdir llm_jax && tar -xzf llm_jax.tar.gz -C llm_jax && cd llm_jax && "
    "python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --python 3.11 .venv && "
    "python3 -m uv pip install --quiet --python .venv '.[tpu,gs]'"
)

# Runs a command, its output in a file if one is named, to its end, or until a look says that it is in vain;
# returns (exit code, what it printed).
Run = Callable[[Sequence[str], Path | None, Callable[[], bool]], tuple[int, str]]


def never() -> bool:
    return False


class Tpu:
    """The engine. Each slice has a thread, which makes it, waits for it, sets it up, uses and deletes it."""

    name, python = "tpu", ".venv/bin/python"

    def __init__(self, folder: Path, slices: "Slices", run: Run) -> None:
        self._folder, self._slices, self._run = folder, slices, run
        self._launcher = f"{slices.prefix}-{int(time.time()):x}-{os.getpid():x}"
        self._threads: dict[str, threading.Thread] = {}
        self._over: set[str] = set()  # what ran there has ended, whether the slice could be deleted or not
        self._lost: set[str] = set()
        self._deletions: list[threading.Thread] = []  # of slices that launchers left behind
        self._stopping, self._deadline = threading.Event(), math.inf
        self._said: dict[str, str] = {}
        self._waits: dict[str, str] = {}
        self._granted, self._refused = False, ""

    def start(self, command: Sequence[str]) -> str:
        if self._refused:
            raise UserError(f"gcloud: {self._refused}")
        if not self._threads:
            self._clear()
        name = f"{self._launcher}-{len(self._threads)}"
        job = self._slices.job(name)
        jobs.enlist(self._folder, self.name, job, flags.FLAGS.dollars_per_hour)
        self._threads[job] = threading.Thread(target=self._live, args=(name, job, command), daemon=True)
        self._threads[job].start()
        return job

    def living(self, asked_for: Iterable[str]) -> set[str]:
        return {job for job in asked_for if job not in self._over}

    def lost(self, job: str) -> bool:
        return job in self._lost

    def left(self) -> list[str]:
        """Slices of this launcher that could not be deleted."""
        return [job for job in jobs.listed(self._folder).get(self.name, []) if job in self._threads]

    def stop(self, asked_for: Iterable[str]) -> None:
        """What runs there sees the file that says stop; slices are deleted when it has ended."""
        self._deadline = time.monotonic() + SECONDS_TO_STOP
        self._stopping.set()
        try:
            for thread in (*self._threads.values(), *self._deletions):
                thread.join()
        except KeyboardInterrupt:
            left = ", ".join(sorted(job for job, thread in self._threads.items() if thread.is_alive()))
            print(f"not given back: {left}; python -m launch.stop --folder={self._folder} does it")
            raise
        self._stopping.clear()
        self._deadline = math.inf

    def tail(self, job: str) -> str:
        return self._said.get(job, "")

    def waits(self) -> str:
        why = [*self._waits.values()]
        return f"gcloud: {why[-1]}" if why else ""

    def _clear(self) -> None:
        """Deletes the slices of launchers that have died; each has a claim of its own.

        What such a launcher had just asked for may come only now: all is deleted twice.
        """

        def delete(left: list[str]) -> None:
            if gone := give_back(left, self._run):
                self._stopping.wait(SECONDS_TO_LAND)
                jobs.strike(self._folder, give_back(gone, self._run))

        claims.take(self._folder / "launchers" / self._launcher)
        of: dict[str, list[str]] = {}
        for job in jobs.listed(self._folder).get(self.name, []):
            of.setdefault(job.rpartition("/")[2].rpartition("-")[0], []).append(job)
        for launcher, left in of.items():
            if claims.take(self._folder / "launchers" / launcher):
                self._deletions.append(threading.Thread(target=delete, args=(left,), daemon=True))
                self._deletions[-1].start()

    def _live(self, name: str, job: str, command: Sequence[str]) -> None:
        asked_for = True
        try:
            if not (asked_for := self._ask_for(name, job)):
                return
            while (state := self._state(name, job)) != "ACTIVE":
                if state in ENDED or self._stopping.wait(SECONDS_BETWEEN_LOOKS):
                    return
            for line in self._slices.set_up(name):
                self._do(name, job, line, tries=SET_UPS)
            log = engine.kept_here(self._folder, "tpu") / f"{name}.txt"
            self._do(name, job, self._slices.use(name, command), log)
        except subprocess.SubprocessError:
            pass  # `tail` says what; the crew asks for another slice
        finally:
            self._slices.code(name).unlink(missing_ok=True)
            self._waits.pop(job, None)
            self._delete(job, asked_for or self._may_be_there(name))

    def _do(self, name: str, job: str, line: Sequence[str], log: Path | None = None, tries: int = 1) -> None:
        """Runs a command for a slice, again where it fails; raises SubprocessError when that is in vain.

        log: of what trains there, which saves its state when a stop is asked for.
        """
        for attempt in range(tries):
            if attempt and self._stopping.wait(SECONDS_BETWEEN_LOOKS):
                break
            code, printed = self._run(line, log, lambda: self._in_vain(name, job, saves=log is not None))
            if not code:
                return
            self._said[job] = f"{shlex.join(line)}\n{printed}"
            if self._in_vain(name, job):
                break
        raise subprocess.SubprocessError

    def _delete(self, job: str, there: bool) -> None:
        """Deletes a slice, again until it has gone or the launch ends; then `launch.stop` may."""
        while there:
            last = self._stopping.is_set()
            there = not give_back([job], self._run)
            self._over.add(job)
            if last:
                break
            if there:
                self._stopping.wait(SECONDS_BETWEEN_DELETIONS)
        self._over.add(job)
        if not there:
            jobs.strike(self._folder, [job])

    def _ask_for(self, name: str, job: str) -> bool:
        """Asks for a slice, again while what speaks against it may pass; False if none is to be had.

        Once one was granted the arguments are right, so that whatever comes later may pass.
        """
        while True:
            code, printed = self._run(line := self._slices.make(name), None, never)
            if not code or gcloud.EXISTS in printed:  # by an answer that was lost
                self._granted = True
                self._waits.pop(job, None)
                return True
            self._said[job] = f"{shlex.join(line)}\n{printed}"
            if not self._granted and gcloud.lasts(printed):
                self._refused = gcloud.error(printed)
                return False
            self._waits[job] = gcloud.error(printed)
            if self._stopping.wait(SECONDS_BETWEEN_LOOKS):
                return False

    def _may_be_there(self, name: str) -> bool:
        """Whether a slice that was refused has to be deleted all the same: gcloud knows it, or can't say."""
        code, printed = self._run(self._slices.state(name), None, never)
        return not code or not (NO_SUCH in printed or gcloud.lasts(printed))

    def _state(self, name: str, job: str) -> str:
        """The state of a slice, "" while gcloud can't say."""
        code, printed = self._run(self._slices.state(name), None, never)
        if code and NO_SUCH not in printed:
            self._waits[job] = gcloud.error(printed)
            return ""
        self._waits.pop(job, None)
        state = "DELETING" if code else printed.strip()
        if state in ENDED:
            self._said.setdefault(job, f"{name}: {state}")
        if state in TAKEN:
            self._lost.add(job)
        return state

    def _in_vain(self, name: str, job: str, saves: bool = False) -> bool:
        """Whether the slice has been taken back, or a stop was asked for, and what `saves` had its time."""
        if self._stopping.is_set() and (not saves or time.monotonic() > self._deadline):
            return True
        return self._state(name, job) in ENDED


class Slices:
    """The commands of gcloud for slices of one kind."""

    def __init__(
        self, prefix: str, accelerator: str, runtime: str, zone: str, project: str, spot: bool, mount: str
    ):
        self.hosts = gcloud.hosts_of(f"--accelerator={accelerator}", accelerator)
        self.prefix, self._mount = prefix, mount
        self._project, self._zone, self._there = project, zone, there(project, zone)
        self._kind = [f"--accelerator-type={accelerator}", f"--runtime-version={runtime}"] + ["--spot"] * spot

    def job(self, name: str) -> str:
        """All that is needed to delete it."""
        return "/".join((self._project, self._zone, name))

    def make(self, name: str) -> list[str]:
        return self._queued("create", name, f"--node-id={name}", *self._kind, "--async")

    def state(self, name: str) -> list[str]:
        return self._queued("describe", name, "--format=value(state.state)")

    def code(self, name: str) -> Path:
        """Where the code is packed here; slices that are set up at once don't write one file."""
        return Path(tempfile.gettempdir()) / f"{name}.tar.gz"

    def set_up(self, name: str) -> list[list[str]]:
        code = self.code(name)
        pack = ["git", "archive", "--format=tar.gz", f"--output={code}", "HEAD"]
        copy = [*_TPU, "tpu-vm", "scp", str(code), f"{name}:llm_jax.tar.gz", "--worker=all"]
        copy += ["--quiet", *self._there]
        mount = [self.on(name, self._mount)] if self._mount else []
        return [pack, copy, self.on(name, SET_UP), *mount]

    def use(self, name: str, command: Sequence[str]) -> list[str]:
        return self.on(name, f"cd llm_jax && exec {shlex.join(command)}")

    def on(self, name: str, command: str) -> list[str]:
        said = ["--worker=all", f"--command={command}", *ALIVE, "--quiet"]
        return [*_TPU, "tpu-vm", "ssh", name, *said, *self._there]

    def _queued(self, verb: str, name: str, *options: str) -> list[str]:
        return [*_TPU, "queued-resources", verb, name, *self._there, *options]


_TPU = ("gcloud", "compute", "tpus")


def there(project: str, zone: str) -> list[str]:
    return [f"--zone={zone}"] + [f"--project={project}"] * bool(project)


def deletion(job: str) -> list[str]:
    """The command that gives a slice back."""
    project, zone, name = job.split("/")
    return [*_TPU, "queued-resources", "delete", name, *there(project, zone), "--force", "--quiet"]


def really(command: Sequence[str], log: Path | None, in_vain: Callable[[], bool]) -> tuple[int, str]:
    """Runs a command, in a session of its own: Ctrl-C reaches the launcher alone.

    What this Python imports isn't gcloud's, which is written in it too.
    """
    without = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    with contextlib.ExitStack() as open_files:
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        out = open_files.enter_context(log.open("a")) if log else subprocess.PIPE
        process = open_files.enter_context(
            subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=without
            )
        )
        ends = signal.SIGTERM
        while True:
            try:
                printed = process.communicate(timeout=SECONDS_BETWEEN_LOOKS)[0]
                return process.returncode, printed or (log.read_text()[-2000:] if log else "")
            except subprocess.TimeoutExpired:
                if in_vain():
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, ends)  # its ssh, too
                    ends = signal.SIGKILL


def give_back(asked_for: Sequence[str], run: Run = really) -> list[str]:
    """Deletes slices, again where that fails; returns those that have gone. For `launch.stop`, too."""
    with concurrent.futures.ThreadPoolExecutor(len(asked_for)) as pool:
        problems = list(pool.map(lambda job: _problem(job, run), asked_for))
    for job, problem in zip(asked_for, problems, strict=True):
        if problem is not None:
            print(f"{job}: NOT given back, and costs money: {problem}", file=sys.stderr, flush=True)
    return [job for job, problem in zip(asked_for, problems, strict=True) if problem is None]


def _problem(job: str, run: Run) -> str | None:
    """Why a slice can't be deleted; None once it is."""
    printed = ""
    for attempt in range(DELETIONS):
        time.sleep(SECONDS_BETWEEN_LOOKS if attempt else 0)
        code, printed = run(deletion(job), None, never)
        if not code or NO_SUCH in printed:
            return None
    return gcloud.error(printed)


def main() -> int:
    experiment, values = command_line.chosen(), flags.FLAGS
    folder = engine.folder_of(experiment)
    runtime = gcloud.family_of(values.accelerator).runtime
    if not values.zone:
        raise UserError("in which zone? --zone=us-west4-a, say")
    if not values.mount and not files.in_bucket(folder):
        raise UserError(
            f"--folder={folder} is on this machine's disk, which slices don't see: name a bucket, gs://..., "
            "or bring the disk there by --mount"
        )
    names = ("zone", "project", "spot", "mount")
    kind = (values.accelerator, values.runtime or runtime)
    slices = Slices(gcloud.name_of(folder), *kind, *(getattr(values, name) for name in names))
    engine.refuse_each(slices.hosts)
    if shutil.which("git") is None:
        raise UserError("no git here, by which slices get the code: install it")
    changes = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True).stdout
    if changes:
        names = ", ".join(line[3:] for line in changes.splitlines())
        print(f"not committed, so slices don't get it: {names}")
    if not values.dry_run:
        if shutil.which(_TPU[0]) is None:
            raise UserError("no gcloud here: install Google Cloud's command line")
        launched = Tpu(folder, slices, really)
        return engine.carry_out(launched) or int(bool(launched.left()))
    engine.planned(experiment, folder)
    name, command = f"{slices.prefix}-0", engine.command_of(experiment, folder, Tpu.python)
    print(shlex.join(slices.make(name)))
    print(f"# every {SECONDS_BETWEEN_LOOKS:.0f} s until it says ACTIVE:\n{shlex.join(slices.state(name))}")
    for line in [*slices.set_up(name), slices.use(name, command)]:
        print(shlex.join(line))
    print(f"# beside it, to see whether the slice was taken back:\n{shlex.join(slices.state(name))}")
    print(shlex.join(deletion(slices.job(name))))
    return 0


if __name__ == "__main__":
    engine.define_flags("slices at once")
    flags.DEFINE_string("accelerator", "v5litepod-8", "the type of a slice")
    flags.DEFINE_string("runtime", None, "its runtime version; what Google names for JAX if not given")
    flags.DEFINE_string("zone", None, "where")
    flags.DEFINE_string("project", "", "whose; gcloud's own if not given")
    flags.DEFINE_bool("spot", False, "slices that may be taken back, for less money")
    flags.DEFINE_string("mount", "", "a command that brings the folder's disk to a slice")
    command_line.run_main(main)
