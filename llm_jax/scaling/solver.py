"""Many small robust fits at once: damped Newton steps for S members, vectorised in numpy, float64.

minimise over theta  sum_i w_i rho(fitted_i(theta) - measured_i), each member with its own start, measured
values and weights (a bootstrap draw is a vector of counts, or of noisy values). A Huber loss curves by 1
inside delta and 0 outside, which alone is singular far from the optimum; min(1, delta/|r|), the weight of
iterated least squares, majorises the loss and always descends. The damping moves between the two: slow and
safe where it is large, Newton where it is 0.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from llm_jax.scaling.laws import Inputs, Law
from llm_jax.scaling.objectives import Objective

_BLOCK = 2**13  # members times points whose Jacobians stay in the processor's cache
_NARROWING = 8.0  # how much narrower each stage of `narrowed` is; kinks stop descents from far away
_WIDE = 1e-3
_DESCENTS = 3


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

    def bend(self, free: np.ndarray, step: np.ndarray, data: Data, damping: np.ndarray) -> np.ndarray:
        """What a step [S, F] finds beyond the first order, as a gradient [S, F]."""
        ...


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

    def bend(self, free: np.ndarray, step: np.ndarray, data: Data, damping: np.ndarray) -> np.ndarray:
        """The residuals' second derivatives along `step`, weighed as curvatures are: J' W r_vv."""
        share = 0.03  # of the step: enough for a finite difference
        before, jacobian = self.residuals(free, data)
        after, _ = self.residuals(free + share * step, data)
        second = 2 / share * ((after - before) / share - (step[:, None] @ jacobian)[:, 0])
        _, _, curvature, majorant = self.objective.parts(before)
        mixed = np.maximum(curvature, np.minimum(damping, 1.0)[:, None] * majorant)
        return (jacobian @ (data.weights * mixed * second)[..., None])[..., 0]

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


def minimise(
    problem: Descent, starts: np.ndarray, data: Data, steps: int = 200, curved: bool = False
) -> Solution:
    """Descends from every row of `starts` [S, F].

    curved: by steps that follow a bending valley, the geodesic acceleration of Transtrum and Sethna 2012:
    twice the work, and a tenth of the steps where parameters trade places with each other.
    """
    free = np.clip(starts, problem.lower, problem.upper)
    objective, converged = np.empty(len(free)), np.zeros(len(free), bool)
    damping, active, better = np.ones(len(free)), np.arange(len(free)), np.ones(len(free), bool)
    here = problem.evaluate(free, data)
    for _ in range(steps):
        at, these = free[active], data.of(active)
        solve = _solver(problem, at, here, damping)
        step = solve(here.gradient)
        gain = -(here.gradient * (np.clip(at + step, problem.lower, problem.upper) - at)).sum(-1)
        if curved:
            bend = solve(problem.bend(at, step, these, damping)) / 2
            scale = np.sqrt(np.diagonal(here.majorant, axis1=1, axis2=2))
            mild = np.linalg.norm(scale * bend, axis=-1) <= 0.75 * np.linalg.norm(scale * step, axis=-1)
            step = np.where(_like(mild & better, step), step + bend, step)
        moved = np.clip(at + step, problem.lower, problem.upper)
        there = problem.evaluate(moved, these)
        better = there.objective < here.objective
        free[active[better]] = moved[better]
        here = Local(*(np.where(_like(better, new), new, old) for new, old in zip(there, here, strict=True)))
        objective[active] = here.objective
        # Relative to the objective, whose scale may be 1e-3 or 1e-25; the last term is for an exact 0.
        converged[active] = gain <= 1e-13 * here.objective + 1e-300
        damping = np.where(better, damping / 4, np.maximum(damping, 1e-6) * 8)
        damping = np.where(damping < 1e-9, 0.0, damping)
        stay = ~converged[active] & (damping < 1e12)
        active, damping, better = active[stay], damping[stay], better[stay]
        here = Local(*(part[stay] for part in here))
        if not len(active):
            break
    return Solution(free, objective, converged)


def resume(problem: Descent, ends: Solution, data: Data, which: np.ndarray) -> Solution:
    """`ends` with the members `which` [S] carried on: valleys nearly flat take that.

    A step may seem to gain nothing only because it was damped at a kink, so a descent that found something
    lower is begun again, a few times at most.
    """
    free, objective, converged = (part.copy() for part in ends)
    going = np.flatnonzero(which)
    for _ in range(_DESCENTS):
        if not len(going):
            break
        more = minimise(problem, free[going], data.of(going), steps=1000, curved=True)
        before = objective[going]
        free[going], objective[going], converged[going] = more
        going = going[more.objective < (1 - 1e-9) * before]
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


def _solver(
    problem: Descent, free: np.ndarray, here: Local, damping: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """gradient [S, F] -> damped step [S, F]; a parameter at its bound that would leave it stays."""
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
    return lambda gradient: -np.linalg.solve(matrix, np.where(keep, gradient, 0.0)[..., None])[..., 0]


def _like(mask: np.ndarray, array: np.ndarray) -> np.ndarray:
    return mask.reshape(mask.shape + (1,) * (array.ndim - mask.ndim))
