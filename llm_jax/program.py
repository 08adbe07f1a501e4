"""A program: what is compiled for a run, and shared by all runs that differ in numbers only.

Rates, decays, schedules, seeds and lengths are arrays in every program, so one serves a whole learning-rate
sweep, a trunk and its branches, and every budget of one model.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import optimizers, sharding
from llm_jax.config import UserError
from llm_jax.data import DataConfig, Source
from llm_jax.distributed import meet
from llm_jax.held_out import make_scorer
from llm_jax.kernels import memory
from llm_jax.kernels.advice import advice
from llm_jax.losses import Objective
from llm_jax.models import Layout, ModelConfig, Params
from llm_jax.optimizers import Optimizer
from llm_jax.run import Run
from llm_jax.step import State, make_init, make_step, over_block, over_members, state_shardings

KEY = jax.ShapeDtypeStruct((2,), np.uint32)


@dataclasses.dataclass(frozen=True)
class Shape:
    """All that a program depends on: hashable, so that equal shapes find the same program.

    objective, optimizer: their structure alone. spec: of the global batch. block: steps that are compiled as
    one. members: how many runs are packed (None: a run alone). own_rows: each of them has its own batch.
    """

    model: ModelConfig
    objective: Objective
    optimizer: Optimizer
    layout: Layout
    micro_batches: int
    spec: tuple[tuple[str, jax.ShapeDtypeStruct], ...]
    block: int = 1
    members: int | None = None
    own_rows: bool = False

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """What stands in front of a batch: the steps of a block, and the members if rows are their own."""
        return self._steps + ((self.members,) if self.own_rows else ())

    @property
    def hyper_axes(self) -> tuple[int, ...]:
        """What stands in front of a hyperparameter or a metric: the steps of a block, and the members.

        Where anything does, hyper has the column `active`.
        """
        return self._steps + (() if self.members is None else (self.members,))

    @property
    def _steps(self) -> tuple[int, ...]:
        return (self.block,) if self.block > 1 else ()


def shape_of(run: Run, source: Source | DataConfig) -> Shape:
    """The shape of a run's program; source: what has its `spec`."""
    return Shape(
        run.resolved_model,
        run.objective.structure(),
        optimizers.structure(run.optimizer),
        run.execution.layout,
        run.execution.micro_batches,
        tuple(source.spec.items()),
        run.execution.block_steps,
    )


class Program:
    """The compiled functions of a shape on a mesh.

    init(key, scale) -> State. step(state, batch, hyper) -> (state, metrics); the state is donated. scorer: of
    held_out.py. In a pack, what init takes, a State, hyper and metrics have a leading member axis.
    state, batch, hyper: ShapeDtypeStructs that say where things lie. one: the State of one run.
    pick(tree, numbers) -> the same of one member, or of some.
    """

    def __init__(self, shape: Shape, mesh: jax.sharding.Mesh) -> None:
        self.shape, self.mesh = shape, mesh
        self.model = shape.model.build(shape.layout)
        self.params = jax.eval_shape(self.model.init, KEY)
        self.roles = self.model.roles(self.params)
        self.compile_seconds = 0.0

        # ---- the state ----
        init, packed = make_init(self.model, shape.optimizer, self.roles), shape.members is not None
        one = jax.eval_shape(init, KEY)
        place_of_one = place = state_shardings(one, self.roles, mesh)
        self.one = self.state = at(one, place)
        self._begin = jax.jit(init, out_shardings=place)
        if packed:
            init = jax.vmap(init, spmd_axis_name="member")
            place = jax.tree.map(lambda p: sharding.behind(p, "member"), place)
            keys = jax.ShapeDtypeStruct((shape.members, *KEY.shape), KEY.dtype)
            self.state = at(jax.eval_shape(init, keys), place)
        self.init = jax.jit(init, out_shardings=place)
        self.scorer = make_scorer(self.model, packed, sharding.readable(mesh))
        self.pick = jax.jit(_take)
        self._take = jax.jit(_take, out_shardings=place_of_one)
        self._put = jax.jit(_put, donate_argnums=0, out_shardings=place)

        # ---- what a step takes ----
        steps, member = (None,) * (shape.block > 1), ("member",) * packed
        in_batch = sharding.behind(sharding.batch_sharding(mesh), *steps, *member * shape.own_rows)
        self.batch = {
            name: jax.ShapeDtypeStruct((*shape.batch_axes, *x.shape), x.dtype, sharding=in_batch)
            for name, x in shape.spec
        }
        columns = optimizers.tables(shape.optimizer, shape.objective, steps=1)
        columns |= {"active": None} if shape.hyper_axes else {}
        place = sharding.behind(sharding.whole(mesh), *steps, *member)
        row = jax.ShapeDtypeStruct(shape.hyper_axes, jnp.float32, sharding=place)
        self.hyper = dict.fromkeys(columns, row)

    @functools.cached_property
    def traced(self) -> jax.stages.Traced:
        """The step as JAX traces it."""
        shape = self.shape
        step = make_step(self.model, shape.objective, shape.optimizer, self.roles, shape.micro_batches)
        if shape.members is not None:
            step = over_members(step, shape.own_rows)
        if shape.block > 1:
            step = over_block(step)
        place = jax.tree.map(lambda x: x.sharding, self.state)
        with jax.set_mesh(self.mesh):
            jitted = jax.jit(step, donate_argnums=0, out_shardings=(place, sharding.readable(self.mesh)))
            return jitted.trace(self.state, self.batch, self.hyper)

    @functools.cached_property
    def lowered(self) -> jax.stages.Lowered:
        """The step as XLA is given it."""
        with jax.set_mesh(self.mesh):
            return self.traced.lower()

    @functools.cached_property
    def compiled(self) -> jax.stages.Compiled:
        """The step, whether or not it fits."""
        started = time.perf_counter()
        with jax.set_mesh(self.mesh):
            compiled = self.lowered.compile()
        self.compile_seconds += time.perf_counter() - started
        return compiled

    @property
    def step(self) -> jax.stages.Compiled:
        """Compiled when it is first asked for; raises UserError if it needs more memory than there is."""
        room = memory.room(self.mesh)
        if room is None or self.memory_bytes <= room:
            return self.compiled
        needs = f"needs {self.memory_bytes / 1e9:,.2f} GB of each device, which has {room / 1e9:,.2f} GB"
        if self.shape.members is None:
            raise UserError(f"a step {needs}: {self.advice(room)}")
        most = widest(self.shape, self.mesh, room)
        fits = f"the largest that fits is one of {most}" if most else "not even one member fits"
        raise UserError(f"a pack of {self.shape.members} {needs}; {fits}")

    @functools.cached_property
    def memory_parts(self) -> tuple[int, int]:
        """Bytes that the compiled step needs of each device: arguments and results, and what lies between."""
        plan = self.compiled.memory_analysis()
        results = plan.output_size_in_bytes - plan.alias_size_in_bytes
        return plan.argument_size_in_bytes + results, plan.temp_size_in_bytes

    @property
    def memory_bytes(self) -> int:
        """What the compiled step needs of each device."""
        return sum(self.memory_parts)

    def advice(self, room: float | None = None) -> str:
        """How a step would take less: `room` bytes of a device, or four fifths of now."""
        rows = self.shape.spec[0][1].shape[0]
        room = room or 0.8 * self.memory_bytes
        return advice(*self.memory_parts, room, rows, self.shape.micro_batches, self.shape.layout.remat)

    def charge(self) -> float:
        """The seconds of compiling that nobody was charged for yet: the first run has to pay."""
        seconds, self.compile_seconds = self.compile_seconds, 0.0
        return seconds

    def take(self, state: State, member: int) -> State:
        """The state of one member, as that of a run alone."""
        return state if self.shape.members is None else self._take(state, member)

    def begin(self, seed: int, read: Callable[[jax.sharding.Mesh], Params]) -> State:
        """The state at step 0 of one run whose parameters, or some of them, are read."""
        return self._begin(np.asarray(jax.random.PRNGKey(seed)), 1.0, read(self.mesh))

    def start(self, starts: Sequence[tuple[int, float]], restored: Sequence[State | None]) -> State:
        """The state to start from: of each member the one restored, or else that of its (seed, scale)."""
        if self.shape.members is None and restored[0] is not None:
            return restored[0]
        keys = np.stack([jax.random.PRNGKey(seed) for seed, _ in starts])
        scales = np.array([scale for _, scale in starts], np.float32)
        started = time.perf_counter()
        given = (keys, scales) if self.shape.members else (keys[0], scales[0])
        drawn = self.init.lower(*given).compile()
        self.compile_seconds += time.perf_counter() - started
        meet()  # compiling takes each process as long as it takes
        state = drawn(*given)
        for member, one in enumerate(restored):
            state = state if one is None else self._put(state, member, one)
        return state


def _take(tree: Any, member: jax.Array) -> Any:
    return jax.tree.map(lambda x: x[member], tree)


def _put(state: State, member: jax.Array, one: State) -> State:
    return jax.tree.map(lambda x, new: x.at[member].set(new), state, one)


@functools.lru_cache(maxsize=16)
def program(shape: Shape, mesh: jax.sharding.Mesh) -> Program:
    """The program of `shape`, compiled once in a process; call it under `jax.set_mesh(mesh)`.

    Raises UserError, before anything is compiled, where a device can't hold the state of one run and its
    gradient.
    """
    made = Program(shape, mesh)
    memory.check(made.one.trained, made.one, mesh)
    return made


def widest(shape: Shape, mesh: jax.sharding.Mesh, room: float) -> int:
    """The most members, up to those of `shape`, whose compiled step fits in `room` bytes of each device."""
    ways = mesh.shape["member"]

    def needs(members: int) -> int:
        return program(dataclasses.replace(shape, members=members), mesh).memory_bytes

    if (all_need := needs(shape.members)) <= room:
        return shape.members
    fits, too_wide, members = 0, shape.members, 0
    if too_wide > ways:  # memory goes nearly as a line, so this is near
        each = (all_need - needs(ways)) / (too_wide - ways)
        members = too_wide + ways * math.floor((room - all_need) / max(1, each * ways))
    while too_wide - fits > ways:
        members = min(max(members, fits + ways), too_wide - ways)
        if needs(members) <= room:
            fits = members
        else:
            too_wide = members
    return fits


def at(shapes: Any, places: Any) -> Any:
    """ShapeDtypeStructs that say where they lie."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )
