"""What a fit returns: numbers with intervals, and everything needed to judge and repeat it."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from llm_jax.config import UserError
from llm_jax.files import with_nulls
from llm_jax.scaling.law import Inputs, Law
from llm_jax.scaling.posing import far_bound
from llm_jax.scaling.resampling import one_run
from llm_jax.scaling.solver import Data, Problem
from llm_jax.scaling.tables import Points, SeedNoise, between_seeds, name_of

SHOWN = 10  # of the runs that were left out


class Estimate(NamedTuple):
    """A number with its interval and standard error (NaN where nothing was resampled)."""

    value: Any
    low: Any
    high: Any
    standard_error: Any


class Optimum(NamedTuple):
    """The compute-optimal run at a budget: parameters, tokens, and the loss where the fit has a law of it."""

    N: Estimate
    D: Estimate
    loss: Estimate | None = None


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law.

    theta [P] and draws [S, P] are in the solver's terms (logarithms of coefficients); best [1, F] are its
    free parameters, problem and data what was solved; residuals [n] are ln measured - ln fitted. agreement:
    share of the starts that end within 1e-6 of the best objective. condition: of the curvature, scaled to
    unit diagonal. stretch: of the draws around the estimate (resampling.py). bounds_hit: {parameter: "lower"
    or "upper"}. conventions: what N counts, delta, the sum: whatever a reader needs to repeat it.
    """

    law: Law
    theta: np.ndarray
    draws: np.ndarray
    problem: Problem
    data: Data
    best: np.ndarray
    objective: float
    starts: int
    agreement: float
    condition: float
    bounds_hit: Mapping[str, str]
    residuals: np.ndarray
    points: Points
    level: float
    stretch: float
    fixed: Mapping[str, float]
    tied: Mapping[str, str]
    conventions: Mapping[str, Any]
    warnings: tuple[str, ...]
    approach: int | str = 3

    @property
    def free(self) -> int:
        """How many parameters were fitted, neither fixed nor tied."""
        return self.best.shape[1]

    @property
    def parameters(self) -> dict[str, Estimate]:
        """Every parameter and derived number in its natural units, with interval."""
        best, draws = self.values(self.theta[None]), self.values(self.draws)
        return {name: self.with_interval(best[name][0], draws[name]) for name in best}

    def predict(self, **inputs: Any) -> Estimate:
        """The law's value at N=..., D=... (or C=...), scalars or arrays [n], and its interval.

        The interval is the law's; one more run scatters around it as well (`one_run`). What follows from N,
        D and C is derived.
        """
        x = {name: np.log(value) for name, value in self._at(inputs).items()}
        draws, best = self.law.log_loss(self.draws, x), self.law.log_loss(self.theta[None], x)[0]
        predicted = self.with_interval(np.exp(best), np.exp(draws))
        scalar = all(np.ndim(value) == 0 for value in inputs.values())
        return Estimate(*(float(part[0]) for part in predicted)) if scalar else predicted

    def one_run(self, **inputs: float) -> Estimate:
        """The value that one more run is expected to measure there: the law's interval and a run's noise."""
        (best,), draws = self.logs({name: np.log(value) for name, value in self._at(inputs).items()})
        if len(draws) < 2 or self.freedom < 1:
            return estimate(float(np.exp(best)), draws[:0, 0], self.level)
        runs = one_run(draws[:, 0], self.noise, self.freedom)
        return estimate(float(np.exp(best)), np.exp(runs), self.level)

    def logs(self, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
        """ln of what the law gives at x, logarithms of its inputs [n]: [n], and draws [S, n] whose
        percentiles are its interval.
        """
        best = self.law.log_loss(self.theta[None], x)[0]
        return best, self._around(best, self.law.log_loss(self.draws, x))

    def _at(self, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return self.law.inputs_of(given, self.conventions["flops_per_nd"])

    def optimum(self, C: float, **given: float) -> Optimum:
        """N, D and loss of the best run at C FLOPs (C = flops_per_nd N D, by the fit's conventions).

        given: what else the law depends on, such as U. Raises UserError for what it doesn't.
        """
        self.law.refuse_beside(given)
        best, draws = self.best_at(self.theta[None], C, **given), self.best_at(self.draws, C, **given)
        if min(best[0][0], best[1][0]) < 1.001:
            least = "parameter" if best[0][0] < best[1][0] else "token"
            raise UserError(f"{self.formula} has no optimum at C={C:g}: its loss falls down to one {least}")
        return Optimum(*(self.with_interval(b[0], d) for b, d in zip(best, draws, strict=True)))

    def best_at(self, theta: np.ndarray, C: float, **given: float) -> tuple[np.ndarray, ...]:
        """N, D and loss [S] of the best run at C FLOPs by laws theta [S, P]; `optimum` says what is given."""
        N, D = self.law.optimum(theta, C, self.conventions["flops_per_nd"], given)
        every = {"N": N, "D": D, "C": np.full_like(N, C), "M": D / N}
        every |= {name: np.full_like(N, value) for name, value in given.items()}
        x = {name: np.log(every[name])[:, None] for name in self.law.inputs}
        return N, D, np.exp(self.law.log_loss(theta, x)[:, 0])

    def extrapolate(self, N: float, D: float, C: float) -> tuple[float, np.ndarray]:
        """ln of the loss of one run, and its draws [S]."""
        everything = {"N": np.log([N]), "D": np.log([D]), "C": np.log([C]), "M": np.log([D / N])}
        (best,), draws = self.logs({name: everything[name] for name in self.law.inputs})
        return float(best), draws[:, 0]

    def _around(self, value: Any, draws: np.ndarray) -> np.ndarray:
        """The draws [S, ...] of a number whose percentiles are its interval."""
        return value + (draws - value) * self.stretch

    @property
    def formula(self) -> str:
        return self.law.formula

    @property
    def freedom(self) -> int:
        """Runs beyond those that the parameters spend, of which the noise is known."""
        runs, rows = self.points.runs, len(self.residuals)
        return max(runs - self.free, 1) if runs < rows > self.free else int(self.near.sum()) - self.free

    @property
    def near(self) -> np.ndarray:
        """Which rows tell the noise [n] bool: a robust loss leaves runs far from the law aside, here too."""
        bound = np.inf if np.isinf(self.problem.objective.delta) else far_bound(self.residuals)
        return np.abs(self.residuals) <= bound

    @property
    def noise(self) -> float:
        """Standard deviation of ln loss of one row of weight 1, from the residuals (nan without freedom)."""
        left = int(self.near.sum()) - self.free
        squares = (self.points.weights * self.residuals**2)[self.near]
        return float(np.sqrt(np.sum(squares) / left)) if left > 0 else float("nan")

    @property
    def seed_noise(self) -> SeedNoise:
        """Of runs with equal inputs."""
        frame = self.points.frame
        return between_seeds(pd.Series(self.data.y[0], frame.index), [frame[x] for x in self.law.inputs])

    def to_json(self) -> dict[str, Any]:
        """Every number of the fit as JSON values (NaN becomes null)."""
        seeds, repeats = self.seed_noise
        return with_nulls(
            {
                "schema": 1,
                "law": {"name": self.law.name, "formula": self.law.formula},
                "approach": self.approach,
                "parameters": {name: e._asdict() for name, e in self.parameters.items()},
                "fixed": dict(self.fixed),
                "tied": dict(self.tied),
                "bounds_hit": dict(self.bounds_hit),
                "noise": self.noise,
                "seed_noise": seeds if repeats else None,
                "level": self.level,
                "objective": self.objective,
                "starts": self.starts,
                "agreement": self.agreement,
                "condition": self.condition,
                "bootstrap": len(self.draws),
                "stretch": self.stretch,
                "points": len(self.points.frame),
                "residual_rms": float(np.sqrt(np.mean(self.residuals**2))),
                "runs": self.runs(),
                "excluded": [run._asdict() for run in self.points.excluded],
                "notes": list(self.points.notes),
                "conventions": dict(self.conventions),
                "warnings": list(self.warnings),
            }
        )

    def runs(self) -> list[dict[str, Any]]:
        """Every fitted run: name (or line), inputs, measured and fitted value, ln measured - ln fitted."""
        frame, output = self.points.frame, self.law.output
        columns = [frame[name].astype(float) for name in (*self.law.inputs, output)]
        rows = zip(map(partial(name_of, frame), frame.index), *columns, self.residuals, strict=True)
        return [
            {"run": run, **dict(zip(self.law.inputs, x, strict=True))}
            | {output: value, "fitted": value / np.exp(residual), "residual": residual}
            for run, *x, value, residual in rows
        ]

    def table(self) -> str:
        """The fit as text: formula, parameters with intervals, how it was found, what to be wary of."""
        conventions, size = self.conventions, len(self.points.frame)
        lines = [f"{self.law.formula}    ({size} runs; N: {conventions['N']})", heading(self.level)]
        for name, number in self.parameters.items():
            hit = f"  at its {self.bounds_hit[name]} bound" if name in self.bounds_hit else ""
            told = "  fixed" if name in self.fixed else f"  = {self.tied[name]}" if name in self.tied else hit
            lines.append(row(name, number) + told)
        rms = (self.residuals**2).mean() ** 0.5
        lines += [
            f"objective {self.objective:.8g} ({conventions['loss']}, {conventions['reduction']})",
            f"residuals {rms:.2%} rms; condition number {self.condition:.1e}; "
            f"{self.agreement:.0%} of {self.starts} starts agree; {len(self.draws)} bootstrap refits",
        ]
        noise, repeats = self.seed_noise
        if repeats:
            lines.append(f"between seeds ln loss scatters by {noise:.2%}; around the law by {self.noise:.2%}")
        return "\n".join(lines + remarks(self.points, self.warnings))

    def values(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        """Every parameter and derived number [S] in natural units, of theta [S, P]."""
        values = {p.name: p.natural(theta[:, i]) for i, p in enumerate(self.law.parameters)}
        return values | self.law.derived(values)

    def with_interval(self, value: Any, draws: np.ndarray) -> Estimate:
        """A number and what the refits make of it, as an estimate."""
        if np.all(np.asarray(value) > 0) and np.all(draws > 0):
            moved = np.exp(self._around(np.log(value), np.log(draws)))
        else:
            moved = self._around(value, draws)
        return estimate(value, moved, self.level)


def estimate(value: Any, draws: np.ndarray, level: float) -> Estimate:
    """`value` with the central `level` interval and spread of `draws` [S, ...] (NaN for S < 2).

    Infinite draws count on their side: an interval that reaches them is open there, and there is no spread.
    """
    if len(draws) < 2:
        nan = np.full(np.shape(value), np.nan)[()]
        return Estimate(value, nan, nan, nan)
    method = "linear" if np.isfinite(draws).all() else "nearest"  # nothing lies halfway to infinity
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0, method=method)
    with np.errstate(invalid="ignore"):
        return Estimate(value, low, high, np.std(draws, axis=0, ddof=1))


def gap(one: Fit, other: Fit, of: Callable[[Fit, np.ndarray], np.ndarray]) -> Estimate:
    """How far `other` lies above `one` in a number: of(fit, theta [S, P]) gives it for every theta [S].

    Both fits are of the same cells in the same order, so each draw of cells gives a pair; what a cell's
    runs share falls out of the difference. A refit that was left out breaks the pairs behind it, which
    widens the interval; so do tables of different lengths, whose draws have nothing in common.
    """
    count = min(len(one.draws), len(other.draws))
    apart = of(other, other.theta[None])[0] - of(one, one.theta[None])[0]
    first, second = (
        fit._around(of(fit, fit.theta[None])[0], of(fit, fit.draws[:count])) for fit in (one, other)
    )
    return estimate(float(apart), second - first, one.level)


def told(gap: Estimate, form: str) -> str:
    """A difference with its interval, and whether it is more than chance."""
    shown = f"{gap.value:{form}} ({gap.low:{form}} to {gap.high:{form}})"
    return f"{shown}, {'not told apart' if gap.low <= 0 <= gap.high else 'more than chance'}"


def heading(level: float) -> str:
    """The columns of `row`."""
    return f"  {'':8} {'value':>13} {'low':>13} {'high':>13} {'std. error':>13}  ({level:.0%} intervals)"


def row(name: str, number: Estimate) -> str:
    """One number with its interval, if it has one, as a line of a table."""
    known = [part for part in number if part == part] or number[:1]
    return f"  {name:8} " + " ".join(f"{part:13.6g}" for part in known)


def remarks(points: Points, warnings: Sequence[str]) -> list[str]:
    """Lines on what was left out and what to be wary of."""
    lines = [f"note: {note}" for note in points.notes]
    lines += [f"left out: {run.run} ({run.reason})" for run in points.excluded[:SHOWN]]
    more = len(points.excluded) - SHOWN
    lines += [f"left out: {more} more, all in fit.json"] if more > 0 else []
    return lines + [f"WARNING: {warning}" for warning in warnings]


def written(value: Any, indent: str = "") -> str:
    """Plain values as JSON for readers: what fits in a line stands in one, a run in a long one."""
    line = json.dumps(value)
    nested = "{" in line[1:] or "[" in line[1:]
    if not isinstance(value, (dict, list)) or len(line) <= (150 if nested else 300):
        return line
    inner, marks = indent + " ", "{}" if isinstance(value, dict) else "[]"
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {written(item, inner)}" for key, item in value.items()]
    else:
        parts = [written(item, inner) for item in value]
    return marks[0] + "".join(f"\n{inner}{part}," for part in parts)[:-1] + f"\n{indent}{marks[1]}"
