"""Fits of a law to a table of runs, with intervals: Hoffmann's Approach 3, and the door to Approach 2.

Approach 3 (Hoffmann et al. 2022, section 3.3): minimise the SUM over runs of a Huber loss (delta 1e-3) of
ln L(N, D) - ln L_i from a grid of starts, in float64 with exact derivatives; the best end counts. Theirs were
descents by L-BFGS; solver.py takes all starts, or all bootstrap draws, at once by damped Newton steps, and a
test checks that L-BFGS finds nothing lower. Intervals are percentiles of refits to runs drawn with
replacement. Convergence is judged relative to the objective, whose scale is 1e-3 and below: absolute
tolerances stop early there (Besiroglu et al. 2024).
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from llm_jax.config import UserError, nearest
from llm_jax.scaling import laws, solver
from llm_jax.scaling.isoflop import IsoflopFit, fit_isoflop
from llm_jax.scaling.laws import Law
from llm_jax.scaling.results import Fit
from llm_jax.scaling.tables import Points, check_points

LAD_DELTA = 1e-9  # a Huber loss this narrow is the absolute deviation to nine digits
_GRID_DELTA = 1e-3  # narrower losses are reached from here: their kinks stop descents from far away


def parse_loss(text: str) -> float:
    """The Huber bound delta that "huber:1e-3", "lad" (0, in effect) or "l2" (infinite) stands for."""
    kind, _, bound = text.partition(":")
    if kind == "huber":
        try:
            delta = float(bound or 1e-3)
        except ValueError:
            delta = 0.0
        if delta >= LAD_DELTA:
            return delta
        raise UserError(
            f"--loss={text}: the Huber bound is a positive number such as huber:1e-3; for 0 write lad"
        )
    if text in ("lad", "l2"):
        return LAD_DELTA if text == "lad" else np.inf
    raise UserError(f"no loss {text!r}; {nearest(text, ['huber:1e-3', 'lad', 'l2'])}")


def fit(
    points: pd.DataFrame, law: str | Law = "chinchilla", *, approach: int = 3, **options: Any
) -> Fit | IsoflopFit:
    """Fits a table, a row a run: Approach 3 by `fit_law`, Approach 2 by `fit_isoflop`, with their options."""
    if approach == 3:
        return fit_law(points, law, **options)
    if approach == 2:
        return fit_isoflop(points, **options)
    raise UserError(f"no approach {approach}; there are 2 (isoFLOP minima) and 3 (a law of the loss)")


def fit_law(
    points: pd.DataFrame,
    law: str | Law = "chinchilla",
    *,
    loss: str = "huber:1e-3",
    fixed: Mapping[str, float] | None = None,
    bootstrap: int = 1000,
    level: float = 0.9,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
    where: str | None = None,
    counting: str = "as given in the table",
    flops_per_nd: float = 6.0,
) -> Fit:
    """Fits `law` to a table with a row a run by Approach 3.

    fixed: natural values that stay ({"E": 1.69}; a coefficient of 0 drops its term). bootstrap: refits to
    runs drawn with replacement. counting, flops_per_nd: what N counts and C / (N D), kept with the result.
    Raises UserError for a table or a question that can't be answered.
    """
    law = laws.law(law)
    fixed, delta = dict(fixed or {}), parse_loss(loss)
    checked = check_points(points, (*law.inputs, "loss"), columns, where)
    problem, grid, names = _problem(law, checked, fixed, delta)
    warnings = _check_enough(law, problem, checked, names)
    ones = np.ones(len(problem.y))

    wide = dataclasses.replace(problem, delta=max(delta, _GRID_DELTA))
    ends = solver.minimise(wide, grid, ones)
    near = ~ends.converged & (ends.objective < 1.01 * ends.objective.min())
    ends = solver.resume(wide, ends, ones, near)
    best = int(ends.objective.argmin())
    # A perfect fit has an objective of rounding errors only, hence the second term.
    agree = ends.objective <= ends.objective[best] * (1 + 1e-6) + 1e-24 * len(ones)
    end = _narrow(wide, delta, ends.free[best : best + 1], ones)
    if not (ends.converged[best] and end.converged[0]):
        warnings.append("the descent to the optimum stopped before it converged")
    draws = _bootstrap(problem, end.free, bootstrap, seed)
    if len(draws) < bootstrap:
        warnings.append(f"{bootstrap - len(draws)} of {bootstrap} refits did not converge and are left out")
    theta = problem.theta(end.free)[0]
    residuals = problem.y - law.log_loss(theta[None], problem.x)[0]
    doubts, condition = _judge(problem, end.free, draws, names, agree)
    objective = float(np.abs(residuals).sum()) if loss == "lad" else float(end.objective[0])
    conventions = {
        "N": counting,
        "flops_per_nd": flops_per_nd,
        "loss": loss,
        "delta": None if loss != "lad" and np.isinf(delta) else delta,
        "on": "ln of the loss",
        "reduction": "sum over runs, each of weight 1",
        "resampled": "runs",
        "columns": dict(columns or {}),
        "where": where,
        "seed": seed,
    }
    return Fit(
        law, theta, problem.theta(draws), objective, len(grid), float(agree.mean()), condition, residuals,
        checked, level, fixed, conventions, (*warnings, *doubts),
    )  # fmt: skip


def _problem(
    law: Law, points: Points, fixed: Mapping[str, float], delta: float
) -> tuple[solver.Problem, np.ndarray, list[str]]:
    """The problem in the free parameters alone, its grid of starts [S, F], and their names."""
    place = {parameter.name: index for index, parameter in enumerate(law.parameters)}
    for name in fixed:
        if name not in place:
            raise UserError(f"--fix: {law.formula} has no parameter {name!r}; {nearest(name, place)}")
        if name in law.ties:
            raise UserError(f"--fix: {name} is tied to {law.ties[name]} in {law.formula}; fix that")
    free = [p for p in law.parameters if p.name not in fixed and p.name not in law.ties]
    if not free:
        raise UserError(f"every parameter of {law.formula} is fixed; nothing is left to fit")
    spread, offset = np.zeros((len(free), len(place))), np.zeros(len(place))
    for row, parameter in enumerate(free):
        spread[row, place[parameter.name]] = 1
        for tied, target in law.ties.items():
            spread[row, place[tied]] = target == parameter.name
    for name, value in fixed.items():
        if value < 0 and law.parameters[place[name]].log:
            raise UserError(f"--fix={name}={value:g}: a coefficient is not negative")
        for index in [place[name], *(place[tied] for tied, target in law.ties.items() if target == name)]:
            offset[index] = law.parameters[index].inner(value)
    x = {name: np.log(points.frame[name].to_numpy(float)) for name in law.inputs}
    problem = solver.Problem(
        law=law,
        x=x,
        y=np.log(points.frame["loss"].to_numpy(float)),
        delta=delta,
        spread=spread,
        offset=offset,
        lower=np.array([p.lower for p in free]),
        upper=np.array([p.upper for p in free]),
    )
    return problem, np.array(list(itertools.product(*(p.grid for p in free)))), [p.name for p in free]


def _check_enough(law: Law, problem: solver.Problem, points: Points, names: list[str]) -> list[str]:
    """Refuses tables that can't determine the law; warns of those that barely can."""
    for name in law.inputs:
        values = np.unique(problem.x[name])
        if len(values) < 2:
            raise UserError(f"{name} is {np.exp(values[0]):g} in every run; {law.formula} needs it to vary")
    n = len(np.unique(np.stack(list(problem.x.values())), axis=1).T)
    if n < len(names):
        raise UserError(
            f"too few points: {n} for the {len(names)} free parameters of {law.formula}; "
            "add runs or fix parameters, as in --fix=E=1.69"
        )
    if n < len(names) + 2:
        return [f"under-identified: {n} points for {len(names)} parameters leave nothing to judge the fit by"]
    return []


def _narrow(problem: solver.Problem, delta: float, free: np.ndarray, weights: np.ndarray) -> solver.Solution:
    """The optima under Huber's `delta`, from those of a wider one: each stage starts where the last ended."""
    while True:
        end = solver.minimise(problem, free, weights)
        if problem.delta <= delta:
            return end
        problem, free = dataclasses.replace(problem, delta=max(delta, problem.delta / 8)), end.free


def _bootstrap(problem: solver.Problem, best: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Free parameters [S, F] of refits to runs drawn with replacement, each from the best fit.

    Those that don't converge, however long they are given, are left out: S may be less than `count`. A draw
    of fewer distinct runs than parameters determines nothing and is drawn again.
    """
    n, generator = len(problem.y), np.random.default_rng(seed)
    weights = np.empty((0, n))
    while len(weights) < count:
        drawn = generator.multinomial(n, np.full(n, 1 / n), size=count)
        enough = (drawn > 0).sum(1) >= min(best.shape[1] + 1, n)
        weights = np.concatenate([weights, drawn[enough]])[:count]
    if not count:
        return best[:0]
    wide = dataclasses.replace(problem, delta=max(problem.delta, _GRID_DELTA))
    weights = weights.astype(float)
    ends = _narrow(wide, problem.delta, np.repeat(best, count, axis=0), weights)
    ends = solver.resume(problem, ends, weights, ~ends.converged)
    return ends.free[ends.converged]


def _sensitivity(problem: solver.Problem, best: np.ndarray) -> tuple[np.ndarray, float]:
    """How far each parameter moves ln of the loss (rms over runs) [F], and how alike their effects are.

    The second is the condition number of the squared Jacobian, scaled to unit diagonal.
    """
    jacobian = problem.spread @ problem.law.with_jacobian(problem.theta(best), problem.x)[1][0]
    scale = np.sqrt((jacobian**2).mean(1))
    if not (scale > 0).all():
        return scale, float("inf")
    unit = jacobian / scale[:, None]
    return scale, float(np.linalg.cond(unit @ unit.T))


def _judge(
    problem: solver.Problem, best: np.ndarray, draws: np.ndarray, names: list[str], agree: np.ndarray
) -> tuple[list[str], float]:
    """What a reader must know before believing the numbers, and the condition number."""
    warnings = []
    effect, condition = _sensitivity(problem, best)
    for index, name in enumerate(names):
        bounds = {"lower": problem.lower[index], "upper": problem.upper[index]}
        for side, bound in bounds.items():
            if best[0, index] == bound:
                warnings.append(f"{name} is at its {side} bound; these points don't determine its term")
            elif len(draws) and (share := np.mean(draws[:, index] == bound)) > 0.01:
                warnings.append(f"{name} is at its {side} bound in {share:.0%} of the refits")
        if effect[index] < 1e-6 and best[0, index] not in bounds.values():
            warnings.append(f"{name} changes no loss by 1e-6: these points don't determine its term")
    if condition > 1e8:
        warnings.append(f"flat valley: condition number {condition:.1e}; the parameters are not told apart")
    if agree.sum() < max(2, 0.01 * len(agree)):
        warnings.append(f"only {agree.sum()} of {len(agree)} starts reach the optimum")
    return warnings, condition
