"""Forecasts as tests: the loss of a larger run, written down with its interval before that run starts.

    made = forecast.make(fit, N=..., D=..., C=...)
    forecast.write(made, "runs/x/forecast.json", holdout="runs/x/holdout")     # before the hold-out run
    forecast.check(forecast.read("runs/x/forecast.json"), measured)            # after it

The interval is that of one more measured loss: the bootstrap's spread of the law's parameters, and the
noise of a single run on top. Small sweeps (15 to 20 runs for 5 parameters) leave few residuals to tell the
noise by, so its size is scaled for the parameters spent and its shape is Student's t. What no interval
covers is that the law itself may stop holding; that is what the hold-out run is for.
"""

import dataclasses
import datetime
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from llm_jax import files
from llm_jax.config import UserError
from llm_jax.files import with_nulls, write_atomically
from llm_jax.scaling.isoflop import IsoflopFit
from llm_jax.scaling.resampling import one_run
from llm_jax.scaling.results import Fit
from llm_jax.scaling.tables import SeedNoise

SCHEMA = 1

MakeFit = Callable[[pd.DataFrame], Fit | IsoflopFit]
METHOD = (
    "by Approach {approach}, {formula}; interval: percentiles of ln loss over {draws} bootstrap refits, "
    "plus run-to-run noise of {noise:.2%} ({source}) as Student's t with {freedom} degrees of freedom"
)


@dataclasses.dataclass(frozen=True)
class Forecast:
    """The loss expected at one N, D.

    loss: the fitted law there [nats/token]. intervals: {level: (low, high)} for one measured loss.
    noise: standard deviation of ln loss of one run; seed_noise: that between seeds, if measured.
    fitted_flops: the largest fitted budget. points_hash: of N, D and loss of every fitted run.
    """

    N: float
    D: float
    C: float
    loss: float
    intervals: dict[float, tuple[float, float]]
    noise: float
    method: str
    law: dict[str, Any]
    points: int
    points_hash: str
    fitted_flops: float
    written_utc: str
    seed_noise: float | None = None

    @property
    def extrapolation(self) -> float:
        """How many times the largest fitted budget the forecast run costs."""
        return self.C / self.fitted_flops


@dataclasses.dataclass(frozen=True)
class Check:
    """A forecast against what was measured: error = measured - forecast [nats/token]; covered by level.

    in_noise: the error in ln loss, in standard deviations of one run's noise; in_seed_noise: of seeds'.
    """

    measured: float
    error: float
    relative_error: float
    in_noise: float
    covered: dict[float, bool]
    in_seed_noise: float | None = None


class Outcome(NamedTuple):
    """A forecast, and its check once the hold-out run is done."""

    forecast: Forecast
    check: Check | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "forecast": dataclasses.asdict(self.forecast),
            "check": self.check and dataclasses.asdict(self.check),
        }


def outcomes(
    forecasts: Mapping[str, Forecast], runs: pd.DataFrame, points: pd.DataFrame | None = None
) -> list[Outcome]:
    """Each forecast (by its run's identity), and its `check` against that run in `runs` if it is done."""
    losses = runs[runs["status"] == "done"].set_index("identity")["loss"]
    return [
        Outcome(made, check(made, losses[identity], points) if identity in losses else None)
        for identity, made in forecasts.items()
    ]


def miss(fit: Fit | IsoflopFit, made: Forecast, measured: float, level: float = 0.9) -> str:
    """How far `fit` lies from what a forecast's run reached, if outside its interval for one run; else "".

    For the fits that the forecast was not made with: what they say wasn't written down before.
    """
    log_loss, draws = fit.extrapolate(made.N, made.D, made.C)
    if len(draws) < 100 or fit.freedom < 1:
        return ""
    run = one_run(draws, max(fit.noise, made.noise), fit.freedom)
    low, high = np.exp(np.quantile(run, [(1 - level) / 2, (1 + level) / 2]))
    if low <= measured <= high:
        return ""
    error = np.log(measured) - log_loss
    return (
        f"Approach {fit.approach}, {fit.formula}, misses the hold-out by {error:+.1%}: {measured:.4f} "
        f"lies outside its {level:.0%} interval, {low:.4f} to {high:.4f}; the law does not hold that far"
    )


def fitted_flops(fit: Fit | IsoflopFit) -> pd.Series:
    """C of every fitted run: the table's, or flops_per_nd * N * D where it has none."""
    points = fit.points.frame
    return points["C"] if "C" in points else fit.conventions["flops_per_nd"] * points["N"] * points["D"]


def once(make_fit: MakeFit) -> MakeFit:
    """The same, but tables with the same runs are fitted once."""
    made: dict[str, Fit | IsoflopFit] = {}

    def fit(points: pd.DataFrame) -> Fit | IsoflopFit:
        key = hash_points(points)
        if key not in made:
            made[key] = make_fit(points)
        return made[key]

    return fit


def make(
    fit: Fit | IsoflopFit,
    N: float,
    D: float,
    C: float | None = None,
    levels: Sequence[float] = (0.9, 0.95),
    seed_noise: SeedNoise | None = None,
    seed: int = 0,
) -> Forecast:
    """The forecast of `fit` for a run of N parameters on D tokens.

    C: its FLOPs (default: flops_per_nd * N * D, by the fit's conventions). seed_noise: where runs were
    repeated; it counts, with its own degrees of freedom, if it exceeds the residuals'.
    Raises UserError for a fit without bootstrap draws or with no residuals to spare.
    """
    if len(fit.draws) < 100 or fit.freedom < 1:
        raise UserError(
            f"a forecast needs 100 bootstrap refits and more runs than parameters; this fit has "
            f"{len(fit.draws)} refits and {len(fit.points.frame)} runs"
        )
    noise, freedom, source = fit.noise, fit.freedom, "residuals of the fit"
    repeated = seed_noise is not None and seed_noise.freedom > 0
    if repeated and seed_noise.deviation > noise:
        noise, freedom, source = *seed_noise, "spread between seeds"
    C = float(fit.conventions["flops_per_nd"] * N * D if C is None else C)
    log_loss, drawn = fit.extrapolate(N, D, C)
    draws = one_run(drawn, noise, freedom, seed)
    points = fit.points.frame
    return Forecast(
        N=float(N),
        D=float(D),
        C=C,
        loss=float(np.exp(log_loss)),
        intervals={q: tuple(np.exp(np.quantile(draws, [(1 - q) / 2, (1 + q) / 2])).tolist()) for q in levels},
        noise=noise,
        method=METHOD.format(
            approach=fit.approach,
            formula=fit.formula,
            draws=len(fit.draws),
            noise=noise,
            source=source,
            freedom=freedom,
        ),
        law=with_nulls(
            {"formula": fit.formula, "parameters": {k: e.value for k, e in fit.parameters.items()}}
        ),
        points=len(points),
        points_hash=hash_points(points),
        fitted_flops=float(fitted_flops(fit).max()),
        written_utc=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seed_noise=seed_noise.deviation if repeated else None,
    )


class Rolled(NamedTuple):
    """One budget forecast from the smaller ones: the loss of its run that is nearest to the optimum then
    forecast, the forecast, its 90% interval (or NaN).
    """

    C: float
    fitted_flops: float
    measured: float
    loss: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """ln measured - ln forecast."""
        return float(np.log(self.measured / self.loss))

    def __str__(self) -> str:
        beyond = f"{self.C:.3g} FLOPs from {self.C / self.fitted_flops:.2g} times less"
        verdict = ", no interval"
        if np.isfinite(self.low):
            covered = self.low <= self.measured <= self.high
            verdict = (
                f", {'inside' if covered else 'OUTSIDE'} its 90% interval {self.low:.4f} to {self.high:.4f}"
            )
        return (
            f"{beyond}: measured {self.measured:.4f}, forecast {self.loss:.4f} ({self.error:+.2%}){verdict}"
        )


def rollout(make_fit: MakeFit, points: pd.DataFrame) -> list[Rolled]:
    """Every budget from the third on, forecast by a fit to all smaller budgets alone.

    points: columns budget_flops, N, D, C, loss. One budget alone can't tell what N does from what D does.
    Budgets whose smaller ones allow no fit are passed over. The run that is judged is chosen before its loss
    is known: the lowest of a budget is its luckiest, and a law that forecasts too low would suit it.
    """
    budgets = np.unique(points["budget_flops"])[2:]
    rolled = (_rolled(make_fit, points, budget) for budget in budgets)
    return [one for one in rolled if one is not None]


def backtest(make_fit: MakeFit, points: pd.DataFrame) -> float:
    """Rms of ln measured / forecast over the `rollout`; infinite where the largest budget isn't among it."""
    rolled = rollout(make_fit, points)
    largest = points.loc[points["budget_flops"] == points["budget_flops"].max(), "C"]
    if not rolled or rolled[-1].C not in set(largest):
        return float("inf")
    return float(np.sqrt(np.mean([one.error**2 for one in rolled])))


def _rolled(make_fit: MakeFit, points: pd.DataFrame, budget: float) -> Rolled | None:
    runs = points[points["budget_flops"] == budget]
    try:
        fit = make_fit(points[points["budget_flops"] < budget])
        optimum = fit.optimum(float(np.exp(np.log(runs["C"].astype(float)).mean()))).N.value
    except UserError:
        return None
    nearest = runs.iloc[np.abs(np.log(runs["N"].to_numpy(float) / optimum)).argmin()]
    log_loss, draws = fit.extrapolate(nearest.N, nearest.D, nearest.C)
    ends = np.full(2, np.nan)
    if len(draws) >= 100 and fit.freedom >= 1:
        ends = np.exp(np.quantile(one_run(draws, fit.noise, fit.freedom), [0.05, 0.95]))
    measured = float(nearest.loss)
    return Rolled(
        float(nearest.C), float(fitted_flops(fit).max()), measured, float(np.exp(log_loss)), *map(float, ends)
    )


def write(forecast: Forecast, path: str | pathlib.Path, holdout: str | pathlib.Path) -> Forecast:
    """Writes the forecast to `path`, and returns what stands there.

    holdout: the folder that the hold-out run will have. The same forecast (runs, law, N and D alike) is left
    as it was first written. Raises UserError once the hold-out run has started.
    """
    path, holdout = files.path(path), files.path(holdout)
    if path.exists():
        earlier = read(path)
        if _question(earlier) == _question(forecast):
            return earlier
    if any((holdout / name).exists() for name in ("config.json", "result.json")):
        raise UserError(
            f"{path}: its hold-out run {holdout} has started, so the forecast can't be "
            f"{'changed' if path.exists() else 'written'} any more; remove that run's folder to forecast anew"
        )
    content = {"schema": SCHEMA} | dataclasses.asdict(forecast)
    content["intervals"] = {str(level): list(ends) for level, ends in forecast.intervals.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content | {"hash": _hash(content)}, indent=1) + "\n")
    return forecast


def read(path: str | pathlib.Path) -> Forecast:
    """The forecast at `path`; UserError where there is none or it was changed after it was written."""
    path = files.path(path)
    if not path.is_file():
        raise UserError(f"no forecast at {path}")
    try:
        content = json.loads(path.read_text())
        written = content.pop("hash")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{path} is no forecast: not a JSON object with a hash") from None
    if _hash(content) != written:
        raise UserError(
            f"{path} was changed after it was written (its hash is {_hash(content)}, not {written})"
        )
    if content.pop("schema") != SCHEMA:
        raise UserError(f"{path} was written by another version of llm_jax")
    content["intervals"] = {float(level): tuple(ends) for level, ends in content["intervals"].items()}
    return Forecast(**content)


def check(forecast: Forecast, measured: float, points: pd.DataFrame | None = None) -> Check:
    """The forecast against the hold-out's loss [nats/token].

    points: the fitted runs as they are now; UserError if they aren't those that the forecast was made from.
    """
    if not (np.isfinite(measured) and measured > 0):
        raise UserError(f"the hold-out's loss is {measured}; a forecast is checked against a positive number")
    if points is not None and hash_points(points) != forecast.points_hash:
        raise UserError(f"the fitted runs aren't those of the forecast written {forecast.written_utc}")
    error = float(measured - forecast.loss)
    covered = {level: low <= measured <= high for level, (low, high) in forecast.intervals.items()}
    off, seeds = float(np.log(measured / forecast.loss)), forecast.seed_noise
    in_noise, in_seed_noise = off / forecast.noise, off / seeds if seeds else None
    return Check(float(measured), error, error / forecast.loss, in_noise, covered, in_seed_noise)


def hash_points(points: pd.DataFrame) -> str:
    """A hash of N, D and loss of every run that is done, in whatever order they stand."""
    if "status" in points:
        points = points[points["status"] == "done"]
    rows = points[["N", "D", "loss"]].astype(float).sort_values(["N", "D", "loss"])
    return _hash(rows.to_numpy().tolist())


def _question(forecast: Forecast) -> tuple:
    return forecast.points_hash, forecast.law["formula"], forecast.N, forecast.D, sorted(forecast.intervals)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
