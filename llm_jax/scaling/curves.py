"""One budget of an isoFLOP sweep: a curve of ln(loss) over ln(N), its minimum, or the reason it has none."""

import dataclasses
import functools
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from llm_jax.scaling.tables import name_of

if TYPE_CHECKING:
    from scipy.interpolate import Akima1DInterpolator

METHODS = {
    "local": "parabola through the sizes around the lowest, corrected for the skew of Chinchilla's law",
    "parabola": "parabola through the sizes around the lowest",
    "akima": "Akima interpolation of all sizes, the lowest of 25 points an interval (Porian et al.)",
    "akima-exact": "Akima interpolation of all sizes, its exact minimum",
    "full": "parabola through all sizes",
}
_GRID = 25  # points an interval that "akima" looks at, as Porian et al. 2024 do: steps of some percent of N
UNFITTED = {  # conventions of local parabolas that no power law was laid through
    "method": "parabola",
    "window": 5,
    "on": "of ln loss over ln N",
    "reduction": "least squares, each run of weight 1",
    "flops_per_nd": 6.0,
    "where": None,
}
_BELOW = 0.05  # of the lowest loss: no local parabola through a budget's runs goes that far below them
WEIGHT = "weight of the run"  # the column that `curve_of` reads weights from, if it is there


@dataclasses.dataclass(frozen=True)
class Curve:
    """One budget's runs and the minimum found among them.

    C: geometric mean of the runs' FLOPs (or the budget they were planned for). sizes, tokens, losses,
    weights: [n] of its runs; used [n]: which of them the curve passes. coefficients: of ln(loss) = c0 + c1 u
    + c2 u^2 with u = ln N - center (None for Akima). N, D, loss: at the minimum, NaN where `refused` says why
    not. half: sizes to each side of the lowest that a local parabola passes; 0 where all are. grid: points an
    interval at which a spline is looked up; 0 for its exact minimum. names: of the runs.
    """

    C: float
    sizes: np.ndarray
    tokens: np.ndarray
    losses: np.ndarray
    weights: np.ndarray
    used: np.ndarray
    center: float
    coefficients: tuple[float, float, float] | None
    N: float
    D: float
    loss: float
    refused: str = ""
    half: int = 0
    grid: int = 0
    names: tuple[str, ...] = ()

    def predict(self, N: np.ndarray) -> np.ndarray:
        """The curve's loss at sizes N, within the range of the runs it passes; NaN outside."""
        x, passed = np.log(np.asarray(N, float)), np.log(self.sizes[self.used])
        inside = (x >= passed.min() - 1e-9) & (x <= passed.max() + 1e-9)
        y = _akima(self, np.log(self.losses))(x) if self.coefficients is None else self.parabola(x)
        return np.where(inside, np.exp(y), np.nan)

    def parabola(self, log_n: np.ndarray) -> np.ndarray:
        """ln of the loss at ln N, anywhere."""
        return np.polynomial.polynomial.polyval(log_n - self.center, self.coefficients)

    @functools.cached_property
    def knots(self) -> tuple[np.ndarray, np.ndarray]:
        """ln of the distinct sizes [K], and which of them each run has [n]."""
        return np.unique(np.log(self.sizes), return_inverse=True)

    def means(self, values: np.ndarray) -> np.ndarray:
        """The weighted mean of each size [..., K] of values [..., n]: seeds of one size."""
        knots, place = self.knots
        shares = (place[:, None] == np.arange(len(knots))) * self.weights[:, None]
        return values @ (shares / shares.sum(0))

    def solve(self, values: np.ndarray, used: np.ndarray) -> np.ndarray:
        """Coefficients [..., 3] of the parabolas through values [..., n] at the runs `used` [n]."""
        root = np.sqrt(self.weights[used])
        design = np.vander(np.log(self.sizes[used]) - self.center, 3, increasing=True)
        return (values[..., used] * root) @ np.linalg.pinv(design * root[:, None]).T


def curve_of(group: pd.DataFrame, method: str, window: int) -> Curve:
    """The curve through one budget's runs (columns N, D, C, loss, perhaps budget_flops and WEIGHT), by one of
    METHODS.

    window: sizes that a local parabola passes, half of them on each side of the lowest.
    """
    group = group.sort_values("N", kind="stable")
    column = "budget_flops" if "budget_flops" in group else "C"
    sizes, tokens, losses = (group[name].to_numpy(float) for name in ("N", "D", "loss"))
    weights = group[WEIGHT].to_numpy(float) if WEIGHT in group else np.ones(len(sizes))
    half = window // 2 if method in ("local", "parabola") else 0
    C, everything = float(np.exp(np.log(group[column]).mean())), np.ones(len(sizes), bool)
    names, none = tuple(name_of(group, label) for label in group.index), (np.nan, np.nan, np.nan)
    curve = Curve(C, sizes, tokens, losses, weights, everything, 0.0, None, *none, half=half, names=names)
    curve = dataclasses.replace(curve, grid=_GRID if method == "akima" else 0)
    (knots, place), y = curve.knots, np.log(losses)
    lowest = int(np.argmin(curve.means(y)))
    used = np.abs(place - lowest) <= half if half else everything
    curve = dataclasses.replace(curve, used=used, center=float(knots[lowest]))
    if not method.startswith("akima"):
        curve = dataclasses.replace(curve, coefficients=tuple(map(float, curve.solve(y, used))))
    if lowest in (0, len(knots) - 1):
        side, beyond = ("smallest", "below") if lowest == 0 else ("largest", "above")
        reason = f"the {side} size is the best, the minimum may lie {beyond} it"
        return dataclasses.replace(curve, refused=reason)
    if curve.coefficients and curve.coefficients[2] <= 0:
        return dataclasses.replace(curve, refused="the parabola is concave")
    if curve.coefficients:
        minimum = _vertices(curve, used, np.array([curve.coefficients]))[0]
    else:
        minimum = redraw(curve, y[None])[0]
    if not np.isfinite(minimum).all():
        return dataclasses.replace(curve, refused="the vertex lies outside the sizes it was fitted to")
    N, D, loss = map(float, np.exp(minimum))
    if half and loss < (1 - _BELOW) * losses.min():
        reason = (
            f"the parabola's minimum is {1 - loss / losses.min():.0%} below all runs; one may have diverged"
        )
        return dataclasses.replace(curve, refused=reason)
    return dataclasses.replace(curve, N=N, D=D, loss=loss)


def redraw(curve: Curve, values: np.ndarray) -> np.ndarray:
    """ln of N, D and loss [S, 3] at the minimum where the ln losses are `values` [S, n].

    What a local parabola passes is chosen anew: with other noise another size is the lowest. A draw without
    a minimum has N of 0 or infinity (ln N -inf or inf, ln D the other way): beyond the sizes on the side
    where it is lower; its loss is the one there.
    """
    knots, place = curve.knots
    if curve.coefficients is None:
        spline = _akima(curve, values)
        at, low = _on_grid(spline, curve.grid) if curve.grid else _lowest(spline)
        found = np.stack([at, _tokens(curve, at), low], axis=1)
        return _beyond(found, at == knots[0], at == knots[-1])
    means = curve.means(values)
    lowest = means.argmin(1) if curve.half else np.zeros(len(values), int)
    out = np.empty((len(values), 3))
    for knot in np.unique(lowest):
        mine = lowest == knot
        if curve.half and knot in (0, len(knots) - 1):
            edge = np.broadcast_to(knots[knot], mine.sum())
            found = np.stack([edge, _tokens(curve, edge), means[mine, knot]], axis=1)
            out[mine] = _beyond(found, np.full(len(found), knot == 0), np.full(len(found), knot > 0))
            continue
        used = np.abs(place - knot) <= curve.half if curve.half else curve.used
        out[mine] = _vertices(curve, used, curve.solve(values[mine], used))
    return out


def _on_grid(spline: "Akima1DInterpolator", points: int) -> tuple[np.ndarray, np.ndarray]:
    """Where and how low [S] splines are at the lowest of `points` an interval, between their ends."""
    at = np.linspace(spline.x[0], spline.x[-1], points * (len(spline.x) - 1))
    along = spline(at)
    return at[along.argmin(0)], along.min(0)


def _lowest(spline: "Akima1DInterpolator") -> tuple[np.ndarray, np.ndarray]:
    """Where and how low [S] splines are at their lowest: at a knot, or where a piece is flat and bends up."""
    a, b, c, d = spline.c  # [K-1, S] of a t^3 + b t^2 + c t + d
    starts, widths = spline.x[:-1, None], np.diff(spline.x)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        flat = -c / (b + np.sqrt(b**2 - 3 * a * c))
    flat = np.where((flat > 0) & (flat < widths), flat, 0.0)  # else the knot on the left
    at = np.concatenate([starts + flat, np.full((1, flat.shape[1]), spline.x[-1])])
    low = np.concatenate([d + flat * (c + flat * (b + flat * a)), spline(spline.x[-1:])])
    best = low.argmin(0)[None]
    return np.take_along_axis(at, best, 0)[0], np.take_along_axis(low, best, 0)[0]


def _vertices(curve: Curve, used: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """ln of N, D and loss [S, 3] at the vertices of parabolas [S, 3]; beyond the sizes they pass where they
    have none there.
    """
    c0, c1, c2 = coefficients.T
    u = np.log(curve.sizes[used]) - curve.center
    left, right = u.min(), u.max()
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = -c1 / (2 * c2)
    inside = (c2 > 0) & (vertex >= left) & (vertex <= right)
    falls = c1 + c2 * (left + right) < 0  # lower on the right than on the left
    at = np.where(inside, vertex, np.where(falls, right, left))
    found = np.stack([at + curve.center, _tokens(curve, at + curve.center), c0 + at * (c1 + at * c2)], axis=1)
    return _beyond(found, ~inside & ~falls, ~inside & falls)


def _beyond(found: np.ndarray, below: np.ndarray, above: np.ndarray) -> np.ndarray:
    """Minima [S, 3] with those `below` and `above` [S] the sizes put there."""
    sign = np.where(below, -np.inf, np.where(above, np.inf, 0.0))[:, None]
    return np.where(sign != 0, np.concatenate([sign, -sign, found[:, 2:]], axis=1), found)


def _tokens(curve: Curve, log_n: np.ndarray) -> np.ndarray:
    """ln D of the budget at ln N."""
    knots, place = curve.knots
    return np.interp(log_n, knots, np.log(curve.tokens)[np.unique(place, return_index=True)[1]])


def shifted(curve: Curve, by: np.ndarray) -> Curve:
    """The curve with its minimum moved by `by` [3], of ln N, ln D and ln loss."""
    if curve.refused:
        return curve
    N, D, loss = map(float, np.exp(np.log([curve.N, curve.D, curve.loss]) + by))
    return dataclasses.replace(curve, N=N, D=D, loss=loss)


def scaled_residuals(curve: Curve, window: int) -> np.ndarray:
    """Residuals of the curve's parabola (a local one for Akima) for a weight of 1, scaled up for the
    coefficients spent.
    """
    used = curve.used
    if curve.coefficients is None:
        used = localised(curve, window).used
    root = np.sqrt(curve.weights[used])
    u, y = np.log(curve.sizes[used]) - curve.center, root * np.log(curve.losses[used])
    design = root[:, None] * np.vander(u, 3, increasing=True)
    hat = design @ np.linalg.pinv(design)
    left = 1 - np.diagonal(hat)
    return ((y - hat @ y) / np.sqrt(np.maximum(left, 1e-12)))[left > 1e-6] if len(u) > 3 else np.empty(0)


def localised(curve: Curve, window: int) -> Curve:
    """The same runs under a local parabola."""
    runs = {"N": curve.sizes, "D": curve.tokens, "C": curve.C, "loss": curve.losses, WEIGHT: curve.weights}
    return curve_of(pd.DataFrame(runs), "parabola", window)


def lowest_point(values: np.ndarray, grid: np.ndarray) -> tuple[float, float]:
    """Where and how low the parabola through the lowest of `values` [n] over an even `grid` and its
    neighbours is.
    """
    best = int(np.clip(values.argmin(), 1, len(grid) - 2))
    left, here, right = values[best - 1 : best + 2]
    step = (left - right) / (2 * (left - 2 * here + right))
    return float(grid[best] + step * (grid[1] - grid[0])), float(here - (left - right) * step / 4)


def _akima(curve: Curve, y: np.ndarray) -> "Akima1DInterpolator":
    """Akima's spline through the means of each size; y [..., n] gives values [grid, ...]."""
    from scipy.interpolate import Akima1DInterpolator  # half a second, and few ask for it

    return Akima1DInterpolator(curve.knots[0], np.moveaxis(curve.means(y), -1, 0), extrapolate=True)
