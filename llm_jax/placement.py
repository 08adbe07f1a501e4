"""Where a run lies: a mesh where none was asked for, what divides over one, what each device holds.

A mesh is execution alone: it is no part of a run's identity.
"""

import collections
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import sharding
from llm_jax.config import UserError
from llm_jax.kernels import memory
from llm_jax.losses import total
from llm_jax.program import KEY, Program, Shape, shape_of
from llm_jax.run import Run
from llm_jax.sharding import MeshConfig
from llm_jax.step import make_init

# Of a device's memory, what the state and a gradient may take; activations get the rest.
STATE_SHARE = 0.5


def mesh_of(run: Run, width: int, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of `width` runs like this one, on the devices of all processes if no others are given.

    Raises UserError where the devices don't make up what was asked for, or the run doesn't divide over them.
    Where nothing was asked for, members are spread before rows are, as they need nothing of each other. A run
    alone has no members to spread.
    """
    asked, devices = run.execution.mesh, devices or sharding.all_devices()
    if width == 1:
        asked = dataclasses.replace(asked, member=1)
        if asked == MeshConfig():
            asked = suggested(run, devices)
    elif asked == MeshConfig():
        there = sharding.slices(devices)
        asked = MeshConfig(slice=there, member=math.gcd(width, len(devices) // there))
    mesh = sharding.make_mesh(asked, devices)
    ways = mesh.shape["member"]
    if width % ways:
        raise UserError(
            f"{width} members don't divide over execution.mesh.member={ways} devices; "
            f"a multiple of {ways} does"
        )
    check(run, mesh)
    return mesh


def check(run: Run, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError where rows, tokens, heads or experts don't divide over the mesh."""
    sharding.check_batch(run.data.batch_size, run.execution.micro_batches, mesh)
    model, sizes = run.resolved_model.merged, mesh.shape
    heads, experts = getattr(model, "heads", None), getattr(model, "experts", None)
    if heads is not None and heads % sizes["tensor"]:
        raise UserError(f"model.heads={heads} doesn't divide over execution.mesh.tensor={sizes['tensor']}")
    if sizes["expert"] > 1 and (experts is None or experts.count % sizes["expert"]):
        there = "none" if experts is None else experts.count
        raise UserError(
            f"execution.mesh.expert={sizes['expert']} shares out experts, and the model has {there}"
        )
    if sizes["sequence"] > 1 and (reason := why_no_ring(run, sizes["sequence"])):
        raise UserError(f"execution.mesh.sequence={sizes['sequence']}: {reason}")


def why_no_ring(run: Run, ways: int) -> str | None:
    """Why the run's sequences can't be spread over so many devices; None if they can."""
    model, length = run.resolved_model.merged, getattr(run.data, "sequence_length", None)
    if not hasattr(model, "windows") or length is None:
        return f"only sequences of decoders are spread, not those of model.kind={model.kind}"
    if model.dropout:
        return "model.dropout draws by place, and tokens change theirs; set --config.model.dropout=0"
    if length % (2 * ways):
        return (
            f"data.sequence_length={length} doesn't divide into its {2 * ways} chunks, two a device; "
            f"a multiple of {2 * ways} does"
        )
    return None


def suggested(run: Run, devices: list[jax.Device]) -> MeshConfig:
    """The mesh for one run where none was asked for: all devices, parameters spread only as far as need be.

    Rows are spread first; where they run out, sequences are.
    """
    there = sharding.slices(devices)
    found = MeshConfig(slice=there)
    if len(devices) == 1:
        return found
    shape = shape_of(run, run.data)
    count, rows = len(devices) // there, run.data.batch_size // run.execution.micro_batches
    heads = getattr(run.resolved_model.merged, "heads", 1)
    for ways in (n for n in range(1, count + 1) if count % n == 0):  # devices that share the parameters
        fsdp = math.gcd(ways, rows // there)
        data = math.gcd(count // ways, rows // (there * fsdp))
        sequence, tensor = count // (ways * data), ways // fsdp
        if heads % tensor or rows % there or (sequence > 1 and why_no_ring(run, sequence)):
            continue
        found = MeshConfig(slice=there, data=data, fsdp=fsdp, sequence=sequence, tensor=tensor)
        room = memory.room(sharding.make_mesh(found, devices))
        if room is None or whole_bytes(shape) / ways <= STATE_SHARE * room:
            break
    return found


# ---- what a device holds ----


@functools.lru_cache(maxsize=16)
def whole_bytes(shape: Shape) -> int:
    """Of the state and a gradient of one run."""
    model = shape.model.build(shape.layout)
    roles = model.roles(jax.eval_shape(model.init, KEY))
    state = jax.eval_shape(make_init(model, shape.optimizer, roles), KEY)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state, state.trained)))


def state_bytes(program: Program) -> dict[str, int]:
    """Bytes of each device by what they hold: of one run, or of its part of a pack."""
    state = program.state
    trained, frozen = (memory.bytes_of_a_device(x) for x in (state.trained, state.frozen))
    return {
        "parameters": trained + frozen,
        "gradient": trained,
        "optimizer state": memory.bytes_of_a_device(state) - trained - frozen,
    }


@functools.lru_cache(maxsize=16)
def kept_bytes(shape: Shape) -> int:
    """What one run's backward pass needs of the forward one, on all devices together, by tracing it once."""
    layout = dataclasses.replace(shape.layout, unroll=False, attention="chunked")
    model, objective = shape.model.build(layout), shape.objective
    params = jax.eval_shape(model.init, KEY)
    weights = {name: jnp.float32(1) for name in objective.weights()}
    batch = {
        name: jax.ShapeDtypeStruct((x.shape[0] // shape.micro_batches, *x.shape[1:]), x.dtype)
        for name, x in shape.spec
    }

    def kept(params: Any, batch: Any) -> Any:
        return jax.vjp(lambda p: total(objective.terms(model, p, batch, None, weights)), params)[1]

    sizes = collections.Counter(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(kept, params, batch))
    )
    sizes.subtract(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))  # they are kept anyway
    return sum(size * count for size, count in sizes.items() if count > 0)


def lines(program: Program) -> list[str]:
    """The mesh, what is spread over which of its axes, what a device holds, and what stays whole."""
    mesh, shape = program.mesh, program.shape
    spread = {name: [] for name, size in mesh.shape.items() if size > 1}
    for axis, names in sharding.TABLE.items():
        for name in names:
            if name in spread and axis not in ("tokens", "kv_heads"):
                spread[name].append(axis)
    over = "; ".join(f"{name}={mesh.shape[name]}: {', '.join(axes)}" for name, axes in spread.items())
    each = state_bytes(program)
    members = (shape.members or 1) // mesh.shape["member"]
    each["activations, at most about"] = members * kept_bytes(shape) // sharding.ways("tokens", mesh)
    held = ", ".join(f"{what} {size / 1e6:,.3g} MB" for what, size in each.items())
    whole = sharding.describe(program.params, jax.tree.map(lambda role: role.axes, program.roles), mesh)
    kind = mesh.devices.flat[0].device_kind
    return [
        f"on {mesh.size} {kind}" + (f", spread over {over}" if over else ""),
        f"each holds {held}",
        *whole,
    ]
