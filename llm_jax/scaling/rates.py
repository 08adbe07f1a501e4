"""Was the learning rate right? A sweep's rule for it is checked where it fails first: at its ends."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd

from llm_jax.config import UserError


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
    def better(self) -> dict[float, float]:
        """The multiples that beat the rule by more than the spread, and by how many nats."""
        at_rule = np.mean(self.losses[1.0])
        gains = {m: at_rule - np.mean(values) for m, values in self.losses.items() if m != 1.0}
        return {m: float(gain) for m, gain in gains.items() if gain > self.spread}

    @property
    def doubtful(self) -> bool:
        """Whether the rate can't be called right."""
        return not self.judged or bool(self.better)

    def __str__(self) -> str:
        means = ", ".join(f"{m:g}x {np.mean(v):.4f}" for m, v in sorted(self.losses.items()))
        verdict = "rate not optimal at" if self.doubtful else "rate confirmed at"
        diverged = "" if self.judged else " (runs at the rule's own rate diverged)"
        spread = f"spread between seeds {self.spread:.4f}"
        return f"{verdict} N={self.N:,.0f}{diverged}: loss at {means}; {spread}"


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
