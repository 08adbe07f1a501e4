"""What a budget's curve misses of its minimum, from the law of N and D that all runs follow together."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from llm_jax.config import UserError
from llm_jax.scaling import laws, projection
from llm_jax.scaling.curves import Curve, curve_of, lowest_point
from llm_jax.scaling.objectives import objective
from llm_jax.scaling.posing import Choices, check_enough, pose
from llm_jax.scaling.tables import Points

_MOST = 0.25  # of ln N: a larger miss is no small correction, and is left alone


class Shape(NamedTuple):
    """Of a budget's curve: what to add to ln N, ln D and ln loss [3] of its minimum, and ln losses [n] of its
    runs, in the order of N, by a smooth curve that has its minimum there. why_none: why nothing is added.
    """

    correction: np.ndarray
    smooth: np.ndarray
    why_none: str = ""


def shapes(groups: list[pd.DataFrame], curves: list[Curve], method: str, window: int) -> list[Shape]:
    """The shape of each curve.

    A Chinchilla law is fitted to the runs that the curves pass, by variable projection. On its own losses of
    the same sizes, where the minimum is known, the same kind of curve is drawn: what it misses there it is
    taken to miss here. Moved to the minimum here, the law is the smooth curve: its curvature is that of all
    budgets together, and runs that a parabola leaves out lie on it too. Where the law can't be fitted, the
    curve is refused, or the miss is no small correction, nothing is added, and the smooth curve is the
    budget's own.
    """
    out = [Shape(np.zeros(3), _own(curve)) for curve in curves]
    pairs = [(group, curve) for group, curve in zip(groups, curves, strict=True) if not curve.refused]
    if not pairs:
        return out

    def none(why: str) -> list[Shape]:
        return [shape._replace(why_none=why) for shape in out]

    # As the curves have their runs, in the order of N; only those near a minimum show the skew there.
    frame = pd.concat([group.sort_values("N", kind="stable")[curve.used] for group, curve in pairs])
    try:
        law = laws.Chinchilla()
        weights = np.concatenate([curve.weights[curve.used] for _, curve in pairs])
        points = Points(frame, weights, np.arange(len(frame)))
        problem, data, _, names = pose(law, points, objective("l2", "raw"), Choices({}, {}, {}))
        if check_enough(problem, names):
            return none("the runs near the minima are too few for a law")
        ends = projection.solve(projection.project(problem, names), data)
    except UserError as error:
        return none(str(error))
    theta = problem.theta(ends.free[[ends.objective.argmin()]])

    def along(log_n: np.ndarray, log_d: np.ndarray) -> np.ndarray:
        return law.log_loss(theta, {"N": log_n, "D": log_d})[0]

    for index, (group, curve) in enumerate(zip(groups, curves, strict=True)):
        if curve.refused:
            continue
        group = group.sort_values("N", kind="stable")
        log_n, log_d = np.log(curve.sizes), np.log(curve.tokens)
        drawn = curve_of(group.assign(loss=np.exp(along(log_n, log_d))), method, window)
        if drawn.refused:
            out[index] = out[index]._replace(why_none=f"the law's own losses there have {drawn.refused}")
            continue
        # C = k N D with k nearly constant: ln D + ln N is a smooth function of ln N.
        (knots, place), sums = curve.knots, log_d + log_n
        grid = np.linspace(knots[0], knots[-1], 4001)
        tokens = np.interp(grid, knots, sums[np.unique(place, return_index=True)[1]]) - grid
        where, low = lowest_point(along(grid, tokens), grid)
        by = np.array([where, np.interp(where, grid, tokens), low]) - np.log([drawn.N, drawn.D, drawn.loss])
        if abs(by[0]) <= _MOST and knots[0] < where < knots[-1]:
            moved = np.log(curve.N) + by[0] - where
            smooth = along(log_n - moved, log_d + moved) + np.log(curve.loss) + by[2] - low
            out[index] = Shape(by, smooth)
        else:
            out[index] = out[index]._replace(why_none=f"it would move the minimum by {np.expm1(by[0]):+.0%}")
    return out


def _own(curve: Curve) -> np.ndarray:
    return np.log(curve.losses) if curve.coefficients is None else curve.parabola(np.log(curve.sizes))
