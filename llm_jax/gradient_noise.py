"""Gradient noise, measured while a run trains: gradients of many small batches, and of all of them as one.

An experiment file asks for it with

    def hooks(run):
        return [gradient_noise.hook(run)]

and `scaling.batches.noise_scale` makes of the two squared norms what they say (McCandlish et al. 2018,
arXiv:1812.06162, appendix A.1).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.losses import Objective, total
from llm_jax.models import Batch, Layout, ModelConfig, Params
from llm_jax.run import Run

SMALL, BIG = "gradient_square_small", "gradient_square_big"


def hook(run: Run, small_rows: int = 1, count: int = 64) -> Callable[[int, Params], dict[str, float]]:
    """Measures |gradient|^2: its mean over `count` batches of `small_rows` rows, and that of them all as one.

    The rows are drawn anew at each evaluation from the documents that the run trains on.
    """
    source = run.data.open()
    measure = squares(run.resolved_model, run.objective, run.execution.layout)

    def measured(step: int, params: Params) -> dict[str, float]:
        seed = (run.order + 1 << 32) + step  # an order that no run trains in
        rows = source.rows(seed, np.arange(count * small_rows))
        parts = {name: value.reshape(count, small_rows, *value.shape[1:]) for name, value in rows.items()}
        small, big = jax.device_get(measure(params, parts))
        return {SMALL: float(small), BIG: float(big)}

    return measured


@functools.lru_cache(maxsize=8)
def squares(config: ModelConfig, objective: Objective, layout: Layout) -> Callable[[Params, Batch], Any]:
    """The compiled function from parameters and batches [count, rows, ...] to both squared norms.

    All batches must count alike (equal masks), so that the mean of their gradients is that of all rows.
    """
    model, weights = config.build(layout), objective.weights()

    def gradient(params: Params, batch: Batch) -> Params:
        return jax.grad(lambda p: total(objective.terms(model, p, batch, None, weights)))(params)

    @jax.jit
    def measure(params: Params, batches: Batch) -> tuple[jax.Array, jax.Array]:
        def add(carry: tuple, batch: Batch) -> tuple[tuple, None]:
            sums, squared = carry
            found = gradient(params, batch)
            return (jax.tree.map(jnp.add, sums, found), squared + square(found)), None

        count = jax.tree.leaves(batches)[0].shape[0]
        start = jax.tree.map(jnp.zeros_like, params), jnp.zeros(())
        (sums, squared), _ = jax.lax.scan(add, start, batches)
        return squared / count, square(sums) / count**2

    return measure


def square(tree: Params) -> jax.Array:
    """The squared norm of all leaves together."""
    return sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree))
