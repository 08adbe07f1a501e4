"""Optimizers: one table of optax chains whose hyperparameters are arrays, a row of per-step tables each step.

Nothing here branches on a hyperparameter's value, so one compiled step serves every rate, decay and schedule,
and packing members is `jax.vmap` over rows. A chain is built anew in each trace, around that trace's row.
Weight decay is decoupled (a step shrinks matrices by learning_rate * weight_decay), except in SGD. Roles may
multiply rate, decay and epsilon (models/parametrization.py).
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_jax import links
from llm_jax.config import Tagged, UserError
from llm_jax.links import Hyper, Roles
from llm_jax.losses import Objective
from llm_jax.models import Params
from llm_jax.schedules import Constant, Cosine, Schedule
from llm_jax.values import hints


@dataclasses.dataclass(frozen=True)
class Optimizer(Tagged):
    """Root of the union. Each float field is a column of the per-step tables; rates follow the schedule.

    clip_norm: norm of the whole gradient above which it is scaled down to it (inf: never).
    average: decay of an exponential moving average of the weights, used for evaluation (None: no average).
    steps: the kinds of steps it makes, by which roles tell their multipliers.
    """

    steps: ClassVar[frozenset[str]] = frozenset(("adam",))

    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    schedule: Schedule = Cosine()
    average: float | None = None

    def validate(self) -> None:
        for name in _floats(self):
            value = getattr(self, name)
            if not value >= 0 or (value == np.inf and name != "clip_norm"):
                raise UserError(f"optimizer.{name} is {value}; it must be a number, 0 or above")
            if name.startswith(("beta", "momentum")) and value >= 1:
                raise UserError(f"optimizer.{name} is {value}; it must be at least 0 and below 1")
        if self.clip_norm == 0:
            raise UserError("optimizer.clip_norm is 0, which would stop all learning; inf turns clipping off")
        if self.average is not None and not 0 <= self.average < 1:
            raise UserError(
                f"optimizer.average is {self.average}; it must be at least 0 and below 1, or none"
            )

    def columns(self, steps: int) -> dict[str, np.ndarray]:
        """This optimizer's columns of the tables, float64 [steps]."""
        factor = self.schedule.table(steps)
        columns = {
            name: getattr(self, name) * (factor if name.endswith("learning_rate") else np.ones(steps))
            for name in _floats(self)
        }
        if self.average is not None:
            # A short memory at first: initial weights would stay in it for 1 / (1 - average) steps.
            step = np.arange(steps)
            columns["average_rate"] = 1 - np.minimum(self.average, (1 + step) / (10 + step))
        return columns

    def rule(self, roles: Roles, hyper: Hyper) -> optax.GradientTransformation:
        """From clipped gradients to updates, at this step's hyperparameters."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer, kind="adamw"):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8

    def rule(self, roles: Roles, hyper: Hyper) -> optax.GradientTransformation:
        return optax.chain(links.adam(roles, hyper), links.decayed(roles, hyper, hyper["learning_rate"]))


@dataclasses.dataclass(frozen=True)
class Muon(Optimizer, kind="muon"):
    """Momentum orthogonalised by Newton-Schulz steps on matrices, AdamW at its own rate on all else.

    A leaf is a matrix, or a stack of them, where its role says so. Keller Jordan 2024,
    https://kellerjordan.github.io/posts/muon.
    """

    steps: ClassVar[frozenset[str]] = frozenset(("muon", "adam"))

    learning_rate: float = 0.02
    weight_decay: float = 0.0
    momentum: float = 0.95
    adam_learning_rate: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-10

    def rule(self, roles: Roles, hyper: Hyper) -> optax.GradientTransformation:
        rates = {"muon": hyper["learning_rate"], "adam": hyper["adam_learning_rate"]}
        directions = {"muon": links.muon(roles, hyper["momentum"]), "adam": links.adam(roles, hyper)}
        decayed = {name: links.decayed(roles, hyper, rate, name) for name, rate in rates.items()}
        return optax.partition(
            {name: optax.chain(directions[name], decayed[name]) for name in rates},
            jax.tree.map(lambda role: "adam" if role.matrix is None else "muon", roles),
        )


@dataclasses.dataclass(frozen=True)
class Lion(Optimizer, kind="lion"):
    """The sign of an interpolated momentum (Chen et al. 2023, arXiv:2302.06675)."""

    learning_rate: float = 3e-4
    weight_decay: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99

    def rule(self, roles: Roles, hyper: Hyper) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_lion(hyper["beta1"], hyper["beta2"]),
            links.decayed(roles, hyper, hyper["learning_rate"]),
        )


@dataclasses.dataclass(frozen=True)
class Adafactor(Optimizer, kind="adafactor"):
    """Second moments kept as row and column means; steps relative to the parameter's scale.

    Shazeer and Stern 2018 (arXiv:1804.04235). Matrices are factored if both sides are at least
    `factored_from`; each layer of a stack is a parameter of its own.
    """

    steps: ClassVar[frozenset[str]] = frozenset(("adafactor",))

    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    decay_exponent: float = 0.8
    clip_threshold: float = 1.0
    factored_from: int = 128

    def rule(self, roles: Roles, hyper: Hyper) -> optax.GradientTransformation:
        rescaled = optax.chain(
            optax.scale_by_factored_rms(
                decay_rate=hyper["decay_exponent"], min_dim_size_to_factor=self.factored_from
            ),
            optax.clip_by_block_rms(hyper["clip_threshold"]),
            optax.scale_by_param_block_rms(),
        )
        decayed = links.decayed(roles, hyper, hyper["learning_rate"], "adafactor")
        return optax.chain(links.by_layer(roles, rescaled), decayed)


@dataclasses.dataclass(frozen=True)
class SGD(Optimizer, kind="sgd"):
    """Stochastic gradient descent with momentum; weight decay is part of the gradient, as in torch."""

    steps: ClassVar[frozenset[str]] = frozenset(("sgd",))

    learning_rate: float = 0.1
    weight_decay: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False

    def rule(self, roles: Roles, hyper: Hyper) -> optax.GradientTransformation:
        return optax.chain(
            links.decay(roles, hyper, "sgd"),
            optax.trace(hyper["momentum"], nesterov=self.nesterov),
            links.down(roles, hyper["learning_rate"], "sgd"),
        )


@dataclasses.dataclass(frozen=True)
class ScheduleFree(Optimizer, kind="schedule_free"):
    """AdamW without a decay: gradients at y, between the iterate z and its average x, which is evaluated.

    y = (1 - beta1) z + beta1 x, and x averages z with the squared rates as weights. Defazio et al. 2024
    (arXiv:2405.15682, algorithm 1; the averaging weights leave Adam's bias correction out, as optax does).
    """

    schedule: Schedule = Constant()
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8

    def validate(self) -> None:
        super().validate()
        if self.average is not None:
            raise UserError("optimizer.average must be none: schedule_free evaluates an average of its own")

    def columns(self, steps: int) -> dict[str, np.ndarray]:
        columns = super().columns(steps)
        weight = np.maximum.accumulate(self.schedule.table(steps)) ** 2
        return columns | {"average_rate": weight / np.cumsum(weight)}

    def rule(self, roles: Roles, hyper: Hyper) -> optax.GradientTransformation:
        return optax.chain(
            links.in_units(roles),
            optax.scale_by_rms(hyper["beta2"], hyper["epsilon"], eps_in_sqrt=False, bias_correction=True),
            links.decayed(roles, hyper, hyper["learning_rate"]),
            links.interpolate(hyper["beta1"], hyper["average_rate"]),
        )


# ---- what the step calls ----


def tables(optimizer: Optimizer, objective: Objective, steps: int) -> dict[str, np.ndarray]:
    """Every hyperparameter at each step, float32 [steps]: the optimizer's and the loss's `weights/<term>`."""
    if steps < 1:
        raise UserError(f"a run of {steps} steps trains nothing; give it at least one step")
    weights = {f"weights/{name}": np.full(steps, weight) for name, weight in objective.weights().items()}
    return {name: column.astype(np.float32) for name, column in (optimizer.columns(steps) | weights).items()}


def structure(optimizer: Optimizer) -> Optimizer:
    """What of an optimizer decides its program: all but numbers and schedule, which are arrays there."""
    numbers = dict.fromkeys(_floats(optimizer), 0.0)
    average = None if optimizer.average is None else 0.0
    return dataclasses.replace(optimizer, **numbers, average=average, schedule=Constant())


def init(optimizer: Optimizer, roles: Roles, params: Params) -> Any:
    """The optimizer's state before the first step; its arrays are float32 like the parameters."""
    first = {name: column[0] for name, column in optimizer.columns(1).items()}
    return _chain(optimizer, roles, first).init(params)


def update(
    optimizer: Optimizer, roles: Roles, grads: Params, state: Any, params: Params, hyper: Hyper
) -> tuple[Params, Any]:
    """(updates to add to the parameters, next state) at one row of the tables."""
    return _chain(optimizer, roles, hyper).update(grads, state, params)


def evaluation_params(state: Any, params: Params) -> Params:
    """The parameters to score and to publish: the average where the optimizer keeps one, else `params`."""
    kept = jax.tree.leaves(state, is_leaf=lambda link: isinstance(link, links.Averaged))
    return next((link.average for link in kept if isinstance(link, links.Averaged)), params)


def norms_by_role(roles: Roles, tree: Params) -> dict[str, jax.Array]:
    """The L2 norm over all leaves that share a role's name, by name."""
    squares: dict[str, jax.Array] = {}
    for role, leaf in zip(jax.tree.leaves(roles), jax.tree.leaves(tree), strict=True):
        squares[role.name] = squares.get(role.name, 0) + jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    return {name: jnp.sqrt(square) for name, square in sorted(squares.items())}


def _chain(optimizer: Optimizer, roles: Roles, hyper: Hyper) -> optax.GradientTransformation:
    chain = [optax.clip_by_global_norm(hyper["clip_norm"]), optimizer.rule(roles, hyper)]
    if optimizer.average is not None:
        chain.append(links.moving_average(hyper["average_rate"]))
    return optax.chain(*chain)


def _floats(optimizer: Optimizer) -> list[str]:
    return [name for name, kind in hints(type(optimizer)).items() if kind is float]
