"""What a fit hangs on: refits with one choice changed, and without one budget."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from llm_jax.config import UserError
from llm_jax.scaling.curves import METHODS
from llm_jax.scaling.fits import refit
from llm_jax.scaling.isoflop import IsoflopFit, budgets_of, fit_isoflop
from llm_jax.scaling.objectives import objective
from llm_jax.scaling.results import Fit
from llm_jax.scaling.solver import Data, Problem
from llm_jax.scaling.tables import with_compute

_LOSSES = ("huber:1e-4", "huber:1e-3", "huber:1e-2", "lad", "l2")
_WORST = 0.02  # share of the runs of highest loss that a row leaves out


class HeldOut(NamedTuple):
    """A budget predicted by a fit to the others: rms and mean of ln measured - ln predicted, over `runs` of
    it.
    """

    C: float
    runs: int
    rms: float
    mean: float


class Variant(NamedTuple):
    """A refit with one choice changed: its parameters and derived numbers in natural units."""

    change: str
    runs: int
    values: dict[str, float]


def groups(fit: Fit) -> tuple[np.ndarray, np.ndarray]:
    """Each run's compute [n] (or the law's first input) and the number of its budget [n], in rising order.

    Of a law of the loss, low losses are what is extrapolated to: the last are the lowest. Runs that stand at
    no common budgets are cut into fifths, a hundred or more into tenths.
    """
    frame = with_compute(fit.points.frame, fit.conventions["flops_per_nd"])
    column = next((name for name in ("budget_flops", "C") if name in frame), fit.law.inputs[0])
    compute = frame[column].to_numpy(float)
    labels = budgets_of(frame.assign(budget_flops=compute))
    if labels.max() + 1 > min(len(labels) / 3, 20) or labels.max() == 0:
        parts = 5 if len(compute) < 100 else 10
        labels = np.minimum(parts * np.argsort(np.argsort(compute, kind="stable")) // len(compute), parts - 1)
    return compute, labels.max() - labels if column == "loss" else labels


def held_out(fit: Fit) -> list[HeldOut]:
    """Every budget predicted by a fit to the others, in rising order; the largest is an extrapolation.

    Budgets whose absence leaves too few runs are passed over.
    """
    compute, labels = groups(fit)
    out = []
    for label in np.unique(labels):
        kept = labels != label
        if kept.sum() <= fit.free:
            continue
        theta = fit.problem.theta(refit(fit, *_subset(fit, kept)))
        left = fit.data.y[0][~kept] - fit.law.log_loss(theta, fit.problem.x)[0][~kept]
        C = float(np.exp(np.log(compute[~kept]).mean()))
        out.append(HeldOut(C, int((~kept).sum()), float(np.sqrt((left**2).mean())), float(left.mean())))
    return out


def largest(fit: Fit, tests: Sequence[HeldOut]) -> HeldOut | None:
    """That of the largest budget; None where the others are too few to predict it."""
    compute, labels = groups(fit)
    last = float(np.exp(np.log(compute[labels == labels.max()]).mean()))
    return next((test for test in tests if last == test.C), None)


def variants(fit: Fit) -> Iterator[Variant]:
    """The fit as it is, then with another loss, another N, without a budget, without the highest losses."""
    yield _variant(fit, "as fitted", fit.problem, fit.data)
    if not fit.problem.objective.raw and fit.problem.objective.share == 1:
        for name in _LOSSES:
            if name != fit.conventions["loss"]:
                yield _variant(
                    fit, f"loss {name}", dataclasses.replace(fit.problem, objective=objective(name)), fit.data
                )
    frame = fit.points.frame
    for column in counted_otherwise(frame) if "N" in fit.law.inputs else ():
        x = dict(fit.problem.x) | {"N": np.log(frame[column].to_numpy(float))}
        yield _variant(fit, f"N counted as {column}", dataclasses.replace(fit.problem, x=x), fit.data)
    compute, labels = groups(fit)
    for label in np.unique(labels):
        kept = labels != label
        if kept.sum() > fit.free:
            low, high = compute[~kept].min(), compute[~kept].max()
            named = "loss" if "loss" in fit.law.inputs else "C"
            text = f"{named}={low:.3g}" if high < 1.2 * low else f"{named}={low:.2g} to {high:.2g}"
            yield _variant(fit, f"without {text}", *_subset(fit, kept))
    worst = max(1, round(_WORST * len(labels)))
    kept = fit.data.y[0] < np.sort(fit.data.y[0])[-worst]
    if kept.sum() > fit.free:
        yield _variant(
            fit, "without the highest " + ("loss" if worst == 1 else f"{worst} losses"), *_subset(fit, kept)
        )


class HeldOutMinimum(NamedTuple):
    """A budget's minimum by Approach 2 beside the power laws through the others: ln found - ln predicted."""

    C: float
    N: float
    D: float
    loss: float


def of_minima(fit: IsoflopFit) -> dict[str, Any]:
    """The same for Approach 2: other curves, windows and counts of N, and without one budget each."""
    terms, frame = fit.conventions, fit.points.frame
    asked = {name: terms[name] for name in ("method", "window", "weights", "flops_per_nd") if terms[name]}

    def again(change: str, frame: pd.DataFrame, **options: Any) -> Iterator[tuple[Variant, IsoflopFit]]:
        with contextlib.suppress(UserError):  # fewer than two minima are left
            found = fit_isoflop(frame, bootstrap=0, **asked | options)
            yield Variant(change, len(frame), {name: e.value for name, e in found.parameters.items()}), found

    rows = [next(again("as fitted", frame))[0]]
    for method in METHODS:
        if method != terms["method"]:
            rows += [row for row, _ in again(f"method {method}", frame, method=method)]
    for window in (3, 5, 7) if terms["window"] else ():
        if window // 2 != terms["window"] // 2:
            rows += [row for row, _ in again(f"window {window}", frame, window=window)]
    for column in counted_otherwise(frame):
        rows += [
            row for row, _ in again(f"N counted as {column}", frame.assign(N=frame[column].astype(float)))
        ]
    column = "budget_flops" if "budget_flops" in frame else "C"
    tests, labels, compute = [], budgets_of(frame), frame[column].to_numpy(float)
    for curve in fit.accepted:
        rest = labels != labels[np.argmin(np.abs(np.log(compute / curve.C)))]
        for row, others in again(f"without C={curve.C:.3g}", frame[rest]):
            rows.append(row)
            law = others.optimum(curve.C)
            missed = (np.log(getattr(curve, name) / getattr(law, name).value) for name in ("N", "D", "loss"))
            tests.append(HeldOutMinimum(curve.C, *map(float, missed)))
    highest = max(fit.curves, key=lambda curve: curve.C).C
    return {
        "leave_largest_out": next((test._asdict() for test in tests if highest == test.C), None),
        "leave_one_out": [test._asdict() for test in tests],
        "sensitivity": [row._asdict() for row in rows],
    }


def counted_otherwise(frame: pd.DataFrame) -> list[str]:
    """The columns N_... that count N in another way."""
    numbers = frame.select_dtypes("number")
    return [
        name
        for name in numbers
        if str(name).startswith("N_") and (numbers[name] > 0).all() and (numbers[name] != frame["N"]).any()
    ]


def facts(fit: Fit | IsoflopFit) -> dict[str, Any]:
    """Both as JSON values, for fit.json."""
    if isinstance(fit, IsoflopFit):
        return of_minima(fit)
    tests = held_out(fit)
    found = largest(fit, tests)
    return {
        "leave_largest_out": found and found._asdict(),
        "leave_one_out": [test._asdict() for test in tests],
        "sensitivity": [variant._asdict() for variant in variants(fit)],
    }


def table(content: dict[str, Any]) -> str:
    """`facts` as text."""
    rows = content["sensitivity"]
    names = list(rows[0]["values"])
    lines = [f"{'sensitivity':32} {'runs':>5} " + " ".join(f"{name:>10}" for name in names)]
    for row in rows:
        lines.append(
            f"  {row['change']:30} {row['runs']:5d} " + " ".join(f"{row['values'][n]:10.5g}" for n in names)
        )
    told = left_out(content)
    return "\n".join([*lines, told] if told else lines)


def left_out(content: dict[str, Any]) -> str:
    """How the others predict the largest budget, as text; "" where they can't."""
    last = content["leave_largest_out"]
    if not last:
        return ""
    if "runs" not in last:
        missed = ", ".join(f"{name} {np.expm1(last[name]):+.1%}" for name in ("N", "D", "loss"))
        return f"minimum of the largest budget ({last['C']:.3g}) beside the others' laws: {missed}"
    return (
        f"largest budget ({last['C']:.3g}, {last['runs']} runs) predicted by the others: "
        f"{last['rms']:.2%} rms, {last['mean']:+.2%} on average"
    )


def _variant(fit: Fit, change: str, problem: Problem, data: Data) -> Variant:
    theta = problem.theta(refit(fit, problem, data))
    return Variant(
        change, data.y.shape[1], {name: float(value[0]) for name, value in fit.values(theta).items()}
    )


def _subset(fit: Fit, kept: np.ndarray) -> tuple[Problem, Data]:
    x = {name: values[kept] for name, values in fit.problem.x.items()}
    return dataclasses.replace(fit.problem, x=x), Data(*(part[:, kept] for part in fit.data))
