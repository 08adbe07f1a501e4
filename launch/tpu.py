"""Runs an experiment on Cloud TPUs: slices are asked for as queued resources, set up, used and deleted.

    python -m launch.tpu --config=experiments/isoflop.py --workers=4 --accelerator=v5litepod-8 --spot \\
        --runtime=v2-alpha-tpuv5-lite --zone=us-west4-a --folder=/mnt/runs/isoflop --mount="sudo mount ..."
    python -m launch.tpu ... --dry_run            # prints every command, and does nothing

A slice of one host is one worker. One that is taken back (--spot), or breaks, is deleted and asked for again,
and what it trained goes on from its checkpoints. The code is that of the last commit. The folder is on a disk
that all slices and this machine see: --mount is the command that brings it to a slice.
"""

import contextlib
import re
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from absl import flags

from launch import engine
from llm_jax import config
from llm_jax.config import UserError

SECONDS_BETWEEN_LOOKS = 20.0  # at a slice that is waited for
ENDED = ("FAILED", "SUSPENDED", "SUSPENDING", "DELETING")
SET_UP = (
    "mkdir -p llm_jax && tar -xzf llm_jax.tar.gz -C llm_jax && cd llm_jax && "
    "python3 -m venv .venv && .venv/bin/pip install --quiet '.[tpu]'"
)

# Runs a command to its end, its output in a file if one is named; returns (exit code, what it printed).
Run = Callable[[Sequence[str], Path | None], tuple[int, str]]


class Tpu:
    """The engine. Each slice has a thread, which makes it, waits for it, sets it up, uses and deletes it."""

    name, python = "tpu", ".venv/bin/python"

    def __init__(self, folder: Path, slices: "Slices", run: Run) -> None:
        self._folder, self._slices, self._run = folder, slices, run
        self._threads: dict[str, threading.Thread] = {}
        self._stopping = threading.Event()
        self._said: dict[str, str] = {}

    def start(self, command: Sequence[str]) -> str:
        slice_name = f"{self._slices.prefix}-{int(time.time()):x}-{len(self._threads)}"
        job = self._slices.job(slice_name)
        self._threads[job] = threading.Thread(target=self._live, args=(slice_name, job, command), daemon=True)
        self._threads[job].start()
        return job

    def living(self, jobs: Iterable[str]) -> set[str]:
        return {job for job in jobs if self._threads[job].is_alive()}

    def stop(self, jobs: Iterable[str]) -> None:
        """What runs there sees the file that says stop; slices are deleted when it has ended."""
        self._stopping.set()
        for job in jobs:
            self._threads[job].join()
        self._stopping.clear()

    def tail(self, job: str) -> str:
        return self._said.get(job, "")

    def _live(self, slice_name: str, job: str, command: Sequence[str]) -> None:
        def do(line: Sequence[str], log: Path | None = None) -> str:
            code, printed = self._run(line, log)
            if code:
                self._said[job] = f"{shlex.join(line)}\n{printed}"
                raise subprocess.SubprocessError
            return printed

        try:
            do(self._slices.make(slice_name))
            while (state := do(self._slices.state(slice_name)).strip()) != "ACTIVE":
                if state in ENDED or self._stopping.wait(SECONDS_BETWEEN_LOOKS):
                    return
            for line in self._slices.set_up(slice_name):
                do(line)
            do(self._slices.use(slice_name, command), self._folder / "tpu" / f"{slice_name}.txt")
        except subprocess.SubprocessError:
            pass  # `tail` says what; the crew asks for another slice
        finally:
            with contextlib.suppress(subprocess.SubprocessError):
                do(deletion(job))


class Slices:
    """The commands of gcloud for slices of one kind."""

    def __init__(
        self, prefix: str, accelerator: str, runtime: str, zone: str, project: str, spot: bool, mount: str
    ):
        refuse_many_hosts(f"--accelerator={accelerator}", accelerator)
        self.prefix, self._mount = re.sub("[^a-z0-9-]", "-", prefix.lower()), mount
        self._project, self._zone, self._there = project, zone, there(project, zone)
        self._kind = [f"--accelerator-type={accelerator}", f"--runtime-version={runtime}"] + ["--spot"] * spot
        self._code = str(Path(tempfile.gettempdir()) / f"{self.prefix}.tar.gz")

    def job(self, name: str) -> str:
        """All that is needed to delete it."""
        return "/".join((self._project, self._zone, name))

    def make(self, name: str) -> list[str]:
        return self._queued("create", name, f"--node-id={name}", *self._kind, "--async")

    def state(self, name: str) -> list[str]:
        return self._queued("describe", name, "--format=value(state.state)")

    def set_up(self, name: str) -> list[list[str]]:
        pack = ["git", "archive", "--format=tar.gz", f"--output={self._code}", "HEAD"]
        copy = [*_TPU, "tpu-vm", "scp", self._code, f"{name}:llm_jax.tar.gz", "--worker=all", *self._there]
        mount = [self.on(name, self._mount)] if self._mount else []
        return [pack, copy, self.on(name, SET_UP), *mount]

    def use(self, name: str, command: Sequence[str]) -> list[str]:
        return self.on(name, f"cd llm_jax && exec {shlex.join(command)}")

    def on(self, name: str, command: str) -> list[str]:
        return [*_TPU, "tpu-vm", "ssh", name, "--worker=all", f"--command={command}", *self._there]

    def _queued(self, verb: str, name: str, *options: str) -> list[str]:
        return [*_TPU, "queued-resources", verb, name, *self._there, *options]


_TPU = ("gcloud", "compute", "tpus")


def there(project: str, zone: str) -> list[str]:
    return [f"--zone={zone}"] + [f"--project={project}"] * bool(project)


def deletion(job: str) -> list[str]:
    """The command that gives a slice back."""
    project, zone, name = job.split("/")
    return [*_TPU, "queued-resources", "delete", name, *there(project, zone), "--force", "--quiet", "--async"]


def refuse_many_hosts(flag: str, accelerator: str) -> None:
    """Raises UserError for a slice of more than one host, whose hosts a worker would have to span."""
    number = re.search(r"-(\d+)$", accelerator)
    if number is None:
        raise UserError(f"{flag}: a type and a size, such as v5litepod-8 or v4-8")
    if int(number[1]) > 8:  # chips of v5e and v6e, cores of all others
        raise UserError(
            f"{flag}: {accelerator} is of several hosts, and a worker is of one: "
            "ask for slices of one host, such as v5litepod-8"
        )


def really(command: Sequence[str], log: Path | None) -> tuple[int, str]:
    """Runs a command."""
    with contextlib.ExitStack() as open_files:
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        out = open_files.enter_context(log.open("a")) if log else subprocess.PIPE
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout or (log.read_text()[-2000:] if log else "")


def print_only(command: Sequence[str], log: Path | None) -> tuple[int, str]:
    """Prints a command; slices are there at once."""
    print(shlex.join(command), flush=True)
    return 0, "ACTIVE"


def give_back(jobs: Iterable[str]) -> None:
    """For `launch.stop`: slices cost money also where their launcher is gone."""
    for job in jobs:
        code, printed = really(deletion(job), None)
        print(printed if code else f"{job.rpartition('/')[2]} is given back", flush=True)


def main() -> int:
    experiment, values = config.chosen(), flags.FLAGS
    folder = engine.folder_of(experiment)
    names = ("accelerator", "runtime", "zone", "project", "spot", "mount")
    slices = Slices(folder.name, *(getattr(values, name) for name in names))
    if not values.dry_run:
        return engine.carry_out(Tpu(folder, slices, really))
    engine.planned(experiment, folder)
    tpu = Tpu(folder, slices, print_only)
    tpu.stop([tpu.start(engine.command_of(experiment, folder, tpu.python))])
    return 0


if __name__ == "__main__":
    engine.define_flags("slices at once")
    flags.DEFINE_string("accelerator", "v5litepod-8", "the type of a slice, of one host")
    flags.DEFINE_string("runtime", "v2-alpha-tpuv5-lite", "its runtime version")
    flags.DEFINE_string("zone", None, "where", required=True)
    flags.DEFINE_string("project", "", "whose; gcloud's own if not given")
    flags.DEFINE_bool("spot", False, "slices that may be taken back, for less money")
    flags.DEFINE_string("mount", "", "a command that brings the folder's disk to a slice")
    config.run_main(main)
