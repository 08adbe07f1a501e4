"""A program: what is compiled for a run, and shared by all runs that differ in numbers only.

Rates, decays, schedules, seeds and lengths are arrays in every program, so one serves a whole learning-rate
sweep, a trunk and its branches, and every budget of one model.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import optimizers, sharding
from llm_jax.data import Source
from llm_jax.held_out import make_scorer
from llm_jax.kernels import memory
from llm_jax.losses import Objective
from llm_jax.models import Layout, ModelConfig
from llm_jax.optimizers import Optimizer
from llm_jax.run import Run
from llm_jax.step import State, make_init, make_step, state_shardings

KEY = jax.ShapeDtypeStruct((2,), np.uint32)


@dataclasses.dataclass(frozen=True)
class Shape:
    """All that a program depends on: hashable, so that equal shapes find the same program.

    objective, optimizer: their structure alone. spec: of the global batch.
    """

    model: ModelConfig
    objective: Objective
    optimizer: Optimizer
    layout: Layout
    micro_batches: int
    spec: tuple[tuple[str, jax.ShapeDtypeStruct], ...]


def shape_of(run: Run, source: Source) -> Shape:
    """The shape of a run's program."""
    return Shape(
        run.resolved_model,
        run.objective.structure(),
        optimizers.structure(run.optimizer),
        run.execution.layout,
        run.execution.micro_batches,
        tuple(source.spec.items()),
    )


class Program:
    """The compiled functions of a shape on a mesh.

    init(key) -> State. step(state, batch, hyper) -> (state, metrics); the state is donated. scorer: of
    held_out.py. state: the State as ShapeDtypeStructs that say where it lies. Raises UserError, before
    anything is compiled, where a device can't hold that and the gradient.
    """

    def __init__(self, shape: Shape, mesh: jax.sharding.Mesh) -> None:
        model = shape.model.build(shape.layout)
        self.params = jax.eval_shape(model.init, KEY)
        self.roles = model.roles(self.params)
        init = make_init(model, shape.optimizer, self.roles)
        state = jax.eval_shape(init, KEY)
        placed = state_shardings(state, self.roles, mesh)
        self.state: State = _at(state, placed)
        memory.check(self.state.trained, self.state, mesh)
        self.init = jax.jit(init, out_shardings=placed)
        self.scorer, self.predicts_tokens = make_scorer(model), model.unembed is not None

        batch = {name: _at(x, sharding.batch_sharding(mesh)) for name, x in shape.spec}
        columns = optimizers.tables(shape.optimizer, shape.objective, steps=1)
        hyper = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in columns}
        step = make_step(model, shape.objective, shape.optimizer, self.roles, shape.micro_batches)
        started = time.perf_counter()
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(placed, None))
        self.step = jitted.lower(self.state, batch, hyper).compile()
        self.compile_seconds = time.perf_counter() - started


@functools.lru_cache(maxsize=16)
def program(shape: Shape, mesh: jax.sharding.Mesh) -> Program:
    """The program of `shape`, compiled once in a process; call it under `jax.set_mesh(mesh)`."""
    return Program(shape, mesh)


def _at(shapes: Any, places: Any) -> Any:
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )
