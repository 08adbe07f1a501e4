"""Gradient noise is measured as it is defined, on a loss whose gradients are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import gradient_noise
from llm_jax.losses import Objective
from llm_jax.models import Layout, Model, ModelConfig, Output, Term
from llm_jax.scaling import batches


@dataclasses.dataclass(frozen=True)
class Point(ModelConfig):
    """A single vector."""

    def build(self, layout=None):
        return Model(
            lambda key: {"w": jnp.zeros(3)}, lambda params, batch, key=None: Output(params["w"], {}), None
        )


@dataclasses.dataclass(frozen=True)
class Quadratic(Objective):
    """Half the squared distance to each row, whose gradient is w - x: its covariance is that of the rows."""

    def terms(self, model, params, batch, key, weights):
        distance = model.apply(params, batch).hidden - batch["x"]
        return {"quadratic": Term(0.5 * jnp.square(distance).sum(), batch["x"].shape[0])}


def test_the_noise_scale_of_a_quadratic_is_that_of_its_rows():
    generator = np.random.default_rng(0)
    deviation, mean = np.array([1.0, 2.0, 0.5]), np.array([0.3, -1.0, 0.2])
    rows = mean + deviation * generator.normal(size=(8, 100, 2, 3))
    measure = gradient_noise.squares(Point(), Quadratic(), Layout())
    w = jnp.array([1.0, 0.0, 0.0])
    small, big = np.array([measure({"w": w}, {"x": jnp.asarray(part, jnp.float32)}) for part in rows]).T
    gradients = np.asarray(w) - rows
    assert small == pytest.approx((gradients.mean(2) ** 2).sum(-1).mean(1), rel=1e-5)
    assert big == pytest.approx((gradients.mean((1, 2)) ** 2).sum(-1), rel=1e-5)
    trace, square = batches.noise_scale(2, 200, small, big)
    truth = (deviation**2).sum() / ((np.asarray(w) - mean) ** 2).sum()
    assert trace.sum() / square.sum() == pytest.approx(truth, rel=0.1)


def test_the_hook_measures_the_runs_own_gradient_on_rows_drawn_anew(tiny_run):
    hook = gradient_noise.hook(tiny_run, small_rows=2, count=4)
    model = tiny_run.resolved_model.build(Layout())
    params = model.init(jax.random.PRNGKey(0))
    first, again, later = hook(10, params), hook(10, params), hook(20, params)
    assert first == again != later
    assert 0 < first[gradient_noise.BIG] < first[gradient_noise.SMALL]
