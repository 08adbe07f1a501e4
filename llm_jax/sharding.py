"""The mesh, the one table from logical axes to mesh axes, and loading a batch onto it.

Code elsewhere names what a dimension means ("batch", "heads"); only this file knows which mesh axis that
is spread over. The same program then runs on one device and on many.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llm_jax.config import UserError

# A dimension takes the mesh axes of its row that earlier dimensions left over: activations, which spread
# their batch over `data` and `fsdp`, keep their width whole, while parameters spread it over `fsdp`.
TABLE: dict[str, tuple[str, ...]] = {
    "member": ("member",),
    "batch": ("slice", "data", "fsdp", "expert"),
    "time": ("sequence",),
    "tokens": ("slice", "data", "fsdp", "expert", "sequence"),  # of all rows together
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "vocabulary": ("tensor",),
    "layers": (),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each kind of parallelism gets; -1 takes all that the others leave.

    slice: groups of devices that only the data centre's network joins: rows are spread over them, and nothing
    but gradients passes between. member: the runs of a pack (pack.py). data: rows. fsdp: rows, and the
    parameters too. expert: rows, and experts. sequence: the tokens of each row (ring attention). tensor:
    heads, hidden layers and vocabulary. Neighbours along the last are the nearest devices.
    """

    slice: int = 1
    member: int = 1
    data: int = -1
    fsdp: int = 1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1


def all_devices() -> list[jax.Device]:
    """The devices of all processes; raises UserError where JAX_PLATFORMS names one that isn't here."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError):
        wanted = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(f"no device of JAX_PLATFORMS={wanted} here; unset it, or say cpu") from None


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over the kinds of parallelism; raises UserError if the devices don't make it up."""
    devices = all_devices() if devices is None else devices
    shape = dataclasses.asdict(config)
    if any(size == 0 or size < -1 for size in shape.values()) or list(shape.values()).count(-1) > 1:
        raise UserError(
            f"execution.mesh {_say(shape)}: sizes are positive, and at most one is -1 (what is left)"
        )
    known = math.prod(size for size in shape.values() if size > 0)
    if known > len(devices):
        raise UserError(f"execution.mesh {_say(shape)} needs {known} devices, and there are {len(devices)}")
    if -1 in shape.values() and len(devices) % known:
        raise UserError(f"execution.mesh {_say(shape)}: {known} does not divide the {len(devices)} devices")
    shape = {name: len(devices) // known if size == -1 else size for name, size in shape.items()}
    used = devices[: math.prod(shape.values())]
    if len({device.process_index for device in used}) < len({device.process_index for device in devices}):
        raise UserError(
            f"execution.mesh {_say(shape)} takes {len(used)} of {len(devices)} devices, and leaves some "
            "process without any: -1 in one place takes all"
        )
    return Mesh(_arranged(shape, used), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def slices(devices: Sequence[jax.Device]) -> int:
    """How many groups of `devices` only a slower network joins."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def _arranged(shape: Mapping[str, int], devices: list[jax.Device]) -> np.ndarray:
    """The devices in the mesh's shape, its slices theirs, those of a TPU slice by where its wires lie."""
    sizes, there = tuple(shape.values()), slices(devices)
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(sizes)
    if there != shape["slice"]:
        raise UserError(f"execution.mesh.slice={shape['slice']}, and the devices lie in {there} slices")
    if there == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    within, between = (1, *sizes[1:]), (there, *[1] * len(sizes[1:]))
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def spec(shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Any) -> PartitionSpec:
    """Where an array of `shape` with logical `axes` lies on the mesh.

    A dimension that its mesh axes don't divide stays whole on each device (257 tokens over 2, say);
    `describe` lists those.
    """
    free = dict(mesh.shape)
    out: list[Any] = []
    for size, axis in zip(shape, axes, strict=True):
        names = tuple(n for n in (TABLE[axis] if axis else ()) if free.get(n, 1) > 1)
        if names and size % math.prod(free[n] for n in names) == 0:
            for name in names:
                del free[name]
            out.append(names if len(names) > 1 else names[0])
        else:
            out.append(None)
    return PartitionSpec(*out)


def shardings(shapes: Any, axes: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of shaped leaves and the tree of their logical axes."""
    return jax.tree.map(lambda leaf, a: NamedSharding(mesh, spec(leaf.shape, a, mesh)), shapes, axes)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the partitioner what the dimensions of `x` mean; without a mesh of many devices, nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, axes, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows spread over all axes that divide the data."""
    names = tuple(n for n in TABLE["batch"] if mesh.shape.get(n, 1) > 1)
    return NamedSharding(mesh, PartitionSpec(names or None))


def ways(axis: str, mesh: Any) -> int:
    """Over how many devices of the mesh a logical axis is spread."""
    return math.prod(mesh.shape.get(name, 1) for name in TABLE[axis])


def whole(mesh: Mesh) -> NamedSharding:
    """The place of what every device has all of."""
    return NamedSharding(mesh, PartitionSpec())


def readable(mesh: Mesh) -> NamedSharding | None:
    """Where results lie that hosts read: whole on each device if processes share the mesh, else anywhere."""
    return whole(mesh) if mesh.is_multi_process else None


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """The same arrays, whole on each device of the mesh; all of its processes call it."""
    return jax.jit(_same, out_shardings=whole(mesh))(tree)


def _same(tree: Any) -> Any:
    return tree


def behind(place: NamedSharding, *axes: str | None) -> NamedSharding:
    """The place of an array that has the logical `axes` in front of those that lie at `place`."""
    over = [next((n for n in TABLE.get(axis, ()) if place.mesh.shape[n] > 1), None) for axis in axes]
    return NamedSharding(place.mesh, PartitionSpec(*over, *place.spec))


def check_batch(rows: int, micro_batches: int, mesh: Mesh) -> None:
    """Raises UserError unless `rows` divide into equal micro-batches and those over the mesh."""
    over = ways("batch", mesh)
    if rows % (micro_batches * over):
        names = " x ".join(n for n in TABLE["batch"] if mesh.shape[n] > 1) or "data"
        raise UserError(
            f"a batch of {rows} rows (data.batch_size) doesn't divide over {over} devices ({names}) and "
            f"{micro_batches} micro-batches (execution.micro_batches); a multiple of "
            f"{over * micro_batches} does"
        )


def load_rows(
    rows: Callable[..., Mapping[str, np.ndarray]], spec_: Mapping[str, jax.ShapeDtypeStruct], axes: int = 1
) -> dict[str, jax.Array]:
    """Global arrays of which this process loads only what its devices hold.

    rows: from the numbers along each of the leading `axes` to arrays with these leading axes.
    spec_: name -> shape, type and sharding.
    """
    place = next(iter(spec_.values()))
    if place.sharding.mesh.size == 1:
        return jax.device_put(dict(rows(*map(np.arange, place.shape[:axes]))), place.sharding)
    loaded: dict[tuple[tuple[int, int], ...], Mapping[str, np.ndarray]] = {}

    def shard(name: str, index: tuple[slice, ...]) -> np.ndarray:
        ends = tuple(i.indices(n)[:2] for i, n in zip(index[:axes], spec_[name].shape, strict=False))
        if ends not in loaded:
            loaded[ends] = rows(*(np.arange(start, stop) for start, stop in ends))
        return loaded[ends][name]

    return {
        name: jax.make_array_from_callback(s.shape, s.sharding, lambda index, n=name: shard(n, index))
        for name, s in spec_.items()
    }


def describe(shapes: Any, axes: Any, mesh: Mesh) -> list[str]:
    """A line for each leaf that stays whole although a mesh axis is meant for it."""
    lines = []
    flat, _ = jax.tree_util.tree_flatten_with_path(shapes)
    for (path, leaf), leaf_axes in zip(flat, jax.tree.leaves(axes, is_leaf=_is_axes), strict=True):
        placed = spec(leaf.shape, leaf_axes, mesh)
        for size, axis, place in zip(leaf.shape, leaf_axes, placed, strict=True):
            meant = [n for n in (TABLE[axis] if axis else ()) if mesh.shape[n] > 1]
            if meant and place is None:
                lines.append(
                    f"{jax.tree_util.keystr(path)}: {axis} ({size}) stays whole on {'/'.join(meant)}"
                )
    return lines


def _is_axes(leaf: Any) -> bool:
    return isinstance(leaf, tuple) and all(a is None or isinstance(a, str) for a in leaf)


def _say(shape: Mapping[str, int]) -> str:
    return " x ".join(f"{name}={size}" for name, size in shape.items() if size != 1)
