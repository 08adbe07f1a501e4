"""How large a batch pays: steps and examples to a loss, and the noise of gradients that explains them.

McCandlish et al. 2018 (arXiv:1812.06162). Training to a given loss in batches of B takes S steps and E = B S
examples with (S/S_min - 1)(E/E_min - 1) = 1, which is S = S_min + E_min/B; the critical batch E_min/S_min
costs twice the least of both. It should be near the simple noise scale tr(covariance) / |gradient|^2.
Batches are counted in tokens here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from llm_jax.config import UserError
from llm_jax.files import with_nulls
from llm_jax.scaling import fits
from llm_jax.scaling.law import Parameter, SumOfPowers, coefficient, exponent
from llm_jax.scaling.rates import Tuning, tune
from llm_jax.scaling.results import Estimate, Fit, estimate


class Tradeoff(SumOfPowers):
    """McCandlish et al. 2018, eq. 2.11 is a = 1; a free `a` asks whether that holds."""

    name = "tradeoff"
    formula = "S = S_min + E_min/B^a"
    inputs = ("B",)
    parameters = (
        Parameter("S_min", tuple(np.arange(0.0, 15, 2)), log=True, lower=-12.0),
        coefficient("E_min"),
        exponent("a", (0.5, 1.0, 1.5)),
    )
    terms = (("S_min", ()), ("E_min", (("B", "a"),)))

    def derived(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch at which both terms are equal."""
        with np.errstate(over="ignore"):
            return {"B_crit": (values["E_min"] / values["S_min"]) ** (1 / values["a"])}


def noise_scale(small: float, big: float, small_square: float, big_square: float) -> tuple[float, float]:
    """tr(covariance) of one token's gradient, and |true gradient|^2, unbiased, from those of two batches.

    small, big: tokens of the two. Average both over measurements before taking their ratio, the
    simple noise scale [tokens]. McCandlish et al. 2018, eqs. A.2 and A.3.
    """
    square = (big * big_square - small * small_square) / (big - small)
    return (small_square - big_square) / (1 / small - 1 / big), square


def pooled_noise_scale(traces: Sequence[float], squares: Sequence[float], level: float = 0.9) -> Estimate:
    """The ratio of sums over measurements, with the interval of measurements drawn with replacement.

    Raises UserError where the gradient can't be told from its noise.
    """
    traces, squares = np.asarray(traces, float), np.asarray(squares, float)
    if not len(traces) or squares.sum() <= 0:
        raise UserError("no noise scale: the gradient isn't told from its noise; measure larger batches")
    drawn = np.random.default_rng(0).integers(0, len(traces), (1000 if len(traces) > 1 else 0, len(traces)))
    # A draw without a gradient has noise beyond all bounds.
    above = np.maximum(squares[drawn].sum(1), 1e-9 * squares.sum())
    return estimate(traces.sum() / squares.sum(), traces[drawn].sum(1) / above, level)


def steps_to(curve: pd.DataFrame, target: float) -> float:
    """The first step at which `curve` (step, loss) is at `target` or below; inf if it never is.

    Between two rows the loss is taken to be linear in ln step.
    """
    steps, losses = curve["step"].to_numpy(float), curve["loss"].to_numpy(float)
    reached = np.flatnonzero(losses <= target)
    if not len(reached):
        return np.inf
    after = reached[0]
    if after == 0:
        return float(steps[0])
    share = (losses[after - 1] - target) / (losses[after - 1] - losses[after])
    return float(np.exp(np.log(steps[after - 1]) + share * np.log(steps[after] / steps[after - 1])))


def fit_tradeoff(points: pd.DataFrame, free: bool = False, **options: Any) -> Fit:
    """S = S_min + E_min/B (`free`: any power of B) through points of B and steps, least squares of ln steps.

    Raises UserError for fewer than four batches.
    """
    batches = points["B"].nunique()
    if batches < 4:
        raise UserError(f"a trade-off of steps and examples needs 4 batch sizes that get there; {batches} do")
    fixed = {} if free else {"a": 1.0}
    return fits.fit_law(points, Tradeoff(), loss="l2", fixed=fixed, columns={"loss": "steps"}, **options)


@dataclasses.dataclass(frozen=True)
class AtLoss:
    """All that was found at one loss; what could not be is None, with the reason in `warnings`.

    power: the exponent of B where it is free. noise: the simple noise scale [tokens] as runs pass the loss.
    """

    loss: float
    tuning: Tuning
    fit: Fit | None
    power: Estimate | None
    noise: Estimate | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "loss": self.loss,
            "fit": self.fit and self.fit.to_json(),
            "power": self.power and with_nulls(self.power._asdict()),
            "noise_scale": self.noise and with_nulls(self.noise._asdict()),
            "refused": {f"{B:g}": why for B, why in self.tuning.refused.items()},
        }


def at_loss(loss: float, curves: Sequence[pd.DataFrame], bootstrap: int = 1000, near: float = 0.1) -> AtLoss:
    """The trade-off and the noise at one loss.

    curves: a table a run of step, loss, and trace and square as `noise_scale` gives them; its attrs are B,
    seed and rate. The noise is that of the runs at their batch's best rate, within `near` nats of the loss.
    """
    costs = [np.log(steps_to(curve, loss)) for curve in curves]
    tuning = tune(pd.DataFrame([curve.attrs for curve in curves]).assign(value=costs), "B")
    tuning.points["steps"] = np.exp(tuning.points["value"])
    warnings = [f"B={B:g} left out: {why}" for B, why in tuning.refused.items()]
    fit = power = noise = None
    try:
        fit = fit_tradeoff(tuning.points, bootstrap=bootstrap)
        warnings += fit.warnings
        power = fit_tradeoff(tuning.points, free=True, bootstrap=bootstrap).parameters["a"]
    except UserError as error:
        warnings.append(str(error))
    best = set(zip(tuning.points["B"], tuning.points["tried"], strict=True))
    chosen = [c[(c["loss"] - loss).abs() < near] for c in curves if (c.attrs["B"], c.attrs["rate"]) in best]
    means = [curve[["trace", "square"]].mean() for curve in chosen if len(curve)]
    try:
        noise = pooled_noise_scale([mean["trace"] for mean in means], [mean["square"] for mean in means])
    except UserError as error:
        warnings.append(str(error))
    return AtLoss(loss, tuning, fit, power, noise, tuple(warnings))
