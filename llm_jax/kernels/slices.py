"""TPU slices by name, described by libtpu on any machine, so that programs are compiled for what isn't there.

A name is a generation and the shape of its chips, v5e:4x4 or v5p:4x8x8; v5p-512 of the Cloud is 256 chips.
"""

import importlib.util
import os
from typing import Any, NamedTuple

import jax

from llm_jax.config import UserError

_SQUARE = ("2x2", "4x4", "4x8", "8x8", "8x16")
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")


class Generation(NamedTuple):
    """The shapes of its slices; what one of JAX's devices receives, in bytes/s, while it sends as much.

    A device is a chip, or one of its two cores, as in `devices.py`. links: from its neighbours, over all of
    them. network: from other slices, over the data centre's network. host: the most chips that one has; where
    a slice has several hosts, each has four.
    """

    shapes: tuple[str, ...]
    links: float
    network: float
    host: int = 4


# By Google's pages of each generation (cloud.google.com/tpu/docs/v5e ...), which count both directions from
# v5e on; before, links of a chip x bytes/s of one: Jouppi et al. 2020 (v2, v3), 2023 (v4, arXiv:2304.01433).
# 25 Gbit/s of network are a quarter of a host's 100.
GENERATIONS = {
    "v2": Generation((*_SQUARE, "16x16"), 4 * 62e9 / 2, 25e9 / 8 / 2),
    "v3": Generation((*_SQUARE, "16x16", "16x32", "32x32"), 4 * 82e9 / 2, 25e9 / 8 / 2),
    "v4": Generation(_CUBES, 6 * 50e9, 25e9 / 8),
    "v5e": Generation(_FLAT, 400e9 / 2, 25e9 / 8, host=8),
    "v5p": Generation(_CUBES, 1200e9 / 2, 50e9 / 8),
    "v6e": Generation(_FLAT, 800e9 / 2, 100e9 / 8, host=8),
    "tpu7x": Generation(_CUBES, 1200e9 / 2 / 2, 100e9 / 8 / 2),
}
NAMES = [f"{name}:{shape}" for name, found in GENERATIONS.items() for shape in found.shapes]

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
        kind = name.partition(":")[0]
        known = f"of {kind} there are {', '.join(GENERATIONS[kind].shapes)}" if kind in GENERATIONS else ""
        kinds = f"a generation and the shape of its chips, such as v5e:4x4, of {', '.join(GENERATIONS)}"
        raise UserError(f"no TPU slice {name!r}; {known or kinds}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu compiles for TPUs and isn't installed: pip install 'jax[tpu]>=0.10.2,<0.13'")
    from jax.experimental import topologies

    os.environ.update({key: value for key, value in _ENVIRONMENT.items() if key not in os.environ})
    jax.config.update("jax_platforms", "cpu")
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # as the Cloud has them: a chip is one device
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"libtpu has no slice {name!r}: {' '.join(str(error).split())[:200]}") from None
    return list(found.devices)


def generation(name: str) -> Generation:
    """The generation of the slices of that name."""
    return GENERATIONS[name.partition(":")[0]]
