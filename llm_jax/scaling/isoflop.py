"""Approach 2 (Hoffmann et al. 2022, section 3.2): the best size at each budget, and power laws through them.

At each budget a curve of ln(loss) over ln(N) has its minimum at N_opt; ln N_opt, ln D_opt and the ln loss of
the minimum are then lines in ln C. An isoFLOP curve is a parabola only near its minimum, so the default takes
the sizes around the lowest; a curve without a minimum inside its own range is refused, with the reason, and
never extrapolated.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd

from llm_jax.config import UserError, nearest
from llm_jax.files import with_nulls
from llm_jax.scaling import projection
from llm_jax.scaling.curves import (
    METHODS,
    WEIGHT,
    Curve,
    curve_of,
    localised,
    redraw,
    scaled_residuals,
    shifted,
)
from llm_jax.scaling.grids import SAME_BUDGET
from llm_jax.scaling.laws import PowerLaw
from llm_jax.scaling.objectives import objective
from llm_jax.scaling.posing import Choices, pose
from llm_jax.scaling.powers import FORMULAS, PowerLaws, lines_through
from llm_jax.scaling.results import Estimate, Optimum, estimate, heading, remarks, row
from llm_jax.scaling.skew import shapes
from llm_jax.scaling.solver import Data
from llm_jax.scaling.tables import Excluded, Points, check_points, listed, name_of

_ODD = 0.1
FOR_E = 4  # budgets that an asymptote of their losses takes


class Beyond(NamedTuple):
    """Shares of refits whose lowest point is the smallest size (or lies below what a parabola passes), and
    the largest.
    """

    below: float
    above: float


@dataclasses.dataclass(frozen=True)
class IsoflopFit(PowerLaws):
    """Minima of isoFLOP curves and the power laws through them.

    minima [S, n, 3]: ln N, ln D and ln loss of every budget in every draw (NaN for refused budgets, infinite
    N and D where a draw has no minimum: `curves.redraw`). Their losses follow a power law with an asymptote
    where four budgets or more tell one. corrections [n, 3]: what was added to each curve's
    minimum for the skew of the law.
    """

    curves: tuple[Curve, ...]
    minima: np.ndarray
    corrections: np.ndarray
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
    def formula(self) -> str:
        return "L_opt = E + A C^-a through the minima" if len(self.accepted) >= FOR_E else super().formula

    @functools.cached_property
    def _losses(self) -> tuple[PowerLaw, np.ndarray, np.ndarray]:
        """The law of the minima's losses, and its parameters [1, P] and in every draw [S, P]."""
        law, frame = PowerLaw(), self.frontier
        points = Points(frame, np.ones(len(frame)), np.arange(len(frame)))
        problem, data, _, names = pose(law, points, objective("l2", "raw"), Choices({}, {}, {}))
        projected = projection.project(problem, names)
        ends = projection.solve(projected, data)
        best = ends.free[[ends.objective.argmin()]]
        drawn = self.minima[:, [not curve.refused for curve in self.curves], 2]
        if not np.isfinite(drawn).any():
            return law, problem.theta(best), problem.theta(best)[:0]
        drawn = _centred(drawn, data.y[0])
        refits = projection.solve(projected, Data(drawn, data.weights), np.repeat(best, len(drawn), axis=0))
        return law, problem.theta(best), problem.theta(refits.free)

    def extrapolate(self, N: float, D: float, C: float) -> tuple[float, np.ndarray]:
        """ln of the loss of the best run at C FLOPs, and its draws [S]."""
        if len(self.accepted) < FOR_E:
            return super().extrapolate(N, D, C)
        law, best, draws = self._losses
        x = {"C": np.log([C])}
        return float(law.log_loss(best, x)[0, 0]), law.log_loss(draws, x)[:, 0]

    def optimum(self, C: float) -> Optimum:
        """N, D and loss of the best run at C FLOPs."""
        best, draws = self.extrapolate(np.nan, np.nan, C)
        return super().optimum(C)._replace(loss=estimate(float(np.exp(best)), np.exp(draws), self.level))

    def to_json(self) -> dict[str, Any]:
        """Every number of the fit as JSON values (NaN becomes null)."""
        return with_nulls(
            self.common_json()
            | {
                "approach": self.approach,
                "curves": [
                    {
                        "C": curve.C,
                        "runs": len(curve.sizes),
                        "used": int(curve.used.sum()),
                        "center": curve.center,
                        "coefficients": curve.coefficients,
                        "refused": curve.refused or None,
                        "correction": dict(zip(("ln_N", "ln_D", "ln_loss"), by, strict=True)),
                        **{name: e._asdict() for name, e in numbers.items()},
                        "refits_beyond": beyond._asdict(),
                        "fitted": self._fitted(curve),
                    }
                    for curve, numbers, beyond, by in zip(
                        self.curves, self.optima, self.beyond, self.corrections, strict=True
                    )
                ],
            }
        )

    def table(self) -> str:
        """The fit as text: every budget with its minimum or why it has none, then the power laws."""
        size, conventions = len(self.points.frame), self.conventions
        lines = [f"Approach 2: {METHODS[conventions['method']]}    ({size} runs; N: {conventions['N']})"]
        lines.append(
            f"  {'C':>9} {'runs':>5} {'N_opt':>11} {'low':>11} {'high':>11} {'D_opt':>11} {'loss':>9}"
        )
        for curve, numbers in zip(self.curves, self.optima, strict=True):
            start = f"  {curve.C:9.3g} {len(curve.sizes):5d}"
            found = "".join(f" {part:11.4g}" for part in (*numbers["N"][:3], curve.D)) + f" {curve.loss:9.5f}"
            lines.append(start + (f"  refused: {curve.refused}" if curve.refused else found))
        lines += [self.open_ends] * bool(self.open_ends)
        lines.append(f"{FORMULAS}; {len(self.draws)} bootstrap refits")
        lines.append(heading(self.level))
        lines += [row(name, number) for name, number in self.parameters.items()]
        return "\n".join(lines + remarks(self.points, self.warnings))

    @property
    def optima(self) -> list[dict[str, Estimate]]:
        """N, D and loss at each budget's minimum, with intervals; one that reaches draws without a minimum is
        open there, 0 or infinite.
        """
        out = []
        for curve, drawn in zip(self.curves, np.exp(self.minima.swapaxes(0, 1)), strict=True):
            drawn = drawn[: 0 if curve.refused else None]
            values = (("N", curve.N), ("D", curve.D), ("loss", curve.loss))
            out.append({n: estimate(v, drawn[:, i], self.level) for i, (n, v) in enumerate(values)})
        return out

    @property
    def beyond(self) -> list[Beyond]:
        """For each budget, the shares of refits without a minimum within the sizes."""
        if not len(self.minima):
            return [Beyond(0.0, 0.0)] * len(self.curves)
        log_n = self.minima[:, :, 0]
        shares = zip((log_n == -np.inf).mean(0), (log_n == np.inf).mean(0), strict=True)
        return [Beyond(*map(float, pair)) for pair in shares]

    @property
    def open_ends(self) -> str:
        """In how many refits a budget had no minimum, in a sentence; "" if in none."""
        shares = [below + above for below, above in self.beyond]
        if not any(shares):
            return ""
        worst = int(np.argmax(shares))
        lost = np.isinf(self.minima[:, :, 0]).any(1).mean()
        most = f"at {self.curves[worst].C:.3g} FLOPs in {shares[worst]:.1%}"
        return f"In {lost:.1%} of the refits a budget has no minimum ({most}); intervals so far are open."

    def _fitted(self, curve: Curve) -> list[dict[str, Any]]:
        """Every run of a curve, and what the curve makes of those it passes; residual: ln measured - ln
        fitted.
        """
        names = ("run", "N", "D", "loss", "fitted", "residual")
        fitted = np.where(curve.used, curve.predict(curve.sizes), np.nan)
        columns = curve.sizes, curve.tokens, curve.losses, fitted, np.log(curve.losses / fitted)
        return [dict(zip(names, row, strict=True)) for row in zip(curve.names, *columns, strict=True)]


def fit_isoflop(
    points: pd.DataFrame,
    *,
    method: str = "local",
    window: int = 5,
    weights: str | None = None,
    bootstrap: int = 1000,
    level: float = 0.9,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
    where: str | None = None,
    counting: str = "as given in the table",
    flops_per_nd: float = 6.0,
) -> IsoflopFit:
    """Approach 2 on a table with columns N, D, loss, C (or budget_flops, what a run was planned for).

    A missing C is flops_per_nd N D.

    method: one of METHODS. The default passes a parabola through the sizes around the lowest and adds to its
    vertex what a parabola through the same sizes misses of the law fitted to all runs: an isoFLOP curve is
    skewed wherever alpha and beta differ. window: sizes the parabola passes, half of them on each side of
    the lowest. weights: a column or an expression of columns that each run counts by in its parabola; budgets
    count alike. Intervals: the minima are found again `bootstrap` times with the residuals of all parabolas,
    scaled for the coefficients spent and for how few they are, drawn at random and added. Raises UserError
    where fewer than two budgets have a minimum, with reasons.
    """
    if method not in METHODS:
        raise UserError(f"no method {method!r}; {nearest(method, METHODS)}")
    if window < 3:
        raise UserError(f"--window={window}: a parabola needs 3 sizes")
    checked = check_points(points, ("N", "D", "C", "loss"), columns, where, weights, flops_per_nd)
    frame, notes = checked.frame.assign(**{WEIGHT: checked.weights}), list(checked.notes)
    excluded = list(checked.excluded)
    groups = [group for _, group in frame.groupby(budgets_of(frame), sort=True)]
    lone = [group for group in groups if group["N"].nunique() < 3]
    if lone:
        alone = pd.concat(lone)
        reason = "its budget has fewer than 3 sizes"
        excluded += [Excluded(name_of(alone, label), reason) for label in alone.index]
        notes.append(f"{len(alone)} runs stand at budgets of fewer than 3 sizes and say nothing here")
    groups = [group for group in groups if group["N"].nunique() >= 3]
    curves = [curve_of(group, method, window) for group in groups]
    shaped = shapes(groups, curves, method, window)
    uncorrected = {f"{c.C:.3g}": s.why_none for c, s in zip(curves, shaped, strict=True) if s.why_none}
    corrections = np.reshape([shape.correction * (method == "local") for shape in shaped], (-1, 3))
    curves = [shifted(curve, by) for curve, by in zip(curves, corrections, strict=True)]
    accepted = [curve for curve in curves if not curve.refused]
    if len(accepted) < 2:
        reasons = "; ".join(f"C={curve.C:.3g}: {curve.refused}" for curve in curves if curve.refused)
        reasons = reasons or ("no budget has 3 sizes" if not groups else "the table has no other budget")
        found = f"{len(accepted)} of {len(groups)} budgets"
        raise UserError(f"{found} have a minimum within their sizes, power laws need 2 ({reasons})")
    refused = len(curves) - len(accepted)
    warnings = [f"{refused} of {len(curves)} budgets are refused"] if refused else []
    if len(accepted) == 2:
        warnings.append("under-identified: a line through 2 budgets leaves nothing to judge it by")
    x = np.log([curve.C for curve in accepted])
    lines = lines_through(
        x, np.log([[c.N for c in accepted], [c.D for c in accepted], [c.loss for c in accepted]])
    )

    generator = np.random.default_rng(seed)
    left = [scaled_residuals(curve, window) for curve in accepted]  # none of curves through 3 sizes
    noise = np.concatenate(left)
    if not len(noise) and bootstrap:
        warnings.append("no intervals: every parabola has as many coefficients as sizes; add sizes a budget")
        bootstrap = 0
    freedom = max(sum(max(len(residuals) - 3, 0) for residuals in left), 1)
    # How large the noise is, few residuals tell: draws of Student's t, not of the residuals alone.
    size = np.sqrt(freedom / generator.chisquare(freedom, (bootstrap, 1)))
    minima = np.full((bootstrap, len(curves), 3), np.nan)
    for index, curve in enumerate(curves):
        if bootstrap and not curve.refused:
            scatter = size * generator.choice(noise, (bootstrap, len(curve.sizes))) / np.sqrt(curve.weights)
            minima[:, index] = redraw(curve, shaped[index].smooth + scatter) + corrections[index]
    kept = minima[:, [not curve.refused for curve in curves]]
    has = np.isfinite(kept[:, :, 0])
    draws = np.stack([lines_through(x, np.where(has, kept[:, :, i], np.nan)) for i in range(3)], axis=1)
    if bootstrap and has.all(1).mean() < 0.95:
        warnings.append("sizes are too few or too close: in many refits a budget has no minimum")
    if uncorrected and method == "local":
        why = "; ".join(f"{budget}: {reason}" for budget, reason in uncorrected.items())
        warnings.append(f"minima not corrected for the law's skew, at C = {why}")
    if method.startswith("akima") and bootstrap:
        warnings.append(
            "the lowest point of a spline through noisy losses is too low: no intervals of losses (at 30 "
            "times the largest budget 90% ones held in 73% of 40 simulated sets); of N, a and b they hold"
        )
    if method == "full" and _misfit(accepted, window) > 3:
        warnings.append("these isoFLOP curves are no parabolas over their full range; use the local one")
    if off := off_budget(frame):
        warnings.append(off)
    if odd := _above_neighbours(groups):
        warnings.append(odd)
    conventions = {
        "N": counting,
        "flops_per_nd": flops_per_nd,
        "method": method,
        "window": window if method in ("local", "parabola") else None,
        "on": "of ln loss over ln N",
        "weights": weights,
        "reduction": f"least squares, each run of weight {weights or 1}, each budget of 1",
        "resampled": "residuals of the curves, around the law of all runs moved to each minimum",
        "columns": dict(columns or {}),
        "where": where,
        "seed": seed,
    }
    checked = dataclasses.replace(checked, notes=tuple(notes), excluded=tuple(excluded))
    draws = draws[np.isfinite(draws).all((1, 2))]
    if len(draws):
        draws = _centred(draws, lines)
    if method.startswith("akima"):
        draws[:, 2] = minima[:, :, 2] = np.nan
    spread = float(np.sqrt(np.mean(noise**2))) if len(noise) else 0.0
    return IsoflopFit(
        lines,
        draws,
        spread,
        freedom,
        checked,
        level,
        conventions,
        tuple(warnings),
        tuple(curves),
        minima,
        corrections,
    )


def _centred(draws: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Draws [S, ...] around the value: noise on top of noise moves minima the same way again, and only the
    spread counts.
    """
    return draws - np.quantile(draws, [0.05, 0.95], axis=0).mean(0) + value


def off_budget(frame: pd.DataFrame) -> str:
    """Runs whose C is not what they were planned for by the same factor as the others, named; "" if none."""
    if not {"budget_flops", "C"} <= set(frame):
        return ""
    ratio = np.log(frame["C"].astype(float) / frame["budget_flops"].astype(float))
    off = frame.index[np.abs(ratio - ratio.median()) > 0.1]
    return listed("off their budget by more than 10%", frame, off, np.expm1(ratio))


def _above_neighbours(groups: list[pd.DataFrame]) -> str:
    """Runs far above the line between the sizes beside them, which no isoFLOP curve has; "" if none.

    The smallest and the largest have one beside them, and may rise three times as far.
    """
    text = []
    for group in groups:
        means = np.log(group.groupby("N")["loss"].mean())
        x, y = np.log(means.index.to_numpy(float)), means.to_numpy()
        chord = y[:-2] + (y[2:] - y[:-2]) * (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
        above = np.array([y[0] - y[1], *(y[1:-1] - chord), y[-1] - y[-2]])
        odd = means.index[above > _ODD * np.array([3, *np.ones(len(chord)), 3])]
        shares = group["N"].map(pd.Series(np.expm1(above), index=means.index))
        text.append(listed("", group, group.index[group["N"].isin(odd)], shares))
    named = ", ".join(filter(None, text))
    return f"above the sizes beside them by more than {_ODD:.0%}, perhaps diverged: {named}" if named else ""


def budgets_of(frame: pd.DataFrame) -> np.ndarray:
    """The number of each run's budget, in rising order."""
    column = "budget_flops" if "budget_flops" in frame else "C"
    logs = np.log(frame[column].to_numpy(float))
    order = np.argsort(logs, kind="stable")
    labels = np.empty(len(logs), int)
    labels[order] = np.concatenate([[0], np.cumsum(np.diff(logs[order]) > SAME_BUDGET)])
    return labels


def _misfit(curves: list[Curve], window: int) -> float:
    """How many times larger the residuals of the full parabolas are than those of local ones."""
    full = np.concatenate([scaled_residuals(curve, window) for curve in curves])
    local = np.concatenate([scaled_residuals(localised(curve, window), window) for curve in curves])
    if not len(local):
        return 0.0
    return float(np.sqrt(np.mean(full**2) / max(np.mean(local**2), 1e-30)))
