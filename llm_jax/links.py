"""Links of the optimizers' chains: what gives a step its direction, and what becomes of it.

A role may multiply rate, decay and epsilon, by the kind of steps that an optimizer makes ("adam", "sgd" ...,
models/parametrization.py).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_jax.models import Params, Role

Hyper = Mapping[str, Any]  # one row of the tables: a scalar for each column
Roles = Any  # a tree of Role


def adam(roles: Roles, hyper: Hyper) -> optax.GradientTransformation:
    """Adam's direction, with an epsilon for each role."""
    scaled = optax.scale_by_adam(hyper["beta1"], hyper["beta2"], hyper["epsilon"])
    return optax.chain(in_units(roles), scaled)


def in_units(roles: Roles) -> optax.GradientTransformation:
    """Gradients in units in which all roles have one epsilon; Adam sees nothing else of a unit."""
    return each(roles, lambda role, g, _: g / role.multiplier("adam").epsilon)


def decayed(roles: Roles, hyper: Hyper, rate: Any, steps: str = "adam") -> optax.GradientTransformation:
    """-rate * (direction + weight_decay * parameter), the last term where the role decays."""
    return optax.chain(decay(roles, hyper, steps), down(roles, rate, steps))


def decay(roles: Roles, hyper: Hyper, steps: str) -> optax.GradientTransformation:
    """direction + weight_decay * parameter where the role decays."""

    def add(role: Role, g: jax.Array, p: jax.Array) -> jax.Array:
        return g + hyper["weight_decay"] * role.multiplier(steps).decay * p if role.decay else g

    return each(roles, add)


def down(roles: Roles, rate: Any, steps: str) -> optax.GradientTransformation:
    """A step down the direction, at the role's rate."""
    return each(roles, lambda role, g, _: -rate * role.multiplier(steps).rate * g)


def each(
    roles: Roles, function: Callable[[Role, jax.Array, jax.Array], jax.Array]
) -> optax.GradientTransformation:
    """The link without a state that maps (role, update, parameter) to an update."""

    def update(updates: Params, params: Params) -> Params:
        # Leaves of other optimizers are masked: a role stands over nothing there.
        over = lambda role, g, p: jax.tree.map(lambda g, p: function(role, g, p), g, p)  # noqa: E731
        return jax.tree.map(over, roles, updates, params)

    return optax.stateless(update)


class Averaged(NamedTuple):
    """State of a link that keeps an average of the weights, and for schedule-free the iterate z."""

    average: Params
    iterate: Params = ()


def moving_average(rate: Any) -> optax.GradientTransformation:
    """The last link: moves the average towards the new parameters by `rate` of the way."""

    def update(updates: Params, state: Averaged, params: Params) -> tuple[Params, Averaged]:
        towards = lambda a, p, u: a + rate * (p + u - a)  # noqa: E731
        return updates, Averaged(jax.tree.map(towards, state.average, params, updates))

    return optax.GradientTransformation(lambda params: Averaged(jax.tree.map(jnp.copy, params)), update)


def interpolate(beta: Any, rate: Any) -> optax.GradientTransformation:
    """Schedule-free's z and x from z's step; the update takes y, the parameters, to its next place."""

    def init(params: Params) -> Averaged:
        return Averaged(jax.tree.map(jnp.copy, params), jax.tree.map(jnp.copy, params))

    def update(updates: Params, state: Averaged, params: Params) -> tuple[Params, Averaged]:
        z = jax.tree.map(jnp.add, state.iterate, updates)
        x = jax.tree.map(lambda x, z: x + rate * (z - x), state.average, z)
        return jax.tree.map(lambda x, y, z: z + beta * (x - z) - y, x, params, z), Averaged(x, z)

    return optax.GradientTransformation(init, update)


class Momentum(NamedTuple):
    """State of Muon's link."""

    momentum: Params


def muon(roles: Roles, momentum: Any) -> optax.GradientTransformation:
    """Nesterov momentum, no bias correction, then the nearest semi-orthogonal matrix, scaled by its shape."""

    def update(updates: Params, state: Momentum, params: Params) -> tuple[Params, Momentum]:
        blend = lambda g, m: momentum * m + (1 - momentum) * g  # noqa: E731
        kept = jax.tree.map(blend, updates, state.momentum)
        looked_ahead = jax.tree.map(blend, updates, kept)
        steps, _ = each(roles, lambda role, g, _: _muon_step(role, g)).update(looked_ahead, (), params)
        return steps, Momentum(kept)

    return optax.GradientTransformation(lambda params: Momentum(optax.tree.zeros_like(params)), update)


def _muon_step(role: Role, leaf: jax.Array) -> jax.Array:
    inputs, outputs = role.matrix
    stack = tuple(d for d in range(leaf.ndim) if d not in inputs + outputs)
    order = stack + inputs + outputs
    turned = leaf.transpose(order)
    rows, columns = (int(np.prod([leaf.shape[d] for d in dims])) for dims in (inputs, outputs))
    matrices = turned.reshape(*turned.shape[: len(stack)], rows, columns)
    step = orthogonalize(matrices) * max(1, columns / rows) ** 0.5
    return step.reshape(turned.shape).transpose(np.argsort(order))


def orthogonalize(matrices: jax.Array) -> jax.Array:
    """Singular values brought near 1 by five Newton-Schulz steps, for each matrix of [..., rows, columns].

    The quintic a x + b x^3 + c x^5 of Jordan 2024: its slope at 0 lifts small singular values fast; they end
    between about 0.7 and 1.2, not at 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def by_layer(roles: Roles, rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """`rule` for each parameter on its own, and for each layer of a stacked one."""

    def layers(role: Role, function: Any) -> Any:
        return jax.vmap(function) if role.axes[:1] == ("layers",) else function

    def init(params: Params) -> Any:
        return jax.tree.map(lambda role, leaf: layers(role, rule.init)(leaf), roles, params)

    def update(updates: Params, state: Any, params: Params) -> tuple[Params, Any]:
        all_roles, tree = jax.tree.flatten(roles)
        columns = (tree.flatten_up_to(x) for x in (updates, state, params))
        pairs = [layers(role, rule.update)(*row) for role, *row in zip(all_roles, *columns, strict=True)]
        return tuple(tree.unflatten(part) for part in zip(*pairs, strict=True))

    return optax.GradientTransformation(init, update)
