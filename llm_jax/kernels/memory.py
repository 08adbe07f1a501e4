"""Memory: whether a state fits, and that of the host, where a CPU loses a third of a small model's step."""

import ctypes
import math
import os
from pathlib import Path
from typing import Any

import jax

from llm_jax.kernels import devices
from llm_jax.values import UserError

# Of glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8


def keep_freed_memory() -> bool:
    """Makes malloc keep what is freed, in one pool, for this process; True if it could.

    XLA allocates its temporary buffers anew in each step. glibc gives blocks of megabytes back to the system
    when they are freed, and the system hands pages out by a fault for each 4 kB, zeroed: 20,000 to 126,000
    faults a step on the shapes of experiments/throughput.py, 30 to 40 % of the processor's time. The price is
    that the process stays as large as it ever was. Call it before the first computation: a thread keeps the
    pool it began with. Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    never = 2**31 - 1
    return bool(
        mallopt(M_ARENA_MAX, 1) and mallopt(M_MMAP_THRESHOLD, 2**30) and mallopt(M_TRIM_THRESHOLD, never)
    )


def check(trained: Any, state: Any, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError where a device has no room for the state and a gradient of what is `trained`.

    Both are trees of ShapeDtypeStructs that say where they lie. Activations come on top, and decide much less
    for a model that is far too large.
    """
    parameters, whole = bytes_of_a_device(trained), bytes_of_a_device(state)
    device, sharing = one_of(mesh), 1
    there, where = of_device(device), f"a {device.device_kind}"
    if device.platform == "cpu":  # all of its devices are one machine
        there, where, sharing = of_host(), "this machine", len(mesh.local_devices)
    needed = (whole + parameters) * sharing
    if there is not None and needed > there:
        parts = parameters, parameters, whole - parameters
        sizes = "{:,.1f} GB of parameters, {:,.1f} of gradient, {:,.1f} of optimizer state".format(
            *(part * sharing / 1e9 for part in parts)
        )
        raise UserError(
            f"the model needs {needed / 1e9:,.1f} GB ({sizes}), and {where} has {there / 1e9:,.1f} GB: lower "
            "--config.model.width or --config.model.layers, or spread it over more devices by "
            "--config.execution.mesh.fsdp"
        )


def bytes_of_a_device(tree: Any) -> int:
    """What one device holds of a tree of ShapeDtypeStructs with their shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def room(mesh: jax.sharding.Mesh) -> float | None:
    """Bytes that a program may take of each device of the mesh; None if unknown."""
    device = one_of(mesh)
    if device.platform != "cpu":
        return of_device(device)
    there = of_host()
    return there and there / len(mesh.local_devices)


def one_of(mesh: jax.sharding.Mesh) -> jax.Device:
    """A device of the mesh: this process's own, if it has any."""
    return next(iter(mesh.local_devices), mesh.devices.flat[0])


def of_device(device: jax.Device) -> float | None:
    """Bytes that JAX may take of an accelerator's memory, or by its data sheet; None if neither is known."""
    row = devices.find(device)
    try:
        limit = (device.memory_stats() or {}).get("bytes_limit")
    except (jax.errors.JaxRuntimeError, NotImplementedError):  # it is described only, and not here
        limit = None
    return limit or (row and row.memory_bytes)


def of_host() -> int | None:
    """Bytes of this machine's memory, or of the part that its control group may take; None if unknown."""
    sizes = []
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        limit = Path("/sys/fs/cgroup", name)
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            sizes.append(int(text))
    return min(sizes, default=None)
