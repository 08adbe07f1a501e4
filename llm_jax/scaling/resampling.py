"""Refits that intervals come from: runs reweighted, or residuals drawn anew.

Both were chosen by how often their 90% intervals cover (`make coverage`). Percentiles of runs drawn with
replacement cover up to 98% for a narrow Huber loss, as few runs of a draw stand where the law is steered.
"""

from statistics import NormalDist

import numpy as np

from llm_jax.config import UserError, nearest
from llm_jax.scaling import solver
from llm_jax.scaling.solver import Data, Problem

KINDS = {
    "runs": "runs reweighted at random (Rubin's Bayesian bootstrap), bias-corrected percentiles",
    "residuals": "residuals drawn anew, scaled by n/(n - parameters), percentiles",
}


def check(kind: str) -> None:
    if kind not in KINDS:
        raise UserError(f"--intervals={kind}: {nearest(kind, KINDS)}")


def draw(
    problem: Problem, best: np.ndarray, data: Data, clusters: np.ndarray, kind: str, count: int, seed: int
) -> solver.Data:
    """`count` data sets: weights [S, n] of whole runs (rows of one of `clusters` [n] alike), or values [S,
    n].
    """
    generator = np.random.default_rng(seed)
    if kind == "runs":
        groups = clusters.max() + 1
        return data._replace(
            weights=data.weights * (generator.dirichlet(np.ones(groups), count) * groups)[:, clusters]
        )
    fitted = problem.law.log_loss(problem.theta(best), problem.x)[0]
    n, freedom = len(fitted), max(len(fitted) - best.shape[1], 1)
    # Once for the parameters spent, once because a fit by absolute deviations passes through as many points.
    residuals = (data.y[0] - fitted) * n / freedom
    return data._replace(y=fitted + generator.choice(residuals, (count, n)))


def refits(problem: Problem, best: np.ndarray, drawn: Data, count: int) -> np.ndarray:
    """Free parameters [S, F] of refits, each from `best` [1, F]; those that never converge are left out."""
    if not count:
        return best[:0]
    ends = solver.narrowed(problem, np.repeat(best, count, axis=0), drawn)
    return ends.free[ends.converged]


def corrected(value: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """`draws` [S, ...] moved so that their plain percentiles are the bias-corrected ones (Efron 1987) of
    `value`.

    A draw of rank u goes to the quantile Phi(2 z0 + Phi^-1(u)), z0 that of `value` among the draws.
    """
    count = len(draws)
    if count < 2:
        return draws
    ordered = np.sort(draws, axis=0)
    below = ((draws < value).mean(0) + (draws <= value).mean(0)) / 2
    normal = NormalDist()
    ranks = np.array([normal.inv_cdf(u) for u in (np.arange(count) + 0.5) / count])
    shift = 2 * np.vectorize(normal.inv_cdf)(np.clip(below, 0.05, 0.95))
    place = np.vectorize(normal.cdf)(ranks.reshape(-1, *([1] * np.ndim(shift))) + shift) * count - 0.5
    place = np.clip(place, 0, count - 1)
    lower = np.floor(place).astype(int)
    upper = np.minimum(lower + 1, count - 1)
    low, high = (np.take_along_axis(ordered, part, axis=0) for part in (lower, upper))
    return low + (place - lower) * (high - low)


def one_run(draws: np.ndarray, noise: float, freedom: int, seed: int = 0) -> np.ndarray:
    """Draws of one more measured ln loss: those of the law [S] and the noise of a run as Student's t on
    top.
    """
    many = np.repeat(draws, 40)
    return many + noise * np.random.default_rng(seed).standard_t(max(freedom, 1), size=len(many))
