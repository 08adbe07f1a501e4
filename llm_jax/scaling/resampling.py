"""Refits that intervals come from: runs reweighted, or residuals drawn anew.

Both were chosen by how often their 90% intervals cover (`make coverage`). Percentiles of runs drawn with
replacement cover up to 98% for a narrow Huber loss and 81% for least squares: whole runs come and go, and
few stand where an absolute deviation is steered. So weights differ by a half here, which moves a fit as
far whatever its loss, and the draws are spread again by what that leaves out (`stretch`).
"""

import numpy as np

from llm_jax.config import UserError, nearest
from llm_jax.scaling import solver
from llm_jax.scaling.solver import Data, Problem

_SHAPE = 4.0  # of the Dirichlet weights: their deviation is 1/2

KINDS = {
    "runs": "runs reweighted by Dirichlet(4), spread by 2 sqrt(n/(n - parameters)), percentiles",
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
            weights=data.weights * (generator.dirichlet(np.full(groups, _SHAPE), count) * groups)[:, clusters]
        )
    if clusters.max() + 1 < len(clusters):
        raise UserError(
            f"--intervals=residuals takes each row for a run of its own; {len(clusters)} rows are of "
            f"{clusters.max() + 1} runs here, take --intervals=runs"
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


def stretch(kind: str, runs: int, free: int) -> float:
    """What the draws' distance from the estimate is multiplied by.

    Weights of deviation 1/2 for those of 1 that a run drawn with replacement has; and sqrt(n/(n - p)), as
    the residuals that steer the refits were shrunk by p fitted parameters (HC1 of MacKinnon and White 1985).
    """
    return 1.0 if kind != "runs" else float(np.sqrt(_SHAPE / max(1 - free / runs, 0.5)))


def one_run(draws: np.ndarray, noise: float, freedom: int, seed: int = 0) -> np.ndarray:
    """Draws of one more measured ln loss: those of the law [S] and the noise of a run as Student's t on
    top.
    """
    many = np.repeat(draws, 40)
    return many + noise * np.random.default_rng(seed).standard_t(max(freedom, 1), size=len(many))
