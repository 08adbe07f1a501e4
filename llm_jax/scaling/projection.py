"""Variable projection (Golub and Pereyra 1973): the exponents are searched, the coefficients solved for.

For a sum of powers and residuals of L itself, the best coefficients of given exponents are a non-negative
linear least-squares problem, so the search runs over two numbers instead of five. Its optimum is that of
Approach 3 with --loss=l2 --on=raw; the way there needs no luck with starts.
"""

import dataclasses
import itertools

import numpy as np

from llm_jax.config import UserError
from llm_jax.scaling.law import SumOfPowers
from llm_jax.scaling.solver import Data, Local, Problem, Solution, minimise, resume


@dataclasses.dataclass(frozen=True)
class Projected:
    """The part of `problem` that is left once its free coefficients are solved for: the free exponents [S,
    K].
    """

    problem: Problem
    linear: np.ndarray  # which free parameters are coefficients [F] bool
    anchor: np.ndarray  # [F]: any value of the coefficients

    @property
    def lower(self) -> np.ndarray:
        return self.problem.lower[~self.linear]

    @property
    def upper(self) -> np.ndarray:
        return self.problem.upper[~self.linear]

    def complete(self, exponents: np.ndarray, data: Data) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All free parameters [S, F], the columns of the coefficients [S, K, n] at them, and the residuals
        [S, n].
        """
        free = np.repeat(self.anchor[None], len(exponents), axis=0)
        free[:, ~self.linear] = exponents
        law, x = self.problem.law, self.problem.x
        theta = self.problem.theta(free)
        logs = np.stack(law.logs(theta, x), axis=1)  # [S, terms, n], with the anchors' coefficients
        places = [law.places[name] for name, _ in law.terms]
        mine = (self.problem.spread[self.linear][:, places] > 0).astype(float)  # [K, terms]
        rest = (np.exp(logs) * (mine.sum(0) == 0)[:, None]).sum(1)  # terms of fixed coefficients
        columns = mine @ np.exp(logs - theta[:, places][:, :, None])
        target = np.exp(data.y) - rest
        coefficients = _non_negative(columns, target, data.weights)
        with np.errstate(divide="ignore"):
            logged = np.log(coefficients)
        free[:, self.linear] = np.clip(
            logged, self.problem.lower[self.linear], self.problem.upper[self.linear]
        )
        residual = (coefficients[:, :, None] * columns).sum(1) - target
        return free, columns, residual

    def evaluate(self, exponents: np.ndarray, data: Data) -> Local:
        """Objective, gradient and Kaufman's curvature of the projected problem."""
        free, columns, residual = self.complete(exponents, data)
        jacobian = self.problem.residuals(free, data)[1][:, ~self.linear]
        root = np.sqrt(np.broadcast_to(data.weights, residual.shape))
        columns, jacobian, residual = columns * root[:, None], jacobian * root[:, None], residual * root
        held = columns * (free[:, self.linear] > self.problem.lower[self.linear])[:, :, None]
        # What of the exponents' effect the coefficients can't undo.
        inner = jacobian - (jacobian @ np.linalg.pinv(held)) @ held
        curvature = inner @ inner.swapaxes(-1, -2)
        gradient = (jacobian @ residual[..., None])[..., 0]
        return Local((residual**2).sum(-1) / 2, gradient, curvature, curvature)

    def bend(self, free: np.ndarray, step: np.ndarray, data: Data, damping: np.ndarray) -> np.ndarray:
        """None: what bends a valley most are trades with coefficients, which are solved for here."""
        return np.zeros_like(free)


def project(problem: Problem, names: list[str]) -> Projected:
    """The projected problem; UserError for laws, ties and bounds that it can't take."""
    law = problem.law
    if not isinstance(law, SumOfPowers):
        raise UserError(
            f"variable projection needs a sum of powers; {law.formula} is none, take --approach=3"
        )
    coefficients = {name for name, _ in law.terms}
    linear = np.array([name in coefficients for name in names])
    if not linear.any() or linear.all():
        kind = "coefficient" if not linear.any() else "exponent"
        raise UserError(f"variable projection needs a free {kind}; take --approach=3")
    return Projected(problem, linear, np.clip(0.0, problem.lower, problem.upper))


def solve(projected: Projected, data: Data, start: np.ndarray | None = None) -> Solution:
    """The best of a grid of exponents, or each member from `start` [S, F], as free parameters of the whole
    problem.
    """
    problem = projected.problem
    exponents = ~projected.linear
    if start is None:
        axes = [
            np.clip(np.linspace(0.05, 1.25, 9), low, high)
            for low, high in zip(problem.lower[exponents], problem.upper[exponents], strict=True)
        ]
        begin = np.array(list(itertools.product(*axes)))
    else:
        begin = start[:, exponents]
    ends = minimise(projected, begin, data)
    ends = resume(
        projected,
        ends,
        data,
        ~ends.converged & (ends.objective <= 1.01 * ends.objective.min())
        if start is None
        else ~ends.converged,
    )
    return ends._replace(free=projected.complete(ends.free, data)[0])


def _non_negative(columns: np.ndarray, target: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Coefficients [S, K] >= 0 of the weighted least squares; the best of all subsets that may be
    positive.
    """
    members, count, _ = columns.shape
    root = np.sqrt(np.broadcast_to(weights, (members, columns.shape[-1])))
    columns, target = columns * root[:, None], np.broadcast_to(target, root.shape) * root
    scale = np.sqrt((columns**2).sum(-1)) + 1e-300
    unit = columns / scale[..., None]
    best, lowest = np.zeros((members, count)), np.full(members, np.inf)
    for chosen in itertools.product((True, False), repeat=count):
        mask = np.array(chosen, float)
        part = unit * mask[:, None]
        found = (np.linalg.pinv(part.swapaxes(-1, -2), rcond=1e-13) @ target[..., None])[..., 0]
        left = (found[..., None] * part).sum(1) - target
        value = np.where((found >= 0).all(-1), (left**2).sum(-1), np.inf)
        better = value < lowest
        best[better], lowest[better] = found[better], value[better]
        if np.isfinite(lowest).all() and all(chosen):
            break
    return best / scale
