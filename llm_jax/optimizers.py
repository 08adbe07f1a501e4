"""Optimizers: one table of optax chains whose hyperparameters are arrays, one row of per-step tables a step.

Nothing here branches on a hyperparameter's value, so one compiled step serves every rate, decay and
schedule, and packing members is `jax.vmap` over rows. A chain is built anew in each trace, around that row.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_jax.config import Tagged, UserError
from llm_jax.losses import Objective
from llm_jax.models import Params
from llm_jax.schedules import Cosine, Schedule

Hyper = Mapping[str, Any]  # one row of the tables: a scalar for each column
Roles = Any  # a tree of models.Role


@dataclasses.dataclass(frozen=True)
class Optimizer(Tagged):
    """Root of the union. Every float field is a column of the per-step tables; rates follow the schedule.

    clip_norm: global gradient norm above which gradients are scaled down (inf: never).
    """

    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    schedule: Schedule = Cosine()

    def validate(self) -> None:
        for name in _floats(self):
            value = getattr(self, name)
            if not value >= 0:
                raise UserError(f"optimizer.{name} is {value}; it must be 0 or positive")
            if name.startswith(("beta", "momentum")) and value >= 1:
                raise UserError(f"optimizer.{name} is {value}; it must be below 1")

    def rule(self, roles: Roles, hyper: Hyper) -> optax.GradientTransformation:
        """From clipped gradients to updates, at this step's hyperparameters."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer, kind="adamw"):
    """Adam with decoupled weight decay on matrices (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8

    def rule(self, roles: Roles, hyper: Hyper) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(hyper["beta1"], hyper["beta2"], hyper["epsilon"]),
            _decay(roles, hyper),
            optax.scale_by_learning_rate(hyper["learning_rate"]),
        )


def tables(optimizer: Optimizer, objective: Objective, steps: int) -> dict[str, np.ndarray]:
    """Every hyperparameter at each step, float32 [steps]: the optimizer's and the loss's `weights/<term>`."""
    if steps < 1:
        raise UserError(f"a run of {steps} steps trains nothing; give it at least one step")
    factor = optimizer.schedule.table(steps)
    columns = {
        name: getattr(optimizer, name) * (factor if name.endswith("learning_rate") else np.ones(steps))
        for name in _floats(optimizer)
    }
    columns |= {f"weights/{name}": np.full(steps, weight) for name, weight in objective.weights().items()}
    return {name: column.astype(np.float32) for name, column in columns.items()}


def init(optimizer: Optimizer, roles: Roles, params: Params) -> Any:
    """The optimizer's state before the first step; its arrays are float32 like the parameters."""
    return _chain(optimizer, roles, {name: getattr(optimizer, name) for name in _floats(optimizer)}).init(
        params
    )


def update(
    optimizer: Optimizer, roles: Roles, grads: Params, state: Any, params: Params, hyper: Hyper
) -> tuple[Params, Any]:
    """(updates to add to the parameters, next state) at one row of the tables."""
    return _chain(optimizer, roles, hyper).update(grads, state, params)


def evaluation_params(optimizer: Optimizer, state: Any, params: Params) -> Params:
    """The parameters to score and to keep: an average where the optimizer holds one, else `params`."""
    return params


def norms_by_role(roles: Roles, tree: Params) -> dict[str, jax.Array]:
    """The L2 norm of all leaves that share a role's name, by name."""
    squares: dict[str, jax.Array] = {}
    for role, leaf in zip(jax.tree.leaves(roles), jax.tree.leaves(tree), strict=True):
        squares[role.name] = squares.get(role.name, 0) + jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    return {name: jnp.sqrt(square) for name, square in sorted(squares.items())}


def _chain(optimizer: Optimizer, roles: Roles, hyper: Hyper) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(hyper["clip_norm"]), optimizer.rule(roles, hyper))


def _decay(roles: Roles, hyper: Hyper) -> optax.GradientTransformation:
    return optax.add_decayed_weights(hyper["weight_decay"], mask=jax.tree.map(lambda role: role.decay, roles))


def _floats(optimizer: Optimizer) -> list[str]:
    return [field.name for field in dataclasses.fields(optimizer) if field.type is float]
