"""The coordinate check: how much a few steps change what stands in every layer, at one width and another.

Under a parametrisation that transfers, entries of all activations move by as much at every width (Yang and Hu
2021, arXiv:2011.14522, and the check of arXiv:2203.03466, appendix D.1). Blocks' last matrices are zero at the
start, so there is nothing to see before a few steps.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import optimizers
from llm_jax.losses import NextToken, Objective
from llm_jax.models import Batch, Layout, ModelConfig
from llm_jax.optimizers import Optimizer
from llm_jax.step import make_init, make_step


def movements(
    config: ModelConfig,
    optimizer: Optimizer,
    batches: Batch,
    seed: int = 0,
    objective: Objective = NextToken(),
) -> dict[str, float]:
    """The root mean square of what the steps changed in each of the model's activations, by name.

    batches: with a leading axis of steps, an update each; the first is what the activations are looked at on.
    """
    model = config.build(Layout(unroll=True, attention="reference"))
    roles = model.roles(jax.eval_shape(model.init, jax.random.PRNGKey(0)))
    steps = next(iter(batches.values())).shape[0]
    tables = optimizers.tables(optimizer, objective, steps)
    step = make_step(model, objective, optimizer, roles)

    @jax.jit
    def moved(key: jax.Array, batches: Batch, tables: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        look = jax.tree.map(lambda x: x[0], batches)
        state = make_init(model, optimizer, roles)(key)
        before = model.activations(state.trained, look)
        state, _ = jax.lax.scan(lambda state, row: (step(state, *row)[0], None), state, (batches, tables))
        after = model.activations(state.trained, look)
        change = jax.tree.map(lambda a, b: (a - b).astype(jnp.float32), after, before)
        return jax.tree.map(lambda x: jnp.sqrt(jnp.mean(jnp.square(x))), change)

    return {name: float(value) for name, value in moved(jax.random.PRNGKey(seed), batches, tables).items()}


def growth(widths: list[int], moved: list[dict[str, float]]) -> dict[str, float]:
    """For each activation the power of the width that its movement goes with (least squares on logarithms)."""
    x = np.log(np.asarray(widths, float))
    return {name: float(np.polyfit(x, np.log([row[name] for row in moved]), 1)[0]) for name in moved[0]}
