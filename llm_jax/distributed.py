"""Many processes as one run: how each learns of the others, how they agree, and how they end.

Who is there says, in this order:
    plain hosts, Ray   --coordinator=HOST:PORT --processes=N --process=I, or the environment of `variables`
    Slurm              srun's variables, where its step has several tasks
    TPU slices         TPU_WORKER_HOSTNAMES and TPU_WORKER_ID (and MEGASCALE_* of several slices), as GKE sets
                       them; on Cloud TPU machines without them the metadata server
All processes run the same program. What one alone can know (files, clocks, signals) is agreed on before
anybody acts on it; process 0 writes, and all of them save.
"""

import collections
import contextlib
import ctypes
import faulthandler
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster  # nor to ask who is there without joining
from jax._src.distributed import global_state as _state  # no public way to tell other processes a text

from llm_jax.config import UserError
from llm_jax.sharding import whole
from llm_jax.values import AGAIN

SECONDS_TO_MEET, SECONDS_OF_SILENCE, SECONDS_TO_AGREE = 300, 100, 3600
TPU_PORT = 8482  # as JAX's own detection has it

VARIABLES = ("LLM_JAX_COORDINATOR", "LLM_JAX_PROCESSES", "LLM_JAX_PROCESS")
LAUNCHER = "LLM_JAX_LAUNCHER"  # the id of the process that started this one, on the same machine
SECRET = "LLM_JAX_SECRET"  # by which a launcher's hosts know each other (launch/hosts.py)
_FLAGS = ("coordinator", "processes", "process")
_agreed, _met = itertools.count(), itertools.count()
_spread: dict[str, Iterator[int]] = collections.defaultdict(itertools.count)
_others: list[socket.socket] = []  # connections to other processes
_leaving = threading.Event()  # this process ends, and knows why


class Place(NamedTuple):
    """Where a process stands: HOST:PORT of process 0, how many there are, and which it is.

    devices: the only ones of its host that it takes (None: all).
    """

    coordinator: str
    processes: int
    process: int
    devices: list[int] | None = None


# ---- who is there ----


def define_flags() -> None:
    """The flags of a command that many processes may run as one; their defaults are the environment's."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where one run has many processes")
    flags.DEFINE_integer("processes", None, "how many processes run this command as one")
    flags.DEFINE_integer("process", None, "which of them this is, from 0")


def variables(place: Place) -> dict[str, str]:
    """The environment of one process of a launcher's; Ray takes it as runtime_env={"env_vars": ...}."""
    return dict(zip(VARIABLES, map(str, place[:3]), strict=True))


def end_with_launcher() -> None:
    """The system ends this process where the one of this machine that started it is killed (on Linux)."""
    launcher = os.environ.get(LAUNCHER)
    if launcher and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(launcher):
            os._exit(AGAIN)


def address(host: str = "") -> str:
    """HOST:PORT, free now, on this machine: what a launcher asks of where process 0 will run.

    host: what others call this machine, where that is known.
    """
    if not host:
        host = "127.0.0.1"  # without a network, all are here
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it finds the interface that others reach it by
            host = probe.getsockname()[0]
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("", 0))
        return f"{host}:{probe.getsockname()[1]}"


def place(given: Mapping[str, Any], environment: Mapping[str, str]) -> Place | None:
    """What flags (`given`, by name) and environment say; None: this process is alone, or they don't know.

    Raises UserError where they say a part only, or nonsense.
    """
    pairs = zip(_FLAGS, VARIABLES, strict=True)
    said = [given[n] if given.get(n) is not None else environment.get(v) for n, v in pairs]
    if any(said):
        return _plain(*said)
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        return _slurm(environment)
    hosts = [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    if len(hosts) * slices > 1 and "TPU_WORKER_ID" in environment:
        first = environment.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]
        before = len(hosts) * int(environment.get("MEGASCALE_SLICE_ID") or 0)
        number = before + int(environment["TPU_WORKER_ID"])
        return Place(f"{first.partition(':')[0]}:{TPU_PORT}", len(hosts) * slices, number)
    return None


def _plain(coordinator: str | None, processes: Any, process: Any) -> Place:
    wanted = "--coordinator=HOST:PORT --processes=N --process=I"
    if coordinator is None or processes is None or process is None:
        raise UserError(f"one of many processes is told by all of {wanted} (or {', '.join(VARIABLES)})")
    said = f"--coordinator={coordinator} --processes={processes} --process={process}"
    if not re.fullmatch(r"--coordinator=\S+:\d+ --processes=\d+ --process=\d+", said):
        raise UserError(f"{said}: not {wanted}")
    found = Place(coordinator, int(processes), int(process))
    if found.process >= found.processes:
        raise UserError(f"--process={process} of --processes={processes}: they are counted from 0")
    return found


def _slurm(environment: Mapping[str, str]) -> Place:
    """Slurm's step: its first host, a port that follows from job and step; a GPU each for a host's tasks."""
    first, _, ranges = environment["SLURM_STEP_NODELIST"].partition(",")[0].partition("[")
    host = first + re.split("[-,\\]]", ranges)[0]
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    tasks, nodes = (int(environment.get(f"SLURM_STEP_NUM_{name}", "1")) for name in ("TASKS", "NODES"))
    bound = len(environment.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")) == 1  # by --gpus-per-task
    mine = None if tasks == nodes or bound else [int(environment["SLURM_LOCALID"])]
    port = 61_440 + (job + 61 * step) % 4_096
    return Place(f"{host}:{port}", tasks, int(environment["SLURM_PROCID"]), mine)


def here() -> Place | None:
    """Where this process stands by flags, environment and Cloud TPU's metadata server; None: it is alone.

    No device is touched. Raises UserError as `place`, and where the server doesn't say.
    """
    given = {name: flags.FLAGS[name].value for name in _FLAGS if name in flags.FLAGS}
    found = place(given, os.environ)
    if found is not None or "TPU_WORKER_HOSTNAMES" in os.environ or not tpus(os.environ):
        return found
    try:
        if not GceTpuCluster.is_env_present():
            return None
        processes = GceTpuCluster.get_process_count()
        first = GceTpuCluster.get_coordinator_address(SECONDS_TO_MEET, str(TPU_PORT))
        return Place(first, processes, GceTpuCluster.get_process_id()) if processes > 1 else None
    except OSError as error:
        raise UserError(
            "whether this machine's TPUs are a part of a slice its metadata server doesn't say "
            f"({' '.join(str(error).split())[:100]}); TPU_WORKER_HOSTNAMES=localhost says that they are all"
        ) from None


def tpus(environment: Mapping[str, str]) -> bool:
    """Whether this machine has TPU chips that JAX may take; all of them are one process's."""
    if "tpu" not in environment.get("JAX_PLATFORMS", "tpu"):
        return False
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


# ---- together ----


@contextlib.contextmanager
def together() -> Iterator[None]:
    """This process as one of those that flags and environment speak of; alone if they speak of none.

    What goes wrong in one ends all: here with a line and exit code 2 for a UserError, AGAIN where another
    process has died, 1 for anything else; elsewhere by the broken connection.
    """
    found = here()
    if found is None:
        yield
        return
    end_with_launcher()
    _join(found)
    try:
        yield
    except UserError as error:
        leave(2, f"error: {' '.join(str(error).split())}", seconds=60)  # all have it, sooner or later
    except jax.errors.JaxRuntimeError as error:
        if not re.search("[Gg]loo|[Cc]oordination|[Pp]eer|heartbeat|UNAVAILABLE|DEADLINE", str(error)):
            traceback.print_exc()
            leave(1, "an error of this process")
        reason = " ".join(str(error).split())[:160]
        leave(AGAIN, f"another process of this run has died or can't be reached ({reason})", seconds=0)
    except Exception:
        traceback.print_exc()
        leave(1, "an error of this process")
    finally:
        _leaving.set()
        for other in _others:
            with contextlib.suppress(OSError):
                other.sendall(b".")
        jax.distributed.shutdown()


def _join(found: Place) -> None:
    # SIGTERM is ours: processes agree on the step to save at by `Votes`.
    jax.config.update("jax_enable_preemption_service", False)
    waits = {"initialization_timeout": SECONDS_TO_MEET, "heartbeat_timeout_seconds": SECONDS_OF_SILENCE}
    try:
        jax.distributed.initialize(*found, cluster_detection_method="deactivate", **waits)
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        where = f"the {found.processes} processes at {found.coordinator}"
        print(f"error: {where} did not meet: {reason}", file=sys.stderr, flush=True)
        os._exit(AGAIN)
    _watch()


def _watch() -> None:
    """Ends this process with a line as soon as another's connection breaks; JAX's heartbeats take a minute.

    Process 0 has a connection to each of the others, which carries a last byte at a good end.
    """
    if _state.process_id == 0:
        server = socket.create_server(("", 0), backlog=_state.num_processes)
        host = _state.coordinator_address.rpartition(":")[0]
        _state.client.key_value_set("llm_jax/watch", f"{host}:{server.getsockname()[1]}")
        for _ in range(1, _state.num_processes):
            other = server.accept()[0]
            _listen(other, f"process {int.from_bytes(other.recv(4))}")
        return
    host, _, port = _state.client.blocking_key_value_get("llm_jax/watch", 1000 * SECONDS_TO_MEET).rpartition(
        ":"
    )
    other = socket.create_connection((host, int(port)))
    other.sendall(_state.process_id.to_bytes(4))
    _listen(other, "process 0")


def _listen(other: socket.socket, name: str) -> None:
    def listen() -> None:
        try:
            while (last := other.recv(1)) == b"?":
                faulthandler.dump_traceback()
        except OSError:
            last = b""
        if not last and not _leaving.is_set():
            leave(AGAIN, f"{name} of this run has died or can't be reached", seconds=0)

    _others.append(other)
    threading.Thread(target=listen, daemon=True).start()


def ask_where() -> None:
    """Has the processes that this one has a connection to print their stacks; one may be why it hangs."""
    for other in _others:
        with contextlib.suppress(OSError):
            other.sendall(b"?")


def leave(code: int, line: str, seconds: int = 10) -> None:
    """Ends this process: what is behind it would wait for processes that have gone.

    Others of them that leave within so many `seconds` leave together, and none is ended by another's end.
    """
    _leaving.set()
    who = f"process {_state.process_id} of {_state.num_processes}"
    print(f"{who}: {line}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # The others are ended where process 0 goes: what they have to say themselves comes first.
    with contextlib.suppress(Exception):
        seconds and _state.client.wait_at_barrier("llm_jax/leaving", 1000 * seconds)
    os._exit(code)


def number() -> int | None:
    """Which of many processes this is; None where it is alone."""
    return _state.process_id if _state.client is not None else None


def leads() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def agreed(find: Callable[[], Any]) -> Any:
    """What process 0 finds, in all processes, as plain JSON values; alone, just that.

    All call it in the same order, from one thread. What it raises is raised everywhere.
    """
    if jax.process_count() == 1:
        return find()
    client, key = _state.client, f"llm_jax/agreed/{next(_agreed)}"
    if leads():
        try:
            found = {"value": find()}
        except Exception as error:
            found = {"failed": str(error) if isinstance(error, UserError) else f"process 0 failed: {error!r}"}
            client.key_value_set(key, json.dumps(found))
            raise
        client.key_value_set(key, json.dumps(found, default=lambda x: x.item()))
    found = json.loads(client.blocking_key_value_get(key, 1000 * SECONDS_TO_AGREE))
    if "value" not in found:
        raise UserError(found["failed"])
    return found["value"]


def spread(
    what: str, find: Callable[[], Sequence[Any]], do: Callable[[Any], dict[str, Any]]
) -> dict[str, Any]:
    """What `do` makes of the parts of some work, one in each process: all of it in process 0, elsewhere {}.

    find: the parts, as many as processes, said by process 0. All call it equally often for each `what`, from
    whatever thread; parts and results are plain JSON values. What `find` raises is raised in process 0.
    """
    if jax.process_count() == 1:
        return do(find()[0])
    client, mine = _state.client, jax.process_index()
    key, wait = f"llm_jax/spread/{what}/{next(_spread[what])}", 1000 * SECONDS_TO_AGREE
    if leads():
        client.key_value_set(f"{key}/parts", json.dumps(list(find())))
    done = do(json.loads(client.blocking_key_value_get(f"{key}/parts", wait))[mine])
    if not leads():
        client.key_value_set(f"{key}/{mine}", json.dumps(done))
        return {}
    for other in range(1, jax.process_count()):
        done |= json.loads(client.blocking_key_value_get(f"{key}/{other}", wait))
    client.key_value_delete(key)
    return done


def meet() -> None:
    """Waits until all processes are here: gloo, between CPUs, waits 30 seconds only at its first exchange."""
    if jax.process_count() > 1:
        _state.client.wait_at_barrier(f"llm_jax/met/{next(_met)}", 1000 * SECONDS_TO_AGREE)


class Votes:
    """Two wishes that any process may have (to save, to stop), known to all at one step and without waiting.

    In many processes an answer is that of the call before, as it is fetched when the devices have come to it.
    """

    def __init__(self, mesh: jax.sharding.Mesh) -> None:
        self._mesh, self._asked = mesh, None
        self._place = jax.sharding.NamedSharding(mesh, jax.P(mesh.axis_names))
        self._any = jax.jit(lambda votes: votes.any(0), out_shardings=whole(mesh))
        if jax.process_count() > 1:
            votes = jax.ShapeDtypeStruct((mesh.size, 2), bool, sharding=self._place)
            self._any = self._any.lower(votes).compile()  # before all `meet`, and none waits for another's

    def of(self, saving: bool, stopping: bool) -> tuple[bool, bool]:
        """Whether any process wished each; all call it equally often."""
        if jax.process_count() == 1:
            return saving, stopping
        mine, shape = np.array([[saving, stopping]]), (self._mesh.size, 2)
        votes = jax.make_array_from_callback(shape, self._place, lambda _: mine)
        asked, self._asked = self._asked, self._any(votes)
        return (False, False) if asked is None else tuple(np.asarray(asked).tolist())
