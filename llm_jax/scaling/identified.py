"""How well the runs of a fit determine the optimum that is asked for, by the law's derivatives.

A condition number tells of parameters, which may trade places without moving any optimum. Here the noise of
a run is carried through the Jacobian to the exponent of N_opt ~ C^a and to N_opt at a budget (delta method).
"""

from typing import NamedTuple

import numpy as np

from llm_jax.scaling.results import Fit

_Z = 1.645  # of a normal 90% interval
_EXPONENT, _FACTOR = 0.15, 2.0  # half-widths that make an optimum a guess


class Known(NamedTuple):
    """Half of the 90% interval of the exponent, and the factor that N_opt at C is known to."""

    C: float
    exponent: float
    factor: float

    @property
    def doubt(self) -> str:
        """What to say where the runs hardly tell the optimum; "" elsewhere."""
        if self.exponent <= _EXPONENT and self.factor <= _FACTOR:
            return ""
        by = f"to a factor of {self.factor:.1f}" if self.factor < 100 else "to no factor of 100"
        return (
            f"the runs hardly tell the optimum: by the law's derivatives its exponent is known to "
            f"{self.exponent:.2f} and N_opt at {self.C:.2g} FLOPs {by} (90%)"
        )


def of_optimum(fit: Fit, C: float) -> Known | None:
    """What is known of the optimum at C; None where the law has none or no noise is known."""
    problem, noise = fit.problem, fit.noise
    if set(fit.law.inputs) != {"N", "D"} or not noise > 0:
        return None
    jacobian = problem.spread @ fit.law.with_jacobian(fit.theta[None], problem.x)[1][0]
    jacobian = jacobian * np.sqrt(fit.points.weights)
    moves = np.sqrt((jacobian**2).mean(1)) > 0
    inside = (fit.best[0] > problem.lower) & (fit.best[0] < problem.upper) & moves
    steps = np.where(inside, 1e-3, 0.0)

    def logs(free: np.ndarray) -> np.ndarray:
        """The exponent and ln N_opt at C [S, 2]."""
        N = [
            np.log(fit.law.optimum(problem.theta(free), at, fit.conventions["flops_per_nd"])[0])
            for at in (C, C / 10)
        ]
        return np.stack([(N[0] - N[1]) / np.log(10), N[0]], axis=1)

    by = np.diag(steps)[inside]
    slopes = (logs(fit.best + by) - logs(fit.best - by)) / 2e-3  # [F, 2]
    scale = np.linalg.norm(jacobian[inside], axis=1)
    unit = jacobian[inside] / scale[:, None]
    try:
        covariance = noise**2 * np.linalg.inv(unit @ unit.T) / np.outer(scale, scale)
    except np.linalg.LinAlgError:
        return Known(C, np.inf, np.inf)
    variance = np.einsum("fq,fg,gq->q", slopes, covariance, slopes)
    exponent, size = _Z * np.sqrt(np.maximum(variance, 0))
    return Known(C, float(exponent), float(np.exp(min(size, 100.0))))
