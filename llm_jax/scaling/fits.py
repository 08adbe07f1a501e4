"""Fits of a law to a table of runs, with intervals; one call for every approach.

Approach 3 (Hoffmann et al. 2022, section 3.3): minimise the SUM over runs of a Huber loss (delta 1e-3) of
ln L(N, D) - ln L_i from a grid of starts, in float64 with exact derivatives; the best end counts. Theirs were
descents by L-BFGS; solver.py takes all starts, or all refits, at once by damped Newton steps, and a test
checks that L-BFGS finds nothing lower. Convergence is judged relative to the objective, whose scale is 1e-3
and below: absolute tolerances stop early there (Besiroglu et al. 2024).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from llm_jax.config import UserError
from llm_jax.scaling import identified, laws, projection, resampling, solver
from llm_jax.scaling.envelope import EnvelopeFit, fit_envelope
from llm_jax.scaling.isoflop import IsoflopFit, fit_isoflop, off_budget
from llm_jax.scaling.law import Law
from llm_jax.scaling.objectives import LAD_DELTA, Objective, objective
from llm_jax.scaling.posing import Choices, check_enough, far_runs, judge, pose
from llm_jax.scaling.results import Fit
from llm_jax.scaling.solver import Data, Problem, Solution
from llm_jax.scaling.tables import check_points, with_compute

_FEW, _KEPT = 300, 20

AnyFit = Fit | IsoflopFit | EnvelopeFit


def fit(
    points: pd.DataFrame, law: str | Law = "chinchilla", *, approach: int | str = 3, **options: Any
) -> AnyFit:
    """Fits a table: Approach 3 or "vp" by `fit_law`, 2 by `fit_isoflop`, 1 by `fit_envelope`, with their
    options.
    """
    match str(approach):
        case "3" | "vp":
            return fit_law(points, law, approach=str(approach), **options)
        case "2":
            return fit_isoflop(points, **options)
        case "1":
            return fit_envelope(points, **options)
    raise UserError(
        f"no approach {approach}; there are 1 (training-curve envelope), 2 (isoFLOP minima), 3 (a law of the "
        "loss) and vp (the same by variable projection)"
    )


def fit_law(
    points: pd.DataFrame,
    law: str | Law = "chinchilla",
    *,
    approach: str = "3",
    loss: str = "huber:1e-3",
    on: str = "log",
    weights: str | None = None,
    fixed: Mapping[str, float] | None = None,
    tied: Mapping[str, str] | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    bootstrap: int = 1000,
    level: float = 0.9,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
    where: str | None = None,
    counting: str = "as given in the table",
    flops_per_nd: float = 6.0,
    say: resampling.Say = lambda _: None,
) -> Fit:
    """Fits `law` to a table with a row a run.

    loss, on: what is minimised (objectives.py); vp is least squares of L itself. weights: a column or an
    expression of columns, such as "1/std**2". fixed, tied, bounds: see `Choices`; ties are the law's own
    unless given. bootstrap: how many refits the intervals come from (resampling.py). counting,
    flops_per_nd: what N counts and C / (N D), kept with the result. say: hears how far the fit of a large
    table is. Raises UserError for a table or a question that can't be answered.
    """
    law, projecting = laws.law(law), approach == "vp"
    if projecting:
        loss, on = "l2", "raw"
    aim = objective(loss, on)
    checked = check_points(points, (*law.inputs, law.output), columns, where, weights, flops_per_nd)
    choices = Choices(dict(fixed or {}), dict(law.ties if tied is None else tied), dict(bounds or {}))
    problem, data, grid, names = pose(law, checked, aim, choices)
    warnings = check_enough(problem, names)

    projected = projection.project(problem, names) if projecting else None
    if projected:
        ends = starts = projection.solve(projected, data)
    else:
        ends, starts = _from_grid(problem, grid, data, say)
    best = int(ends.objective.argmin())
    # A perfect fit has an objective of rounding errors only, hence the second term.
    agree = starts.objective <= starts.objective.min() * (1 + 1e-6) + 1e-24 * data.y.size
    if starts is not ends:
        note = f"starts are led by {_FEW} of the rows, and agree on those; the best {_KEPT} go on with all"
        checked = dataclasses.replace(checked, notes=(*checked.notes, note))
    end = solver.narrowed(problem, ends.free[best : best + 1], data)
    if not (ends.converged[best] and end.converged[0]):
        warnings.append("the descent to the optimum stopped before it converged")
    if bootstrap and checked.runs < len(names) + resampling.SPARE:
        warnings.append(
            f"no intervals: {checked.runs} runs for {len(names)} parameters; drawing them anew tells nothing"
        )
        bootstrap = 0
    draws = resampling.refits(problem, end.free, data, checked.clusters, bootstrap, seed, say)
    if len(draws) < bootstrap:
        warnings.append(f"{bootstrap - len(draws)} of {bootstrap} refits did not converge and are left out")
    residuals = data.y[0] - law.log_loss(problem.theta(end.free), problem.x)[0]
    remarks = far_runs(checked, residuals), off_budget(with_compute(checked.frame, flops_per_nd))
    warnings += filter(None, remarks)
    doubts, condition, hit = judge(problem, end.free, draws, names, agree, choices)
    lowest = float(checked.frame[law.output].min())
    if law.output == "loss" and choices.fixed.get("E", 0.0) >= lowest:
        warnings.append(f"E={choices.fixed['E']:g} is fixed above the lowest loss, {lowest:g}")
    fitted = Fit(
        law=law,
        theta=problem.theta(end.free)[0],
        draws=problem.theta(draws),
        problem=problem,
        data=data,
        best=end.free,
        objective=_reported(aim, problem, end, data),
        starts=len(agree),
        agreement=float(agree.mean()),
        condition=condition,
        bounds_hit=hit,
        residuals=residuals,
        points=checked,
        level=level,
        stretch=resampling.stretch(problem, end.free, data, checked.runs),
        fixed=choices.fixed,
        tied=choices.tied,
        conventions={
            "N": counting,
            "flops_per_nd": flops_per_nd,
            "loss": loss,
            "delta": None if np.isinf(aim.delta) else 0.0 if loss == "lad" else aim.delta,
            "share_above": aim.share,
            "on": aim.on,
            "reduction": f"sum over runs, each of weight {weights or 1}",
            "bounds": {name: list(ends) for name, ends in choices.bounds.items()},
            "ties": choices.tied,
            "resampled": resampling.METHOD,
            "columns": dict(columns or {}),
            "where": where,
            "weights": weights,
            "seed": seed,
        },
        warnings=(*warnings, *doubts),
        approach=approach if projecting else 3,
    )
    compute = with_compute(checked.frame, flops_per_nd)
    known = identified.of_optimum(fitted, 10 * float(compute["C"].max())) if "C" in compute else None
    if known and known.doubt:
        fitted = dataclasses.replace(fitted, warnings=(*fitted.warnings, known.doubt))
    return fitted


def refit(fit: Fit, problem: Problem, data: Data) -> np.ndarray:
    """The free parameters [1, F] that suit another problem or other data, from those of `fit` and around
    them.
    """
    jitter = 1 + 0.05 * np.random.default_rng(0).standard_normal((4, fit.best.shape[1]))
    starts = np.concatenate([fit.best, fit.best * jitter])
    ends = solver.minimise(solver.widened(problem), starts, data)
    return solver.narrowed(problem, ends.free[[ends.objective.argmin()]], data).free


def _from_grid(
    problem: Problem, grid: np.ndarray, data: Data, say: resampling.Say
) -> tuple[Solution, Solution]:
    """Where every start of the grid ends; slow ones that may be the best are followed to their end. And where
    all starts ended, which is the same unless few runs led.

    Thousands of runs are more than thousands of starts need: those are led by `_FEW` of the runs, evenly
    chosen, and the best `_KEPT` of their ends by all.
    """
    led = None
    if data.y.shape[1] > 10 * _FEW and len(grid) > _KEPT:
        few = np.linspace(0, data.y.shape[1] - 1, _FEW).astype(int)
        part = dataclasses.replace(problem, x={name: values[few] for name, values in problem.x.items()})
        say(f"{data.y.shape[1]:,} rows: {len(grid):,} starts on {_FEW} of them, then {_KEPT} on all")
        led = solver.minimise(solver.widened(part), grid, Data(*(each[:, few] for each in data)))
        grid = led.free[np.argsort(led.objective, kind="stable")[:_KEPT]]
    wide = solver.widened(problem)
    ends = solver.minimise(wide, grid, data)
    near = ~ends.converged & (ends.objective < 1.01 * ends.objective.min())
    ends = solver.resume(wide, ends, data, near)
    return ends, led or ends


def _reported(aim: Objective, problem: Problem, end: Solution, data: Data) -> float:
    """The objective at the optimum; for absolute deviations their sum, which a Huber bound would only
    scale.
    """
    if aim.delta > LAD_DELTA:
        return float(end.objective[0])
    rho = problem.objective.parts(problem.residuals(end.free, data)[0])[0]
    return float((data.weights * rho).sum() / LAD_DELTA + data.weights.sum() * LAD_DELTA / 2)
