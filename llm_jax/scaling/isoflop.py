"""Approach 2 (Hoffmann et al. 2022, section 3.2): the best size at each budget, and power laws through them.

At each budget a curve of ln(loss) over ln(N) has its minimum at N_opt; ln N_opt, ln D_opt and the ln loss of
the minimum are then lines in ln C. An isoFLOP curve is a parabola only near its minimum, so the default takes
the sizes around the lowest; a curve without a minimum inside its own range is refused, with the reason, and
never extrapolated.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from llm_jax.config import UserError, nearest
from llm_jax.scaling.curves import METHODS, Curve, curve_of, localised, redraw, scaled_residuals
from llm_jax.scaling.results import Estimate, Optimum, estimate, heading, plain, remarks, row
from llm_jax.scaling.tables import Points, check_points

FORMULAS = "N_opt = k_N C^a, D_opt = k_D C^b, L_opt = k_L C^-c"
_GAP = 0.05  # runs whose ln C differ by less are one budget: D is rounded to whole steps


@dataclasses.dataclass(frozen=True)
class IsoflopFit:
    """Minima of isoFLOP curves and the power laws N_opt = k_N C^a, D_opt = k_D C^b, L_opt = k_L C^-c there.

    lines [3, 2] and draws [S, 3, 2]: (slope, intercept) of ln N_opt, ln D_opt and ln L_opt over ln C. minima
    [S, n, 3]: those of every budget in every draw (NaN where a draw has no minimum). noise: of ln loss of one
    run around its parabola, from `freedom` degrees of freedom.
    """

    curves: tuple[Curve, ...]
    lines: np.ndarray
    draws: np.ndarray
    minima: np.ndarray
    noise: float
    freedom: int
    points: Points
    level: float
    conventions: Mapping[str, Any]
    warnings: tuple[str, ...]
    approach: ClassVar[int] = 2

    @property
    def accepted(self) -> list[Curve]:
        """The curves that have a minimum."""
        return [curve for curve in self.curves if not curve.refused]

    @property
    def frontier(self) -> pd.DataFrame:
        """Accepted budgets as a table C, N, D, loss: what a law of loss over compute is fitted to."""
        return pd.DataFrame([(c.C, c.N, c.D, c.loss) for c in self.accepted], columns=["C", "N", "D", "loss"])

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

    def to_json(self) -> dict[str, Any]:
        """Every number of the fit as JSON values (NaN becomes null)."""
        return plain(
            {
                "schema": 1,
                "approach": self.approach,
                "parameters": {name: e._asdict() for name, e in self.parameters.items()},
                "curves": [
                    {
                        "C": curve.C,
                        "runs": len(curve.sizes),
                        "used": int(curve.used.sum()),
                        "center": curve.center,
                        "coefficients": curve.coefficients,
                        "refused": curve.refused or None,
                        **{name: e._asdict() for name, e in numbers.items()},
                    }
                    for curve, numbers in zip(self.curves, self._minima(), strict=True)
                ],
                "level": self.level,
                "bootstrap": len(self.draws),
                "points": len(self.points.frame),
                "excluded": [run._asdict() for run in self.points.excluded],
                "notes": list(self.points.notes),
                "conventions": dict(self.conventions),
                "warnings": list(self.warnings),
            }
        )

    def table(self) -> str:
        """The fit as text: every budget with its minimum or why it has none, then the power laws."""
        size, conventions = len(self.points.frame), self.conventions
        lines = [f"Approach 2: {METHODS[conventions['method']]}    ({size} runs; N: {conventions['N']})"]
        lines.append(
            f"  {'C':>9} {'runs':>5} {'N_opt':>11} {'low':>11} {'high':>11} {'D_opt':>11} {'loss':>9}"
        )
        for curve, numbers in zip(self.curves, self._minima(), strict=True):
            start = f"  {curve.C:9.3g} {len(curve.sizes):5d}"
            found = "".join(f" {part:11.4g}" for part in (*numbers["N"][:3], curve.D)) + f" {curve.loss:9.5f}"
            lines.append(start + (f"  refused: {curve.refused}" if curve.refused else found))
        lines.append(
            f"N_opt = k_N C^a, D_opt = k_D C^b, L_opt = k_L C^-c; {len(self.draws)} bootstrap refits"
        )
        lines.append(heading(self.level))
        lines += [row(name, number) for name, number in self.parameters.items()]
        return "\n".join(lines + remarks(self.points, self.warnings))

    def _minima(self) -> list[dict[str, Estimate]]:
        """N, D and loss at each budget's minimum, with the intervals of the draws that have one."""
        out = []
        for curve, drawn in zip(self.curves, np.exp(self.minima.swapaxes(0, 1)), strict=True):
            found = drawn[np.isfinite(drawn[:, 0])]
            values = (("N", curve.N), ("D", curve.D), ("loss", curve.loss))
            out.append({n: estimate(v, found[:, i], self.level) for i, (n, v) in enumerate(values)})
        return out


def fit_isoflop(
    points: pd.DataFrame,
    *,
    method: str = "parabola",
    window: int = 5,
    bootstrap: int = 1000,
    level: float = 0.9,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
    where: str | None = None,
    counting: str = "as given in the table",
) -> IsoflopFit:
    """Approach 2 on a table with columns N, D, loss, C (or budget_flops, what a run was planned for).

    window: sizes the local parabola passes, half of them on each side of the lowest. Intervals: the minima
    are found again `bootstrap` times with the residuals of all parabolas, scaled for the coefficients spent,
    drawn at random and added. Raises UserError where fewer than two budgets have a minimum, with reasons.
    """
    if method not in METHODS:
        raise UserError(f"no method {method!r}; {nearest(method, METHODS)}")
    if window < 3:
        raise UserError(f"--window={window}: a parabola needs 3 sizes")
    checked = check_points(points, ("N", "D", "C", "loss"), columns, where)
    frame, notes = checked.frame, list(checked.notes)
    groups = [group for _, group in frame.groupby(_budgets(frame), sort=True)]
    lone = [group for group in groups if group["N"].nunique() < 3]
    if lone:
        notes.append(
            f"{sum(map(len, lone))} runs stand at budgets of fewer than 3 sizes and say nothing here"
        )
    curves = [curve_of(group, method, window) for group in groups if group["N"].nunique() >= 3]
    accepted = [curve for curve in curves if not curve.refused]
    if len(accepted) < 2:
        reasons = "; ".join(f"C={curve.C:.3g}: {curve.refused}" for curve in curves if curve.refused)
        reasons = reasons or "no budget has 3 sizes"
        found = f"{len(accepted)} of {len(groups)} budgets"
        raise UserError(f"{found} have a minimum within their sizes, power laws need 2 ({reasons})")
    refused = len(curves) - len(accepted)
    warnings = [f"{refused} of {len(curves)} budgets are refused"] if refused else []
    if len(accepted) == 2:
        warnings.append("under-identified: a line through 2 budgets leaves nothing to judge it by")
    x = np.log([curve.C for curve in accepted])
    lines = _lines(x, np.log([[c.N for c in accepted], [c.D for c in accepted], [c.loss for c in accepted]]))

    generator = np.random.default_rng(seed)
    noise = np.concatenate([scaled_residuals(curve, window) for curve in accepted])
    if not len(noise) and bootstrap:
        warnings.append("no intervals: every parabola has as many coefficients as sizes; add sizes a budget")
        bootstrap = 0
    # Few residuals know the noise poorly, so its size is drawn too (as in Student's t).
    freedom = max(len(noise) - 3 * len(accepted), 1)
    scale = np.sqrt(freedom / generator.chisquare(freedom, (bootstrap, 1)))
    minima = np.full((bootstrap, len(curves), 3), np.nan)
    for index, curve in enumerate(curves):
        if bootstrap and not curve.refused:
            minima[:, index] = redraw(curve, scale * generator.choice(noise, (bootstrap, len(curve.sizes))))
    kept = minima[:, [not curve.refused for curve in curves]]
    draws = np.stack([_lines(x, kept[:, :, i]) for i in range(3)], axis=1)
    lost = np.isnan(kept[:, :, 0]).any(1).mean() if bootstrap else 0.0
    if lost > 0.05:
        warnings.append(
            f"in {lost:.0%} of the refits a budget has no minimum; sizes are too few or too close"
        )
    if method == "full" and _misfit(accepted, window) > 3:
        warnings.append("these isoFLOP curves are no parabolas over their full range; use the local one")
    conventions = {
        "N": counting,
        "method": method,
        "window": window if method == "parabola" else None,
        "on": "ln of the loss over ln N",
        "weights": "each budget 1",
        "resampled": "residuals of the parabolas",
        "columns": dict(columns or {}),
        "where": where,
        "seed": seed,
    }
    checked = dataclasses.replace(checked, notes=tuple(notes))
    draws = draws[np.isfinite(draws).all((1, 2))]
    spread = float(np.sqrt(np.mean(noise**2))) if len(noise) else 0.0
    return IsoflopFit(
        tuple(curves), lines, draws, minima, spread, freedom, checked, level, conventions, tuple(warnings)
    )


def power_law(C: np.ndarray, value: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float]:
    """Exponent and coefficient of value = k C^exponent by (weighted) least squares of logarithms."""
    weights = None if weights is None else np.asarray(weights, float)
    slope, intercept = _lines(np.log(np.asarray(C, float)), np.log(np.asarray(value, float))[None], weights)[
        0
    ]
    return float(slope), float(np.exp(intercept))


def _budgets(frame: pd.DataFrame) -> np.ndarray:
    """The number of each run's budget, in rising order."""
    column = "budget_flops" if "budget_flops" in frame else "C"
    logs = np.log(frame[column].to_numpy(float))
    order = np.argsort(logs, kind="stable")
    labels = np.empty(len(logs), int)
    labels[order] = np.concatenate([[0], np.cumsum(np.diff(logs[order]) > _GAP)])
    return labels


def _misfit(curves: list[Curve], window: int) -> float:
    """How many times larger the residuals of the full parabolas are than those of local ones."""
    full = np.concatenate([scaled_residuals(curve, window) for curve in curves])
    local = np.concatenate([scaled_residuals(localised(curve, window), window) for curve in curves])
    if not len(local):
        return 0.0
    return float(np.sqrt(np.mean(full**2) / max(np.mean(local**2), 1e-30)))


def _lines(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Slope and intercept [S, 2] of least-squares lines through y [S, n] over x [n], NaNs left out."""
    w = np.where(np.isfinite(y), 1.0 if weights is None else weights, 0.0)
    y = np.where(w > 0, y, 0.0)
    total = w.sum(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_x, mean_y = (w * x).sum(-1, keepdims=True) / total, (w * y).sum(-1, keepdims=True) / total
        slope = (w * (x - mean_x) * (y - mean_y)).sum(-1) / (w * (x - mean_x) ** 2).sum(-1)
    return np.stack([slope, mean_y[..., 0] - slope * mean_x[..., 0]], axis=-1)
