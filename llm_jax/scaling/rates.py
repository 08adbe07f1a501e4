"""Was the learning rate right? A rule is checked at its ends; a grid of rates has a best one inside it."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from llm_jax.config import UserError
from llm_jax.scaling.tables import SeedNoise

LEVEL = 0.9  # of the interval of a difference between two rates


@dataclasses.dataclass(frozen=True)
class RateCheck:
    """One model at multiples of the rule's rate, every one with the same seeds.

    losses: {multiple: loss of each seed [nats/token]}, nan where a run diverged. spread: the standard
    deviation between seeds, pooled over the multiples that didn't diverge.
    """

    N: float
    D: float
    losses: dict[float, tuple[float, ...]]
    spread: float

    @property
    def judged(self) -> bool:
        """Whether there is anything to compare: the rule's own runs converged, and seeds have a spread."""
        return bool(np.isfinite([*self.losses[1.0], self.spread]).all())

    @property
    def relative_spread(self) -> float:
        """The spread as a share of the loss: the noise of one run on ln loss (nan if it can't be judged)."""
        return self.spread / float(np.mean(self.losses[1.0]))

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the spread."""
        return sum(len(values) - 1 for values in self.losses.values() if np.isfinite(values).all())

    @property
    def error(self) -> float:
        """Standard error of the difference between two multiples' mean losses [nats/token]."""
        return self.spread * (2 / len(self.losses[1.0])) ** 0.5

    @property
    def bound(self) -> float:
        """Half the interval of such a difference, by Student's t (nan if it can't be judged)."""
        return float(stdtrit(self.freedom, (1 + LEVEL) / 2)) * self.error if self.judged else float("nan")

    @property
    def gains(self) -> dict[float, float]:
        """By how many nats each other multiple beats the rule; less than 0 where it loses, -inf if it
        diverged.
        """
        at_rule, others = np.mean(self.losses[1.0]), {m: v for m, v in self.losses.items() if m != 1.0}
        return {
            m: float(at_rule - np.mean(values)) if np.isfinite(values).all() else -np.inf
            for m, values in others.items()
        }

    @property
    def seed_noise(self) -> SeedNoise:
        """The spread as the noise of one run on ln loss, as forecasts take it."""
        return SeedNoise(self.relative_spread, self.freedom)

    @property
    def better(self) -> dict[float, float]:
        """The multiples that beat the rule by more than chance, and by how many nats."""
        return {m: gain for m, gain in self.gains.items() if gain > self.bound}

    @property
    def alike(self) -> dict[float, float]:
        """The multiples that seeds don't tell apart from the rule, and what they seem to gain."""
        return {m: gain for m, gain in self.gains.items() if abs(gain) <= self.bound}

    @property
    def doubtful(self) -> bool:
        """Whether the rate can't be called right."""
        return not self.judged or bool(self.better)

    @property
    def verdict(self) -> str:
        """Confirmed only where every other multiple is worse by more than chance."""
        if self.doubtful:
            return "rate not optimal"
        if self.alike:
            return f"rate not told apart from {' and '.join(f'{m:g}x' for m in self.alike)}"
        return "rate confirmed"

    def __str__(self) -> str:
        means = ", ".join(f"{m:g}x {np.mean(v):.4f}" for m, v in sorted(self.losses.items()))
        diverged = "" if self.judged else " (runs at the rule's own rate diverged)"
        error = f"standard error of a difference {self.error:.4f} ({self.freedom} degrees of freedom)"
        return f"{self.verdict} at N={self.N:,.0f}{diverged}: loss at {means}; {error}"


class Tuned(NamedTuple):
    """The best of several rates. value: of what was minimised there; edge: why it isn't known, or empty."""

    rate: float
    value: float
    edge: str = ""


def tuned(rates: Sequence[float], values: Sequence[float]) -> Tuned:
    """The rate of lowest value (a loss, the logarithm of a cost), by the parabola in ln rate through the
    lowest three.

    values: inf or nan where a run diverged or didn't get there; beside such a rate the lowest one itself is
    taken. `edge` says so if the lowest is the smallest or largest rate: the best may lie beyond it.
    """
    order = np.argsort(rates)
    x = np.log(np.asarray(rates, float)[order])
    y = np.asarray(values, float)[order]
    y = np.where(np.isfinite(y), y, np.inf)
    low = int(y.argmin())
    if not np.isfinite(y[low]):
        return Tuned(float("nan"), float("inf"), "at no rate did a run get there")
    if low in (0, len(y) - 1):
        return Tuned(
            float(np.exp(x[low])), float(y[low]), f"the {'largest' if low else 'smallest'} rate is the best"
        )
    if not np.isfinite(y[low - 1 : low + 2]).all():
        return Tuned(float(np.exp(x[low])), float(y[low]))
    c2, c1, c0 = np.polyfit(x[low - 1 : low + 2] - x[low], y[low - 1 : low + 2], 2)
    if c2 <= 0:  # three equal values
        return Tuned(float(np.exp(x[low])), float(y[low]))
    return Tuned(float(np.exp(x[low] - c1 / (2 * c2))), float(c0 - c1**2 / (4 * c2)))


class Tuning(NamedTuple):
    """Cells at their best rates: rows of the cell, seed, value, rate and tried; and why a cell has none."""

    points: pd.DataFrame
    refused: dict[Any, str]


def tune(runs: pd.DataFrame, by: str) -> Tuning:
    """Each seed's value at its cell's best rate.

    runs: columns `by` (the cell), rate, seed, and value, which is to be low (inf or nan: the run failed). The
    best rate is that of the lowest mean over seeds, none of which may fail; what the parabola's vertex gains
    over the best rate `tried` is taken off each seed's value. A best rate at the edge is refused.
    """
    rows, refused = [], {}
    for cell, group in runs.groupby(by, sort=False):
        means = group.groupby("rate")["value"].agg(lambda values: values.mean(skipna=False))
        best = tuned(means.index, means)
        if best.edge:
            refused[cell] = best.edge
            continue
        tried = means.idxmin()
        for row in group[group["rate"] == tried].itertuples():
            value = row.value - means[tried] + best.value
            rows.append({by: cell, "seed": row.seed, "value": value, "rate": best.rate, "tried": tried})
    return Tuning(pd.DataFrame(rows, columns=[by, "seed", "value", "rate", "tried"]), refused)


def check_rates(
    runs: pd.DataFrame, rule: Sequence[float], multiples: Sequence[float] = (0.5, 1.0, 2.0)
) -> list[RateCheck]:
    """Every (N, D) that was trained at all multiples of its rule's rate with the same seeds, two or more.

    runs: columns N, D, loss, seed, status, learning_rate. rule: for each row the rate that the rule gives.
    Raises UserError if no model was trained so.
    """
    table = runs.assign(multiple=(runs["learning_rate"] / np.asarray(rule, float)).round(6))
    checks = []
    for (N, D), cell in table.groupby(["N", "D"]):
        loss = cell["loss"].where(cell["status"] == "done")
        square = cell.assign(loss=loss).pivot_table(
            index="multiple", columns="seed", values="loss", aggfunc="first", dropna=False
        )
        present = cell.groupby("multiple")["seed"].agg(set)
        if not set(multiples) <= set(present.index):
            continue
        seeds = sorted(set.intersection(*(present[m] for m in multiples)))
        if len(seeds) < 2:
            continue
        losses = {float(m): tuple(square.loc[m, seeds].astype(float)) for m in multiples}
        variances = [np.var(v, ddof=1) for v in losses.values() if np.isfinite(v).all()]
        spread = float(np.sqrt(np.mean(variances))) if variances else float("nan")
        checks.append(RateCheck(float(N), float(D), losses, spread))
    if not checks:
        raise UserError("no model was trained at half, once and twice its rate with two seeds each")
    return checks
