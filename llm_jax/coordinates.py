"""The coordinate check: how much a few steps change what stands in every layer, at one size and another.

Under a parametrisation that transfers, the entries of all activations move by as much at every width (Yang
and Hu 2021, arXiv:2011.14522; Yang et al. 2022, arXiv:2203.03466, appendix D.1). Blocks' last matrices are
zero at the start, so there is little to see before a few steps.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import optimizers, sharding
from llm_jax.config import UserError
from llm_jax.models import Batch, Params
from llm_jax.process import prepare_xla
from llm_jax.program import program, shape_of
from llm_jax.run import Run
from llm_jax.schedules import Constant


def movements(run: Run, steps: int) -> dict[str, float]:
    """The root mean square of what the first steps change in the last layer's activations, on the first rows.

    The run's own program takes them, at a constant rate. Raises UserError for a model that doesn't show its
    activations.
    """
    prepare_xla(run.execution.deterministic)
    source, mesh = run.data.open(), sharding.make_mesh(run.execution.mesh)
    steady = dataclasses.replace(run.optimizer, schedule=Constant(warmup_fraction=0.0))
    tables = optimizers.tables(steady, run.objective, steps)
    model = run.resolved_model.build(run.execution.layout)
    if model.activations is None:
        raise UserError(f"model={run.model.kind} doesn't show its activations, so nothing can be checked")

    @jax.jit
    def last(params: Params, batch: Batch) -> dict[str, jax.Array]:
        return {name: x[-1].astype(jnp.float32) for name, x in model.activations(params, batch).items()}

    with jax.set_mesh(mesh):
        parts = program(dataclasses.replace(shape_of(run, source), block=1), mesh)

        def rows(step: int) -> Batch:
            start = step * run.data.batch_size
            return sharding.load_rows(lambda chosen: source.rows(run.order, start + chosen), parts.batch)

        state = parts.init(jax.random.PRNGKey(run.seed), run.initial_scale)
        before = last(state.trained, rows(0))
        for step in range(steps):
            hyper = {name: table[step] for name, table in tables.items()}
            state, _ = parts.step(state, rows(step), hyper)
        after = last(state.trained, rows(0))
        return {name: float(np.sqrt(np.mean(np.square(after[name] - before[name])))) for name in after}


def growth(sizes: Sequence[float], moved: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """For each activation the power of the size that its movement goes with (least squares on logarithms)."""
    x = np.log(np.asarray(sizes, float))
    return {name: float(np.polyfit(x, np.log([row[name] for row in moved]), 1)[0]) for name in moved[0]}
