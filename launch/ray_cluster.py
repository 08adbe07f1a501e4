"""Runs an experiment on a Ray cluster.

    ray start --head
    python -m launch.ray_cluster --config=experiments/isoflop.py --workers=2 --resources=CPU=1
    ray job submit -- python -m launch.ray_cluster --config=... --workers=8 --resources=TPU-v5litepod-8-head=1

Each worker is a task that asks for --resources: cores, GPUs, or whatever the cluster's nodes have by name;
the head resource of a TPU slice, of one host, stands for the slice as a unit. A task whose node dies is asked
for again, and what it trained goes on elsewhere. Folder and code are on a disk that all nodes see.
"""

import ctypes
import functools
import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags

from launch import engine
from launch.tpu import refuse_many_hosts
from llm_jax import config
from llm_jax.config import UserError

SECONDS_TO_STOP = 150.0


def work(command: Sequence[str], folder: str, path: str) -> str:
    """The task: runs `command` until it ends, and returns the last that it printed.

    It doesn't outlive the task: whoever cancels that, or kills it with its node, ends the command too.
    """
    prctl, parent_dies = ctypes.CDLL(None).prctl, 1

    with subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=lambda: prctl(parent_dies, signal.SIGTERM),
    ) as process:
        try:
            lines = process.stdout.readlines()
        except BaseException:
            process.terminate()
            process.communicate(timeout=SECONDS_TO_STOP)
            raise
    return "".join(lines[-20:])


class Ray:
    """The engine, on the cluster that RAY_ADDRESS names, or this machine's."""

    name, python = "ray_cluster", sys.executable

    def __init__(self, resources: str = "CPU=1", address: str = "auto") -> None:
        self._resources, self._address, self._tasks = asked(resources), address, {}

    @functools.cached_property
    def _ray(self) -> types.ModuleType:
        """Ray, joined to the cluster; raises UserError where there is none."""
        try:
            import ray
        except ImportError:
            raise UserError("Ray isn't installed: pip install -e '.[ray]'") from None
        terminate = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=self._address, log_to_driver=False, logging_level="ERROR")
        except ConnectionError:
            raise UserError("no Ray cluster here: ray start --head, or name one by RAY_ADDRESS") from None
        signal.signal(signal.SIGTERM, terminate)  # not Ray's, which just exits
        return ray

    def start(self, command: Sequence[str]) -> str:
        # Whether to ask again is the crew's to say, for all engines alike.
        place = self._ray.remote(**self._resources, max_retries=0)(work)
        task = place.remote(list(command), os.getcwd(), os.environ.get("PYTHONPATH", os.getcwd()))
        self._tasks[task.hex()] = task
        return task.hex()

    def living(self, jobs: Iterable[str]) -> set[str]:
        tasks = [self._tasks[job] for job in jobs]
        waiting = self._ray.wait(tasks, num_returns=len(tasks), timeout=0)[1] if tasks else []
        return {task.hex() for task in waiting}

    def stop(self, jobs: Iterable[str]) -> None:
        tasks = [self._tasks[job] for job in jobs]
        for task in tasks:
            self._ray.cancel(task)  # as by Ctrl-C
        if tasks:
            self._ray.wait(tasks, num_returns=len(tasks), timeout=SECONDS_TO_STOP)

    def tail(self, job: str) -> str:
        try:
            return self._ray.get(self._tasks[job], timeout=1)
        except self._ray.exceptions.RayError as error:
            return str(error)


def asked(resources: str) -> dict[str, Any]:
    """CPU=2,TPU=4 as the options of a Ray task; raises UserError for what can't be read, or asks for the head
    of a slice of several hosts.
    """
    options: dict[str, Any] = {"num_cpus": 0, "resources": {}}
    for part in filter(None, resources.split(",")):
        name, _, count = part.partition("=")
        try:
            number = float(count)
        except ValueError:
            raise UserError(f"--resources={resources}: NAME=NUMBER, such as CPU=2,TPU=4") from None
        if head := re.fullmatch("TPU-(.+)-head", name):
            refuse_many_hosts(f"--resources={resources}", head[1])
        if name in ("CPU", "GPU"):
            options[f"num_{name.lower()}s"] = number
        else:
            options["resources"][name] = number
    return options


def give_back(jobs: Sequence[str]) -> list[str]:
    """For `launch.stop`: tasks belong to their launcher, which sees the file that says stop."""
    return list(jobs)


if __name__ == "__main__":
    engine.define_flags("tasks at once")
    flags.DEFINE_string("resources", "CPU=1", "what each asks for, such as CPU=4,GPU=1")
    config.run_main(lambda: engine.carry_out(Ray(flags.FLAGS.resources)))
