"""Many small robust fits at once: damped Newton steps for S members, vectorised in numpy, float64.

minimise over theta  sum_i w_i rho(fitted_i(theta) - measured_i), each member with its own start, measured
values and weights (a bootstrap draw is a vector of counts, or of noisy values). A Huber loss curves by 1
inside delta and 0 outside, which alone is singular far from the optimum; min(1, delta/|r|), the weight of
iterated least squares, majorises the loss and always descends. The damping moves between the two: slow and
safe where it is large, Newton where it is 0.
"""

import dataclasses
from typing import NamedTuple, Protocol

import numpy as np

from llm_jax.scaling.laws import Inputs, Law
from llm_jax.scaling.objectives import Objective

_BLOCK = 2**13  # members times points whose Jacobians stay in the processor's cache
_NARROWING = 8.0  # how much narrower each stage of `narrowed` is; kinks stop descents from far away
_WIDE = 1e-3


class Local(NamedTuple):
    """The objective around a point of each member."""

    objective: np.ndarray  # [S]
    gradient: np.ndarray  # [S, F]
    newton: np.ndarray  # [S, F, F]
    majorant: np.ndarray  # [S, F, F]


class Data(NamedTuple):
    """What members are fitted to: one row for each, or a single row for all alike."""

    y: np.ndarray  # [S or 1, n], ln of the losses
    weights: np.ndarray  # [S or 1, n]

    def of(self, members: np.ndarray | slice) -> "Data":
        return Data(*(part if len(part) == 1 else part[members] for part in self))


class Descent(Protocol):
    """What `minimise` walks down: an objective of free parameters within bounds."""

    lower: np.ndarray
    upper: np.ndarray

    def evaluate(self, free: np.ndarray, data: Data) -> Local: ...


@dataclasses.dataclass(frozen=True)
class Problem:
    """A law on points, with fixed and tied parameters: theta = free @ spread + offset.

    x: {input: [n]}, natural logarithms; spread [F, P], offset [P]; lower, upper [F].
    """

    law: Law
    x: Inputs
    objective: Objective
    spread: np.ndarray
    offset: np.ndarray
    lower: np.ndarray
    upper: np.ndarray

    def theta(self, free: np.ndarray) -> np.ndarray:
        """All parameters [S, P] of the law from the free ones [S, F]."""
        return free @ self.spread + self.offset

    def residuals(self, free: np.ndarray, data: Data) -> tuple[np.ndarray, np.ndarray]:
        """fitted - measured [S, n], of ln L or of L as the objective has it, and derivatives [S, F, n]."""
        fitted, jacobian = self.law.with_jacobian(self.theta(free), self.x)
        jacobian = self.spread @ jacobian
        if not self.objective.raw:
            return fitted - data.y, jacobian
        loss = np.exp(fitted)
        return loss - np.exp(data.y), jacobian * loss[:, None]

    def evaluate(self, free: np.ndarray, data: Data) -> Local:
        """Objective, gradient and both curvatures at `free` [S, F]."""
        size = max(_BLOCK // data.y.shape[1], 1)
        blocks = [slice(start, start + size) for start in range(0, len(free), size)]
        with np.errstate(over="ignore", invalid="ignore"):  # far starts may be infinitely bad
            parts = [self._evaluate(free[block], data.of(block)) for block in blocks]
        return Local(*map(np.concatenate, zip(*parts, strict=True)))

    def _evaluate(self, free: np.ndarray, data: Data) -> Local:
        residual, jacobian = self.residuals(free, data)
        rho, slope, curvature, majorant = self.objective.parts(residual)
        transposed, weights = jacobian.swapaxes(-1, -2), data.weights
        return Local(
            (weights * rho).sum(-1),
            (jacobian @ (weights * slope)[..., None])[..., 0],
            (jacobian * (weights * curvature)[:, None]) @ transposed,
            (jacobian * (weights * majorant)[:, None]) @ transposed,
        )


class Solution(NamedTuple):
    """Where each member ended."""

    free: np.ndarray  # [S, F]
    objective: np.ndarray  # [S]
    converged: np.ndarray  # [S] bool: the next step would gain less than the tolerance times the objective


def minimise(problem: Descent, starts: np.ndarray, data: Data, steps: int = 200) -> Solution:
    """Descends from every row of `starts` [S, F]."""
    free = np.clip(starts, problem.lower, problem.upper)
    objective, converged = np.empty(len(free)), np.zeros(len(free), bool)
    damping, active = np.ones(len(free)), np.arange(len(free))
    here = problem.evaluate(free, data)
    for _ in range(steps):
        step = _step(problem, free[active], here, damping)
        moved = np.clip(free[active] + step, problem.lower, problem.upper)
        gain = -(here.gradient * (moved - free[active])).sum(-1)
        there = problem.evaluate(moved, data.of(active))
        better = there.objective < here.objective
        free[active[better]] = moved[better]
        here = Local(*(np.where(_like(better, new), new, old) for new, old in zip(there, here, strict=True)))
        objective[active] = here.objective
        # Relative to the objective, whose scale may be 1e-3 or 1e-25; the last term is for an exact 0.
        converged[active] = gain <= 1e-13 * here.objective + 1e-300
        damping = np.where(better, damping / 4, np.maximum(damping, 1e-6) * 8)
        damping = np.where(damping < 1e-9, 0.0, damping)
        stay = ~converged[active] & (damping < 1e12)
        active, damping, here = active[stay], damping[stay], Local(*(part[stay] for part in here))
        if not len(active):
            break
    return Solution(free, objective, converged)


def resume(problem: Descent, ends: Solution, data: Data, which: np.ndarray) -> Solution:
    """`ends` with the members `which` [S] carried on, 25 times as long: valleys nearly flat take that."""
    if not which.any():
        return ends
    more = minimise(problem, ends.free[which], data.of(which), steps=5000)
    free, objective, converged = (part.copy() for part in ends)
    free[which], objective[which], converged[which] = more
    return Solution(free, objective, converged)


def widened(problem: Problem) -> Problem:
    """The same with a Huber bound of at least 1e-3, from where narrower ones are reached."""
    wide = max(problem.objective.delta, _WIDE)
    return dataclasses.replace(problem, objective=dataclasses.replace(problem.objective, delta=wide))


def narrowed(problem: Problem, free: np.ndarray, data: Data) -> Solution:
    """The optima of `problem` from starts near those of its `widened` form.

    Each stage starts where the last, of a wider bound, ended; what has not converged is carried on.
    """
    stage = widened(problem)
    while True:
        end = minimise(stage, free, data)
        if stage.objective.delta <= problem.objective.delta:
            return resume(problem, end, data, ~end.converged)
        delta = max(problem.objective.delta, stage.objective.delta / _NARROWING)
        stage = dataclasses.replace(stage, objective=dataclasses.replace(problem.objective, delta=delta))
        free = end.free


def _step(problem: Descent, free: np.ndarray, here: Local, damping: np.ndarray) -> np.ndarray:
    """The damped step; a parameter at its bound that would leave it stays."""
    blocked = ((free <= problem.lower) & (here.gradient > 0)) | (
        (free >= problem.upper) & (here.gradient < 0)
    )
    share = np.minimum(damping, 1.0)[:, None, None]
    matrix = here.newton + share * (here.majorant - here.newton)
    diagonal = np.diagonal(here.majorant, axis1=1, axis2=2)
    ridge = damping[:, None] / 100 * diagonal + 1e-15 * diagonal.max(-1, keepdims=True) + 1e-200
    index = np.arange(matrix.shape[-1])
    matrix[:, index, index] += ridge
    keep = ~blocked
    matrix = np.where(keep[:, :, None] & keep[:, None, :], matrix, np.eye(matrix.shape[-1]))
    return -np.linalg.solve(matrix, np.where(keep, here.gradient, 0.0)[..., None])[..., 0]


def _like(mask: np.ndarray, array: np.ndarray) -> np.ndarray:
    return mask.reshape(mask.shape + (1,) * (array.ndim - mask.ndim))
