"""What a parabola misses of a skewed isoFLOP curve, from the law of N and D that all runs follow together."""

import numpy as np
import pandas as pd

from llm_jax.config import UserError
from llm_jax.scaling import laws, projection
from llm_jax.scaling.curves import Curve, curve_of, lowest_point
from llm_jax.scaling.objectives import objective
from llm_jax.scaling.posing import Choices, check_enough, pose
from llm_jax.scaling.tables import Points

_MOST = 0.25  # of ln N: a larger miss is no small correction, and is left alone


def skew(groups: list[pd.DataFrame], curves: list[Curve], window: int) -> np.ndarray:
    """What to add to ln N, ln D and ln loss [n, 3] of each curve's vertex.

    A Chinchilla law is fitted to the runs that the parabolas pass, by variable projection. On its own curve
    through the same sizes, where the minimum is known, the same parabola is drawn: what it misses there it
    is taken to miss here. Zero where the law can't be fitted, the curve is refused, or the miss is no small
    correction.
    """
    out = np.zeros((len(curves), 3))
    pairs = [(group, curve) for group, curve in zip(groups, curves, strict=True) if not curve.refused]
    if not pairs:
        return out
    # As the curves have their runs, in the order of N; only those near a minimum show the skew there.
    frame = pd.concat([group.sort_values("N", kind="stable")[curve.used] for group, curve in pairs])
    try:
        law = laws.Chinchilla()
        points = Points(frame, np.ones(len(frame)), np.arange(len(frame)))
        problem, data, _, names = pose(law, points, objective("l2", "raw"), Choices({}, {}, {}))
        if check_enough(problem, names):
            return out
        ends = projection.solve(projection.project(problem, names), data)
    except UserError:
        return out
    theta = problem.theta(ends.free[[ends.objective.argmin()]])
    for index, (group, curve) in enumerate(zip(groups, curves, strict=True)):
        if curve.refused:
            continue
        log_n, log_d = np.log(group["N"].to_numpy(float)), np.log(group["D"].to_numpy(float))
        made = np.exp(law.log_loss(theta, {"N": log_n, "D": log_d})[0])
        drawn = curve_of(group.assign(loss=made), "parabola", window)
        if drawn.refused:
            continue
        # C = k N D with k nearly constant: ln D + ln N is a smooth function of ln N.
        knots, first = np.unique(log_n, return_index=True)
        grid = np.linspace(knots[0], knots[-1], 4001)
        along = np.interp(grid, knots, (log_d + log_n)[first]) - grid
        where, low = lowest_point(law.log_loss(theta, {"N": grid, "D": along})[0], grid)
        at = float(np.interp(where, grid, along))
        by = np.array([where, at, low]) - np.log([drawn.N, drawn.D, drawn.loss])
        if abs(by[0]) <= _MOST and knots[0] < where < knots[-1]:
            out[index] = by
    return out
