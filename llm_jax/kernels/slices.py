"""TPU slices by name, described by libtpu on any machine, so that programs are compiled for what isn't there.

A name is a generation and the shape of its chips, v5e:4x4 or v5p:4x8x8; v5p-512 of the Cloud is 256 chips.
"""

import importlib.util
import os
from typing import NamedTuple

import jax

from llm_jax.config import UserError
from llm_jax.values import nearest

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")


class Generation(NamedTuple):
    """The shapes of its slices, and what a chip sends to its neighbours over all links, in bytes/s."""

    shapes: tuple[str, ...]
    exchange: float


# By Google's pages of each generation (cloud.google.com/tpu/docs/v5e ...), Gbit/s a chip / 8.
GENERATIONS = {
    "v2": Generation(("2x2", "4x4", "4x8", "8x8", "8x16", "16x16"), 496e9 / 8),
    "v3": Generation(("2x2", "4x4", "4x8", "8x8", "8x16", "16x16", "16x32", "32x32"), 656e9 / 8),
    "v4": Generation(_CUBES, 2400e9 / 8),
    "v5e": Generation(_FLAT, 1600e9 / 8),
    "v5p": Generation(_CUBES, 4800e9 / 8),
    "v6e": Generation(_FLAT, 3584e9 / 8),
    "tpu7x": Generation(_CUBES, 9600e9 / 8),
}
NAMES = [f"{name}:{shape}" for name, found in GENERATIONS.items() for shape in found.shapes]
DATA_CENTRE = 25e9 / 8  # bytes/s a chip has between slices: 100 Gbit/s of a host, for its four chips

# libtpu asks a metadata server and looks for chips unless it is told not to.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def describe(name: str, slices: int = 1) -> list[jax.Device]:
    """The devices of `slices` slices called `name`; nothing runs on them.

    In a process that has used no device yet. Raises UserError for unknown names and without libtpu.
    """
    if name not in NAMES:
        raise UserError(f"no TPU slice {name!r}; {nearest(name, NAMES)}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu compiles for TPUs and isn't installed: pip install 'jax[tpu]>=0.10.2,<0.13'")
    from jax.experimental import topologies

    os.environ.update({key: value for key, value in _ENVIRONMENT.items() if key not in os.environ})
    jax.config.update("jax_platforms", "cpu")
    several = {"num_slices": slices} if slices > 1 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **several)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"libtpu has no slice {name!r}: {' '.join(str(error).split())[:200]}") from None
    return list(found.devices)


def exchange_bandwidth(name: str) -> float:
    """Bytes/s that a chip of such a slice sends to all its neighbours at once."""
    return GENERATIONS[name.partition(":")[0]].exchange
