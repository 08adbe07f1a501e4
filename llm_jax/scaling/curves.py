"""One budget of an isoFLOP sweep: a curve of ln(loss) over ln(N), its minimum, or the reason it has none."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from scipy.interpolate import Akima1DInterpolator

METHODS = {
    "local": "parabola through the sizes around the lowest, its vertex corrected for the law's skew",
    "parabola": "parabola through the sizes around the lowest",
    "akima": "Akima interpolation of all sizes",
    "full": "parabola through all sizes",
}
_AKIMA_POINTS = 25  # per interval (Porian et al. 2024)


@dataclasses.dataclass(frozen=True)
class Curve:
    """One budget's runs and the minimum found among them.

    C: geometric mean of the runs' FLOPs (or the budget they were planned for). sizes, tokens, losses: [n] of
    its runs; used [n]: which of them the curve passes. coefficients: of ln(loss) = c0 + c1 u + c2 u^2 with
    u = ln N - center (None for Akima). N, D, loss: at the minimum, NaN where `refused` says why not. half:
    sizes to each side of the lowest that a local parabola passes; 0 where all are.
    """

    C: float
    sizes: np.ndarray
    tokens: np.ndarray
    losses: np.ndarray
    used: np.ndarray
    center: float
    coefficients: tuple[float, float, float] | None
    N: float
    D: float
    loss: float
    refused: str = ""
    half: int = 0

    def predict(self, N: np.ndarray) -> np.ndarray:
        """The curve's loss at sizes N, within the range of the runs it passes; NaN outside."""
        x, passed = np.log(np.asarray(N, float)), np.log(self.sizes[self.used])
        inside = (x >= passed.min() - 1e-9) & (x <= passed.max() + 1e-9)
        if self.coefficients is None:
            y = _akima(np.log(self.sizes), np.log(self.losses))(x)
        else:
            y = np.polynomial.polynomial.polyval(x - self.center, self.coefficients)
        return np.where(inside, np.exp(y), np.nan)


def curve_of(group: pd.DataFrame, method: str, window: int) -> Curve:
    """The curve through one budget's runs (columns N, D, C, loss, perhaps budget_flops), by one of METHODS.

    window: sizes that a local parabola passes, half of them on each side of the lowest.
    """
    group = group.sort_values("N", kind="stable")
    column = "budget_flops" if "budget_flops" in group else "C"
    sizes, tokens, losses = (group[name].to_numpy(float) for name in ("N", "D", "loss"))
    means = group.groupby("N")["loss"].mean()  # seeds of one size
    distinct, lowest = means.index.to_numpy(float), int(np.argmin(means))
    used, half = np.ones(len(sizes), bool), window // 2 if method in ("local", "parabola") else 0
    if half:
        near = distinct[max(lowest - half, 0) : lowest + half + 1]
        used = (near[0] <= sizes) & (near[-1] >= sizes)
    C, center = float(np.exp(np.log(group[column]).mean())), float(np.log(distinct[lowest]))
    curve = Curve(C, sizes, tokens, losses, used, center, None, np.nan, np.nan, np.nan, half=half)
    if method != "akima":
        fitted = np.polynomial.polynomial.polyfit(np.log(sizes[used]) - center, np.log(losses[used]), 2)
        curve = dataclasses.replace(curve, coefficients=tuple(map(float, fitted)))
    if lowest in (0, len(distinct) - 1):
        side, beyond = ("smallest", "below") if lowest == 0 else ("largest", "above")
        reason = f"the {side} size is the best, the minimum may lie {beyond} it"
        return dataclasses.replace(curve, refused=reason)
    if curve.coefficients and curve.coefficients[2] <= 0:
        return dataclasses.replace(curve, refused="the parabola is concave")
    if curve.coefficients:
        minimum = _vertices(curve, used, np.array([curve.coefficients]))[0]
    else:
        minimum = redraw(curve, np.zeros((1, len(sizes))))[0]
    if np.isnan(minimum).any():
        return dataclasses.replace(curve, refused="the vertex lies outside the sizes it was fitted to")
    N, D, loss = map(float, np.exp(minimum))
    return dataclasses.replace(curve, N=N, D=D, loss=loss)


def redraw(curve: Curve, noise: np.ndarray) -> np.ndarray:
    """ln of N, D and loss [S, 3] at the minimum when `noise` [S, n] is added; NaN where there is none.

    What a local parabola passes is chosen anew: with other noise another size is the lowest.
    """
    x, y = np.log(curve.sizes), np.log(curve.losses)
    knots, place = np.unique(x, return_inverse=True)
    if curve.coefficients is None:
        at = np.linspace(knots[0], knots[-1], _AKIMA_POINTS * (len(knots) - 1))
        values = _akima(x, y + noise)(at)  # [grid, S]
        best = values.argmin(0)
        inside = (best > 0) & (best < len(at) - 1)
        found = np.stack([at[best], _tokens(curve, at[best]), values.min(0)], axis=1)
        return np.where(inside[:, None], found, np.nan)
    fitted = np.polynomial.polynomial.polyval(x - curve.center, curve.coefficients)
    values = np.where(curve.used, fitted, y) + noise
    means = np.stack([values[:, place == knot].mean(-1) for knot in range(len(knots))], axis=1)
    lowest = means.argmin(1) if curve.half else np.zeros(len(values), int)
    out = np.full((len(values), 3), np.nan)
    for knot in np.unique(lowest):
        if curve.half and knot in (0, len(knots) - 1):
            continue
        used = np.abs(place - knot) <= curve.half if curve.half else curve.used
        solve = np.linalg.pinv(np.vander(x[used] - curve.center, 3, increasing=True))
        out[lowest == knot] = _vertices(curve, used, values[lowest == knot][:, used] @ solve.T)
    return out


def _vertices(curve: Curve, used: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """ln of N, D and loss [S, 3] at the vertices of parabolas [S, 3]; NaN outside the sizes they pass."""
    c0, c1, c2 = coefficients.T
    u = np.log(curve.sizes[used]) - curve.center
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = -c1 / (2 * c2)
    inside = (c2 > 0) & (vertex >= u.min()) & (vertex <= u.max())
    where = vertex + curve.center
    found = np.stack([where, _tokens(curve, where), c0 + c1 * vertex / 2], axis=1)
    return np.where(inside[:, None], found, np.nan)


def _tokens(curve: Curve, log_n: np.ndarray) -> np.ndarray:
    """ln D of the budget at ln N."""
    sizes, first = np.unique(np.log(curve.sizes), return_index=True)
    return np.interp(log_n, sizes, np.log(curve.tokens)[first])


def shifted(curve: Curve, by: np.ndarray) -> Curve:
    """The curve with its minimum moved by `by` [3], of ln N, ln D and ln loss."""
    if curve.refused:
        return curve
    N, D, loss = map(float, np.exp(np.log([curve.N, curve.D, curve.loss]) + by))
    return dataclasses.replace(curve, N=N, D=D, loss=loss)


def scaled_residuals(curve: Curve, window: int) -> np.ndarray:
    """Residuals of the curve's parabola (a local one for Akima), scaled up for the coefficients spent."""
    used = curve.used
    if curve.coefficients is None:
        used = localised(curve, window).used
    u, y = np.log(curve.sizes[used]) - curve.center, np.log(curve.losses[used])
    design = np.vander(u, 3, increasing=True)
    hat = design @ np.linalg.pinv(design)
    left = 1 - np.diagonal(hat)
    return ((y - hat @ y) / np.sqrt(np.maximum(left, 1e-12)))[left > 1e-6] if len(u) > 3 else np.empty(0)


def localised(curve: Curve, window: int) -> Curve:
    """The same runs under a local parabola."""
    runs = {"N": curve.sizes, "D": curve.tokens, "C": curve.C, "loss": curve.losses}
    return curve_of(pd.DataFrame(runs), "parabola", window)


def lowest_point(values: np.ndarray, grid: np.ndarray) -> tuple[float, float]:
    """Where and how low the parabola through the lowest of `values` [n] over an even `grid` and its
    neighbours is.
    """
    best = int(np.clip(values.argmin(), 1, len(grid) - 2))
    left, here, right = values[best - 1 : best + 2]
    step = (left - right) / (2 * (left - 2 * here + right))
    return float(grid[best] + step * (grid[1] - grid[0])), float(here - (left - right) * step / 4)


def _akima(x: np.ndarray, y: np.ndarray) -> "Akima1DInterpolator":
    """Akima's spline through the means of each size; y [..., n] gives values [grid, ...]."""
    from scipy.interpolate import Akima1DInterpolator  # half a second, and few ask for it

    knots, place = np.unique(x, return_inverse=True)
    means = np.stack([y[..., place == i].mean(-1) for i in range(len(knots))])
    return Akima1DInterpolator(knots, means, extrapolate=True)
