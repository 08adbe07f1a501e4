"""Where a run lies: a mesh where none was asked for, what divides over one, what each device holds.

A mesh is execution alone: it is no part of a run's identity.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import sharding
from llm_jax.config import UserError
from llm_jax.kernels import memory
from llm_jax.losses import total
from llm_jax.program import KEY, Program, Shape, at, shape_of
from llm_jax.run import Run
from llm_jax.sharding import MeshConfig
from llm_jax.step import State, make_init, state_shardings

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

    Where none is enough, the one that takes least of a device.
    """
    shape, sizes = shape_of(run, run.data), {}
    for found in possible(run, devices):
        mesh = sharding.make_mesh(found, devices)
        sizes[found], room = held_bytes(shape, mesh), memory.room(mesh)
        if room is None or sizes[found] <= STATE_SHARE * room:
            return found
    return min(sizes, key=sizes.__getitem__, default=MeshConfig(slice=sharding.slices(devices)))


def possible(run: Run, devices: list[jax.Device]) -> Iterator[MeshConfig]:
    """Meshes of all devices for one run, those first whose parameters are spread over fewer of them.

    Rows are spread first; where they run out, sequences are. Experts are shared out before all parameters.
    """
    model, there = run.resolved_model.merged, sharding.slices(devices)
    heads, experts = getattr(model, "heads", 1), getattr(model, "experts", None)
    count = len(devices) // there
    rows, rest = divmod(run.data.batch_size, run.execution.micro_batches * there)
    if rest:
        return
    for ways in _divisors(count):  # devices that share the parameters
        for expert in reversed(_divisors(math.gcd(ways, experts.count if experts else 1, rows))):
            fsdp = math.gcd(ways // expert, rows // expert)
            data = math.gcd(count // ways, rows // (expert * fsdp))
            sequence, tensor = count // (ways * data), ways // (expert * fsdp)
            if heads % tensor == 0 and (sequence == 1 or why_no_ring(run, sequence) is None):
                yield MeshConfig(there, 1, data, fsdp, expert, sequence, tensor)


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


# ---- what a device holds ----


@functools.lru_cache(maxsize=16)
def _one(shape: Shape) -> tuple[State, Any]:
    """The state of one run, and the roles of its parameters."""
    model = shape.model.build(shape.layout)
    roles = model.roles(jax.eval_shape(model.init, KEY))
    return jax.eval_shape(make_init(model, shape.optimizer, roles), KEY), roles


def held_bytes(shape: Shape, mesh: jax.sharding.Mesh) -> int:
    """What each device holds of the state and a gradient of one run."""
    state, roles = _one(shape)
    placed = at(state, state_shardings(state, roles, mesh))
    return memory.bytes_of_a_device((placed, placed.trained))


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


def lines(program: Program, compiled: bool = False) -> list[str]:
    """The mesh, what is spread over which of its axes, what a device holds, and what stays whole.

    compiled: with what the step takes in all by its compiler; else with an estimate of activations.
    """
    mesh, shape = program.mesh, program.shape
    spread = {name: [] for name, size in mesh.shape.items() if size > 1}
    for axis, names in sharding.TABLE.items():
        for name in names:
            if name in spread and axis not in ("tokens", "kv_heads"):
                spread[name].append(axis)
    over = "; ".join(f"{name}={mesh.shape[name]}: {', '.join(axes)}" for name, axes in spread.items())
    each = state_bytes(program)
    if compiled:
        each["in a step, with all of that,"] = program.memory_bytes
    else:
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
