"""Runs an experiment on a Ray cluster.

    ray start --head
    python -m launch.ray_cluster --config=experiments/isoflop.py --workers=2 --resources=CPU=1
    ray job submit -- python -m launch.ray_cluster --config=... --workers=8 --resources=TPU-v5litepod-8-head=1

Each worker is a task that asks for --resources: cores, which it then keeps to, GPUs, or whatever the
cluster's nodes have by name. With --hosts=4 it is four such tasks, each on another node, which train one run
at a time together; the head resource of a TPU slice stands for all its hosts. A task whose node dies is asked
for again, and what it trained goes on elsewhere. Folder and code are on a disk that all nodes see.
"""

import contextlib
import ctypes
import fcntl
import functools
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags

from launch import engine
from launch.gcloud import hosts_of
from llm_jax import command_line
from llm_jax.config import UserError
from llm_jax.distributed import VARIABLES, Place, address, variables

SECONDS_TO_STOP, SECONDS_TO_CONNECT = 150.0, 5.0


def work(
    command: Sequence[str],
    folder: str,
    path: str,
    cores: int = 0,
    known: Iterable[tuple[str, str]] = (),
    coordinator: str = "",
) -> str:
    """The task: runs `command` until it ends, and returns the last that it printed.

    It doesn't outlive the task: whoever cancels that, or kills it with its node, ends the command too. cores:
    how many it keeps to; 0: any. known, coordinator: of its place, where it is of several hosts.
    """
    prctl, parent_dies = ctypes.CDLL(None).prctl, 1
    environment = os.environ | {"PYTHONPATH": path} | dict(known)
    if coordinator:
        environment[VARIABLES[0]] = coordinator

    with contextlib.ExitStack() as open_files:
        mine = own_cores(cores, open_files)

        def begin() -> None:
            prctl(parent_dies, signal.SIGTERM)
            os.sched_setaffinity(0, mine)

        process = open_files.enter_context(
            subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                preexec_fn=begin,
            )
        )
        try:
            lines = process.stdout.readlines()
        except BaseException:
            process.terminate()
            process.communicate(timeout=SECONDS_TO_STOP)
            raise
    return "".join(lines[-20:])


def own_cores(count: int, open_files: contextlib.ExitStack) -> set[int]:
    """So many cores that no other task of this machine has while `open_files` are; any if there aren't.

    Ray counts cores, and says to nobody which.
    """
    everything, mine = os.sched_getaffinity(0), set()
    locks = pathlib.Path(tempfile.gettempdir()) / f"llm_jax-cores-{os.getuid()}"
    locks.mkdir(exist_ok=True)
    for core in sorted(everything):
        if len(mine) < count:
            lock = open_files.enter_context((locks / str(core)).open("w"))
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine.add(core)
    return mine if count and len(mine) == count else everything


def check_reachable(address: str) -> None:
    """Raises UserError where nobody is at HOST:PORT: Ray itself would wait for minutes."""
    if found := re.fullmatch(r"([^/]+):(\d+)", address):
        try:
            socket.create_connection((found[1], int(found[2])), timeout=SECONDS_TO_CONNECT).close()
        except OSError as error:
            raise UserError(
                f"no Ray cluster answers at {address} ({error.strerror or error}): ray stop and ray start "
                "--head, or name another one by RAY_ADDRESS"
            ) from None


def free_address() -> str:
    """HOST:PORT of this node, as Ray knows it, for the tasks of one place to meet at."""
    import ray

    return address(ray.util.get_node_ip_address())


def work_together(hosts: int, *what: Any) -> list[str]:
    """The task on the head of a TPU slice: `work` on each of its hosts, which know of each other by it."""
    import ray

    resources = {ray.util.tpu.get_current_pod_name(): 1, "TPU": ray.util.tpu.get_num_tpu_chips_on_node()}
    host = ray.remote(num_cpus=0, resources=resources, max_retries=0)(work)
    return ray.get([host.remote(*what) for _ in range(hosts)])


class Ray:
    """The engine, on the cluster that RAY_ADDRESS names, or this machine's; `hosts` nodes make a place."""

    name, python = "ray_cluster", sys.executable

    def __init__(self, resources: str = "CPU=1", address: str = "auto", hosts: int = 1) -> None:
        self._text = resources
        self._resources, self._slice = asked(resources)
        self._address, self._hosts = address, hosts
        self._tasks: dict[str, list[Any]] = {}  # of each place
        self._groups: dict[str, Any] = {}
        if hosts > 1 and self._slice > 1:
            raise UserError(f"--hosts={hosts}: --resources={resources} stands for a slice's {self._slice}")

    @property
    def hosts(self) -> int:
        """Of each place."""
        return max(self._hosts, self._slice)

    @functools.cached_property
    def _ray(self) -> types.ModuleType:
        """Ray, joined to the cluster; raises UserError where there is none."""
        try:
            import ray
        except ImportError:
            raise UserError("Ray isn't installed: pip install -e '.[ray]'") from None
        from ray._private.utils import read_ray_address  # no public way to ask without joining

        named = self._address if self._address != "auto" else os.environ.get("RAY_ADDRESS", "auto")
        check_reachable(named if named != "auto" else read_ray_address() or "")
        terminate = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=self._address, log_to_driver=False, logging_level="ERROR")
        except ConnectionError:
            raise UserError("no Ray cluster here: ray start --head, or name one by RAY_ADDRESS") from None
        signal.signal(signal.SIGTERM, terminate)  # not Ray's, which just exits
        return ray

    def join(self) -> None:
        """Raises UserError where there is no cluster; else the first that needs it does."""
        assert self._ray

    def start(self, command: Sequence[str]) -> str:
        # Whether to ask again is the crew's to say, for all engines alike.
        what = [list(command), os.getcwd(), os.environ.get("PYTHONPATH", os.getcwd())]
        place = functools.partial(self._ray.remote, **self._resources, max_retries=0)
        group = None
        if self._slice > 1:
            tasks = [place()(work_together).remote(self._slice, *what)]
        elif self._hosts > 1:
            group, tasks = self._spread(place()(work), what)
        else:
            tasks = [place()(work).remote(*what, self._cores)]
        job = tasks[0].hex()
        self._tasks[job], self._groups[job] = tasks, group
        return job

    def _spread(self, place: Any, what: Sequence[Any]) -> tuple[Any, list[Any]]:
        """A task on each of several nodes, which are told of each other when all are there."""
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as On

        group = placement_group([self._bundle] * self._hosts, strategy="STRICT_SPREAD")
        first = self._ray.remote(num_cpus=0, max_retries=0)(free_address)
        meeting = first.options(scheduling_strategy=On(group, 0)).remote()
        tasks = []
        for number in range(self._hosts):
            known = tuple(variables(Place("", self._hosts, number)).items())
            there = place.options(scheduling_strategy=On(group, number))
            tasks.append(there.remote(*what, self._cores, known, meeting))
        return group, tasks

    @property
    def _bundle(self) -> dict[str, float]:
        """What a task asks for, as nodes name it."""
        names = {"num_cpus": "CPU", "num_gpus": "GPU"}
        known = {names[name]: count for name, count in self._resources.items() if name in names}
        return {name: n for name, n in (known | self._resources["resources"]).items() if n}

    @property
    def _cores(self) -> int:
        return int(self._resources["num_cpus"])

    def living(self, jobs: Iterable[str]) -> set[str]:
        living = {job for job in jobs if self._unfinished(self._tasks[job])}
        for job in set(jobs) - living:
            if (group := self._groups.pop(job, None)) is not None:
                self._ray.util.remove_placement_group(group)
        return living

    def stop(self, jobs: Iterable[str]) -> None:
        tasks = [task for job in jobs for task in self._tasks[job]]
        for task in tasks:
            self._ray.cancel(task)  # as by Ctrl-C
        self._unfinished(tasks, SECONDS_TO_STOP)

    def _unfinished(self, tasks: Sequence[Any], seconds: float = 0.0) -> list[Any]:
        return self._ray.wait(tasks, num_returns=len(tasks), timeout=seconds)[1] if tasks else []

    def lost(self, job: str) -> bool:
        """Whether its node has gone."""
        try:
            self._ray.get(self._tasks[job], timeout=1)
        except (self._ray.exceptions.NodeDiedError, self._ray.exceptions.LocalRayletDiedError):
            return True
        except self._ray.exceptions.RayError:
            pass
        return False

    def tail(self, job: str) -> str:
        try:
            return "".join(map(str, self._ray.get(self._tasks[job], timeout=1)))
        except self._ray.exceptions.RayError as error:
            return str(error)

    def waits(self) -> str:
        """What too few nodes have, while they have no more: Ray itself waits for it in silence."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        fit = sum(all(node.get(name, 0) >= n for name, n in self._bundle.items()) for node in nodes)
        return f"Ray: {fit} of {self._hosts} nodes have {self._text}" if fit < self._hosts else ""


def asked(resources: str) -> tuple[dict[str, Any], int]:
    """CPU=2,TPU=4 as the options of a Ray task, and of how many hosts the slice is whose head it asks for.

    Raises UserError for what can't be read.
    """
    hosts = 1
    options: dict[str, Any] = {"num_cpus": 0, "resources": {}}
    for part in filter(None, resources.split(",")):
        name, _, count = part.partition("=")
        try:
            number = float(count)
        except ValueError:
            number = -1.0
        if not number >= 0:
            raise UserError(f"--resources={resources}: NAME=NUMBER, such as CPU=2,TPU=4")
        if head := re.fullmatch("TPU-(.+)-head", name):
            hosts = hosts_of(f"--resources={resources}", head[1])
        if name in ("CPU", "GPU"):
            options[f"num_{name.lower()}s"] = number
        else:
            options["resources"][name] = number
    return options, hosts


def give_back(jobs: Sequence[str]) -> list[str]:
    """For `launch.stop`: tasks belong to their launcher, which sees the file that says stop."""
    return list(jobs)


def main() -> int:
    cluster = Ray(flags.FLAGS.resources, hosts=flags.FLAGS.hosts)
    engine.refuse_each(cluster.hosts)
    if not flags.FLAGS.dry_run:
        cluster.join()
    code = engine.carry_out(cluster)
    if flags.FLAGS.dry_run:
        on = f" on each of {cluster.hosts} nodes" if cluster.hosts > 1 else ""
        print(f"each asks Ray for {flags.FLAGS.resources}{on}")
    return code


if __name__ == "__main__":
    engine.define_flags("tasks at once")
    flags.DEFINE_string("resources", "CPU=1", "what each asks for, such as CPU=4,GPU=1")
    flags.DEFINE_integer("hosts", 1, "nodes of each, which train one run together", lower_bound=1)
    command_line.run_main(main)
