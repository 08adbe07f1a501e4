"""Many small robust fits at once: damped Newton steps for S members, vectorised in numpy, float64.

minimise over theta  sum_i w_i huber(ln L(x_i; theta) - ln L_i), each member with its own start and weights (a
bootstrap draw is a vector of counts). The Huber loss curves by 1 inside delta and 0 outside, which alone is
singular far from the optimum; min(1, delta/|r|), the weight of iterated least squares, majorises the loss and
always descends. The damping moves between the two: slow and safe where it is large, Newton where it is 0.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from llm_jax.scaling.laws import Inputs, Law

_BLOCK = 2**13  # members times points whose Jacobians stay in the processor's cache


@dataclasses.dataclass(frozen=True)
class Problem:
    """A law on points, with fixed and tied parameters: theta = free @ spread + offset.

    x: {input: [n]} and y [n], natural logarithms; delta: Huber's bound (inf: least squares); spread [F, P].
    """

    law: Law
    x: Inputs
    y: np.ndarray
    delta: float
    spread: np.ndarray
    offset: np.ndarray
    lower: np.ndarray
    upper: np.ndarray

    def theta(self, free: np.ndarray) -> np.ndarray:
        """All parameters [S, P] of the law from the free ones [S, F]."""
        return free @ self.spread + self.offset

    def evaluate(self, free: np.ndarray, weights: np.ndarray) -> "Local":
        """Objective, gradient and both curvatures at `free` [S, F] with `weights` [S or 1, n]."""
        size = max(_BLOCK // len(self.y), 1)
        parts = [
            self._evaluate(free[i : i + size], weights[i : i + size] if len(weights) > 1 else weights)
            for i in range(0, len(free), size)
        ]
        return Local(*map(np.concatenate, zip(*parts, strict=True)))

    def _evaluate(self, free: np.ndarray, weights: np.ndarray) -> "Local":
        fitted, jacobian = self.law.with_jacobian(self.theta(free), self.x)
        jacobian = self.spread @ jacobian
        residual = fitted - self.y
        size = np.abs(residual)
        inside = size <= self.delta
        if np.isinf(self.delta):
            loss, slope, majorant = residual**2 / 2, residual, np.ones_like(residual)
        else:
            loss = np.where(inside, residual**2 / 2, self.delta * (size - self.delta / 2))
            slope = np.clip(residual, -self.delta, self.delta)
            majorant = np.where(inside, 1.0, self.delta / np.maximum(size, self.delta))
        transposed = jacobian.swapaxes(-1, -2)
        return Local(
            (weights * loss).sum(-1),
            (jacobian @ (weights * slope)[..., None])[..., 0],
            (jacobian * (weights * inside)[:, None]) @ transposed,
            (jacobian * (weights * majorant)[:, None]) @ transposed,
        )


class Local(NamedTuple):
    """The objective around a point of each member."""

    objective: np.ndarray  # [S]
    gradient: np.ndarray  # [S, F]
    newton: np.ndarray  # [S, F, F]
    majorant: np.ndarray  # [S, F, F]


class Solution(NamedTuple):
    """Where each member ended."""

    free: np.ndarray  # [S, F]
    objective: np.ndarray  # [S]
    converged: np.ndarray  # [S] bool: the next step would gain less than the tolerance times the objective


def minimise(problem: Problem, starts: np.ndarray, weights: np.ndarray, steps: int = 200) -> Solution:
    """Descends from every row of `starts` [S, F] under `weights`: [S, n], or [n] for all alike."""
    weights = np.atleast_2d(weights)
    free = np.clip(starts, problem.lower, problem.upper)
    objective, converged = np.empty(len(free)), np.zeros(len(free), bool)
    damping, active = np.ones(len(free)), np.arange(len(free))
    here = problem.evaluate(free, weights)
    for _ in range(steps):
        moved = np.clip(
            free[active] + _step(problem, free[active], here, damping), problem.lower, problem.upper
        )
        gain = -(here.gradient * (moved - free[active])).sum(-1)
        there = problem.evaluate(moved, weights[active] if len(weights) > 1 else weights)
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


def resume(problem: Problem, ends: Solution, weights: np.ndarray, which: np.ndarray) -> Solution:
    """`ends` with the members `which` [S] carried on, 25 times as long: valleys nearly flat take that."""
    if not which.any():
        return ends
    weights = np.atleast_2d(weights)
    more = minimise(problem, ends.free[which], weights[which] if len(weights) > 1 else weights, steps=5000)
    free, objective, converged = (part.copy() for part in ends)
    free[which], objective[which], converged[which] = more
    return Solution(free, objective, converged)


def _step(problem: Problem, free: np.ndarray, here: Local, damping: np.ndarray) -> np.ndarray:
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
