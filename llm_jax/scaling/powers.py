"""Power laws of compute through optima: what Approaches 1 and 2 come to."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_jax.scaling.results import Estimate, Optimum, estimate
from llm_jax.scaling.tables import Points

FORMULAS = "N_opt = k_N C^a, D_opt = k_D C^b, L_opt = k_L C^-c"


@dataclasses.dataclass(frozen=True)
class PowerLaws:
    """N_opt = k_N C^a, D_opt = k_D C^b, L_opt = k_L C^-c.

    lines [3, 2] and draws [S, 3, 2]: (slope, intercept) of ln N_opt, ln D_opt and ln L_opt over ln C. noise:
    of ln loss of one run, from `freedom` degrees of freedom.
    """

    lines: np.ndarray
    draws: np.ndarray
    noise: float
    freedom: int
    points: Points
    level: float
    conventions: Mapping[str, Any]
    warnings: tuple[str, ...]

    @property
    def parameters(self) -> dict[str, Estimate]:
        """Exponents a, b, c and coefficients k_N, k_D, k_L with intervals."""
        out = {}
        for index, (exponent, factor, sign) in enumerate(
            (("a", "k_N", 1), ("b", "k_D", 1), ("c", "k_L", -1))
        ):
            slopes, intercepts = sign * self.draws[:, index, 0], self.draws[:, index, 1]
            out[exponent] = estimate(sign * self.lines[index, 0], slopes, self.level)
            out[factor] = estimate(np.exp(self.lines[index, 1]), np.exp(intercepts), self.level)
        return out

    def optimum(self, C: float) -> Optimum:
        """N, D and loss of the best run at C FLOPs (a loss without asymptote; else fit one to `frontier`)."""
        at = np.array([np.log(C), 1.0])
        return Optimum(
            *(
                estimate(np.exp(line @ at), np.exp(draws @ at), self.level)
                for line, draws in zip(self.lines, self.draws.swapaxes(0, 1), strict=True)
            )
        )

    def extrapolate(self, N: float, D: float, C: float) -> tuple[float, np.ndarray]:
        """ln of the loss of the best run at C FLOPs, and its draws [S]."""
        at = np.array([np.log(C), 1.0])
        return float(self.lines[2] @ at), self.draws[:, 2] @ at

    @property
    def formula(self) -> str:
        return "L_opt = k_L C^-c"

    def common_json(self) -> dict[str, Any]:
        """What the JSON of both approaches has alike."""
        return {
            "schema": 1,
            "parameters": {name: e._asdict() for name, e in self.parameters.items()},
            "level": self.level,
            "bootstrap": len(self.draws),
            "points": len(self.points.frame),
            "excluded": [run._asdict() for run in self.points.excluded],
            "notes": list(self.points.notes),
            "conventions": dict(self.conventions),
            "warnings": list(self.warnings),
        }


def power_law(C: np.ndarray, value: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float]:
    """Exponent and coefficient of value = k C^exponent by (weighted) least squares of logarithms."""
    weights = None if weights is None else np.asarray(weights, float)
    logs = np.log(np.asarray(value, float))[None]
    slope, intercept = lines_through(np.log(np.asarray(C, float)), logs, weights)[0]
    return float(slope), float(np.exp(intercept))


def lines_through(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Slope and intercept [S, 2] of least-squares lines through y [S, n] over x [n], NaNs left out."""
    w = np.where(np.isfinite(y), 1.0 if weights is None else weights, 0.0)
    y = np.where(w > 0, y, 0.0)
    total = w.sum(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_x, mean_y = (w * x).sum(-1, keepdims=True) / total, (w * y).sum(-1, keepdims=True) / total
        slope = (w * (x - mean_x) * (y - mean_y)).sum(-1) / (w * (x - mean_x) ** 2).sum(-1)
    return np.stack([slope, mean_y[..., 0] - slope * mean_x[..., 0]], axis=-1)
