"""How often 90% intervals hold the truth: noise of 0.3% and 1%, with and without outliers.

    make coverage                          # 200 sets, the table that LOG.md keeps
    python tests/scaling/interval_coverage.py 200 50000     # the same for other sets, from seed 50000 on

Each set is a sweep of 5 budgets x 7 sizes under a known law, fitted by the default objective with 300
refits. An outlier is one run a budget, at random, whose loss is 3% too high. forecast: the law's loss at 30
times the largest budget, at its optimum. Approach 2 has no E and no law of the loss, so it shows its exponent
and its minima (the share of budgets whose interval holds N_opt). Its parabolas are least squares, to which an
outlier is noise: with outliers its intervals are too wide, which is shown and not judged.
"""

import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
from known_laws import TRUTH, few_starts, optimum, sweep

from llm_jax.scaling.fits import fit_law
from llm_jax.scaling.isoflop import fit_isoflop

BEYOND = 30 * 1e22
OUTLIER, REFITS = 0.03, 300


class Row(NamedTuple):
    """One condition: the share of sets whose interval holds the truth, for each quantity."""

    kind: str
    noise: float
    outliers: bool
    shares: dict[str, float]

    @property
    def judged(self) -> bool:
        return self.kind == "runs" or not self.outliers

    def __str__(self) -> str:
        numbers = "  ".join(f"{name} {share:6.1%}" for name, share in self.shares.items())
        return (
            f"{self.kind:12} noise {self.noise:5.1%}  {'outliers' if self.outliers else 'clean':8}  {numbers}"
            f"{'' if self.judged else '  (not judged)'}"
        )


def dataset(noise: float, outliers: bool, seed: int) -> pd.DataFrame:
    """A sweep, perhaps with a bad run at every budget."""
    points = sweep(noise=noise, seed=seed)
    if outliers:
        bad = 7 * np.arange(5) + np.random.default_rng(10_000 + seed).integers(7, size=5)
        points.loc[bad, "loss"] *= 1 + OUTLIER
    return points


def measure(sets: int, refits: int = REFITS, first: int = 0) -> Iterator[Row]:
    """The table of coverage over `sets` sets from seed `first` on, row by row."""
    N_beyond = float(optimum(TRUTH, np.array(BEYOND)))
    D_beyond = BEYOND / 6 / N_beyond
    truth = {
        "a": TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"]),
        "E": TRUTH["E"],
        "forecast": TRUTH["E"]
        + TRUTH["A"] / N_beyond ** TRUTH["alpha"]
        + TRUTH["B"] / D_beyond ** TRUTH["beta"],
    }
    for noise in (0.003, 0.01):
        for outliers in (False, True):
            hits = {"runs": [], "approach 2": []}
            for seed in range(first, first + sets):
                points = dataset(noise, outliers, seed)
                fit = fit_law(points, few_starts(), bootstrap=refits, seed=seed)
                found = {
                    "a": fit.parameters["a"],
                    "E": fit.parameters["E"],
                    "forecast": fit.predict(N=N_beyond, D=D_beyond),
                }
                hits["runs"].append({name: e.low <= truth[name] <= e.high for name, e in found.items()})
                isoflop = fit_isoflop(points, bootstrap=refits, seed=seed)
                a, exact = isoflop.parameters["a"], optimum(TRUTH, np.array([c.C for c in isoflop.curves]))
                held = [o["N"].low <= N <= o["N"].high for o, N in zip(isoflop.optima, exact, strict=True)]
                held = [each for each, c in zip(held, isoflop.curves, strict=True) if not c.refused]
                hits["approach 2"].append({"a": a.low <= truth["a"] <= a.high, "minima": np.mean(held)})
            for kind, held in hits.items():
                yield Row(kind, noise, outliers, pd.DataFrame(held).mean().to_dict())


if __name__ == "__main__":
    number, first = (*map(int, sys.argv[1:]), *(200, 0)[len(sys.argv) - 1 :])
    begun = time.process_time()
    print(f"coverage of 90% intervals, {number} sets from seed {first} on, {REFITS} refits each")
    outside = 0
    for row in measure(number, first=first):
        print(row, flush=True)
        outside += row.judged and sum(not 0.85 <= share <= 0.95 for share in row.shares.values())
    print(f"{outside} shares outside 85 to 95%; {time.process_time() - begun:.0f} CPU seconds")
    sys.exit(min(outside, 1))
