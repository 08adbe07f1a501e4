"""Refits that intervals come from: whole runs drawn with replacement.

How often the 90% intervals hold the truth was measured (`make coverage`). Plain percentiles of these refits
cover up to 98% for a narrow Huber loss, since few runs of a draw stand where an absolute deviation is
steered; `stretch` takes that back. Measured too and not on offer: bias corrections (BC and BCa, 82 to 98%, as
so few runs leave z0 noisy), residuals drawn anew (85 to 95%), their signs alone (76 to 87%).
"""

from collections.abc import Callable

import numpy as np

from llm_jax.scaling import solver
from llm_jax.scaling.solver import Data, Problem

Say = Callable[[str], None]  # what hears of progress
SPARE = 2  # runs beyond the parameters without which draws are the table itself, or nearly so
_DRAWN_IN = 5  # parameters; with fewer, plain percentiles hold
_WEIGHTS = 10**7  # of draws that are held at once
METHOD = "runs drawn with replacement; percentiles drawn in by the factor of `stretch`"


def draw(data: Data, clusters: np.ndarray, count: int, free: int, generator: np.random.Generator) -> Data:
    """`count` data sets: weights [S, n] of whole runs, rows of one of `clusters` [n] alike.

    A draw of fewer different runs than `free` parameters determines nothing and is drawn again.
    """
    runs = int(clusters.max()) + 1
    weights = np.empty((0, runs))
    while len(weights) < count:
        drawn = generator.multinomial(runs, np.full(runs, 1 / runs), size=count).astype(float)
        weights = np.concatenate([weights, drawn[(drawn > 0).sum(1) >= min(free, runs // 2)]])
    return data._replace(weights=data.weights * weights[:count, clusters])


def refits(
    problem: Problem, best: np.ndarray, data: Data, clusters: np.ndarray, count: int, seed: int, say: Say
) -> np.ndarray:
    """Free parameters [S, F] of refits to `count` draws, each from `best` [1, F].

    Those that never converge are left out. Large tables are drawn in blocks, and say how far they are.
    """
    generator, at_once = np.random.default_rng(seed), max(_WEIGHTS // data.y.size, 1)
    found, done = [best[:0]], 0
    while done < count:
        size = min(at_once, count - done)
        drawn = draw(data, clusters, size, best.shape[1], generator)
        ends = solver.narrowed(problem, np.repeat(best, size, axis=0), drawn)
        found.append(ends.free[ends.converged])
        done += size
        if at_once < count:
            say(f"{done:,} of {count:,} refits")
    return np.concatenate(found)


def stretch(problem: Problem, best: np.ndarray, data: Data, runs: int) -> float:
    """What the draws' distance from the estimate is multiplied by: 1 for least squares, (1 - p/n)^2 for
    absolute deviations, with p free parameters and n runs.

    A Huber loss lies between them by the share of runs within its bound, without the p that every fit passes
    through. The power was found by simulation, on runs of one row each; where they have several, or are
    fewer than twice the parameters, or the parameters fewer than five, it is 1, since plain percentiles hold
    there (LOG.md). The factor nears 1 where runs are many.
    """
    residual, free = problem.residuals(best, data)[0], best.shape[1]
    if runs < residual.size or runs < 2 * free or free < _DRAWN_IN:
        return 1.0
    inside = int((np.abs(residual) <= problem.objective.delta * (1 + 1e-6)).sum())
    squares = max(inside - free, 0) / max(residual.size - free, 1)
    return float(max(1 - free / runs, 0.5) ** (2 * (1 - squares)))


def one_run(draws: np.ndarray, noise: float, freedom: int, seed: int = 0) -> np.ndarray:
    """Draws of one more measured ln loss: those of the law [S] and the noise of a run as Student's t on
    top.
    """
    many = np.repeat(draws, 40)
    return many + noise * np.random.default_rng(seed).standard_t(max(freedom, 1), size=len(many))
