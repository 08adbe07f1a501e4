"""Does the best learning rate stay where it is as a model grows? Its drift with size, from a table of runs.

A size's losses over its rates are a curve with a minimum, and the minima over sizes a power law. Approach 2
does the same with budgets and sizes (isoflop.py), so it is what is used here: its C is the size, its N the
rate.
"""

import dataclasses

import numpy as np
import pandas as pd

from llm_jax.config import UserError
from llm_jax.scaling.curves import Curve, curve_of
from llm_jax.scaling.isoflop import fit_isoflop
from llm_jax.scaling.results import Estimate


@dataclasses.dataclass(frozen=True)
class Best:
    """One size's curve of loss over rate, and where it is lowest: rate, and its loss [nats/token].

    kept: the loss at the best rate of the smallest size. refused: why there is no minimum (then all are NaN).
    """

    size: float
    curve: Curve
    rate: Estimate
    loss: float
    kept: float
    refused: str


@dataclasses.dataclass(frozen=True)
class Drift:
    """The best rate ~ size^slope, by size; `refused` says why there is no slope."""

    best: tuple[Best, ...]
    slope: Estimate
    level: float
    noise: float
    refused: str
    warnings: tuple[str, ...]

    @property
    def transfers(self) -> bool:
        """Whether the slope is known to be near 0, one rate for all sizes: a narrow interval holds it."""
        return bool(-NEAR <= self.slope.low <= 0 <= self.slope.high <= NEAR)


NEAR = 0.25  # over eight times the width the best rate then moves by less than 1.7
NOTHING = Estimate(np.nan, np.nan, np.nan, np.nan)


def drift(runs: pd.DataFrame, bootstrap: int = 1000, window: int = 5) -> Drift:
    """The drift in a table of runs: columns size, rate, loss, seed, status, name.

    A minimum must lie between trained rates: where the lowest or the highest is best, that size is refused.
    window: rates that a size's parabola passes. Raises UserError where a size has fewer than 3 rates.
    """
    table = pd.DataFrame({"N": runs["rate"], "C": runs["size"].astype(float), "D": 1.0})
    table = table.assign(**{name: runs[name] for name in ("loss", "seed", "status", "name")})
    groups = {size: group[group["status"] == "done"] for size, group in table.groupby("C")}
    for size, group in groups.items():
        if group["N"].nunique() < 3:
            raise UserError(f"size {size:g}: {group['N'].nunique()} rates didn't diverge, a minimum needs 3")
    curves = [curve_of(group, "parabola", window) for group in groups.values()]
    try:
        fit = fit_isoflop(table, method="parabola", window=window, bootstrap=bootstrap)
    except UserError as error:
        best = [_best(curve, NOTHING, curves[0]) for curve in curves]
        return Drift(tuple(best), NOTHING, np.nan, np.nan, _of_rates(str(error)), ())
    found = zip(curves, (each["N"] for each in fit.optima), strict=True)
    best = [_best(curve, rate, curves[0]) for curve, rate in found]
    warnings = tuple(map(_of_rates, fit.warnings))
    return Drift(tuple(best), fit.parameters["a"], fit.level, fit.noise, "", warnings)


def _best(curve: Curve, rate: Estimate, smallest: Curve) -> Best:
    rate = rate._replace(value=curve.N)
    return Best(round(curve.C), curve, rate, curve.loss, _at(curve, smallest.N), _of_rates(curve.refused))


def _at(curve: Curve, rate: float) -> float:
    """The curve's loss at a rate; off its parabola, between the means of the rates on both sides."""
    if np.isfinite(near := curve.predict(np.array([rate]))[0]):
        return float(near)
    means = np.log(pd.Series(curve.losses).groupby(curve.sizes).mean())
    return float(np.exp(np.interp(np.log(rate), np.log(means.index), means, left=np.nan, right=np.nan)))


def _of_rates(text: str) -> str:
    """Approach 2's words for what they mean here."""
    for theirs, ours in (("isoFLOP ", ""), ("size", "rate"), ("budget", "size")):
        text = text.replace(theirs, ours)
    return text
