"""How often 90% intervals hold the truth: noise of 0.3% and 1%, with and without outliers.

    make coverage                                       # 200 sets of every kind, the table that LOG.md keeps
    python tests/scaling/interval_coverage.py 200 50000             # for other sets, from seed 50000 on
    python tests/scaling/interval_coverage.py 200 50000 huber,vp    # of some kinds

Each set is a sweep of 5 budgets x 7 sizes under a known law, fitted with 300 refits: by Approach 3 with each
objective, by variable projection, and by Approach 2 with local parabolas and with Akima's splines; clusters:
nine runs of four rows that share their noise. An outlier is one run a budget, at random, whose loss is 3% too
high. forecast: the law's loss at 30 times the largest budget, at its optimum; run: what one more run of this
noise measures there. Approach 2 shows its exponent, its forecast (but none by splines, which give it no
interval) and its minima (the share of budgets whose interval holds N_opt). To least squares an outlier is
noise: with outliers their intervals are too wide, which is shown and not judged.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from known_laws import TRUTH, few_starts, optimum, sweep

from llm_jax.scaling.fits import fit_law
from llm_jax.scaling.isoflop import fit_isoflop

BEYOND = 30 * 1e22
EXPONENT = TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"])
OUTLIER, REFITS = 0.03, 300
LAWS = {
    "huber": {},
    "lad": {"loss": "lad"},
    "l2": {"loss": "l2"},
    "vp": {"approach": "vp"},
    "clusters": {},
}
MINIMA = {"local": {}, "akima": {"method": "akima"}}
KINDS = (*LAWS, *MINIMA)
CONDITIONS = ((0.003, False), (0.003, True), (0.01, False), (0.01, True))


class Row(NamedTuple):
    """One condition: the share of sets whose interval holds the truth, for each quantity."""

    kind: str
    noise: float
    outliers: bool
    shares: dict[str, float]

    @property
    def judged(self) -> dict[str, float]:
        """The shares that have to be right: to robust fits an outlier is none of the noise, but what one more
        run measures they then tell with caution.
        """
        if not self.outliers:
            return self.shares
        robust = self.kind in ("huber", "lad")
        return {name: share for name, share in self.shares.items() if robust and name != "run"}

    def __str__(self) -> str:
        numbers = "  ".join(f"{name} {share:6.1%}" for name, share in self.shares.items())
        return (
            f"{self.kind:12} noise {self.noise:5.1%}  {'outliers' if self.outliers else 'clean':8}  {numbers}"
            f"{'' if self.judged else '  (not judged)'}"
        )


def dataset(noise: float, outliers: bool, seed: int, clusters: bool = False) -> pd.DataFrame:
    """A sweep, perhaps with a bad run at every budget, perhaps with noise that rows of a run share."""
    points = sweep(noise=0.0 if clusters else noise, seed=seed)
    if clusters:
        run = np.arange(len(points)) // 4
        shared = np.random.default_rng(20_000 + seed).normal(size=run.max() + 1)
        points = points.assign(run=run, loss=points["loss"] * np.exp(noise * shared[run]))
    if outliers:
        bad = 7 * np.arange(5) + np.random.default_rng(10_000 + seed).integers(7, size=5)
        points.loc[bad, "loss"] *= 1 + OUTLIER
    return points


def measure(
    sets: int,
    refits: int = REFITS,
    first: int = 0,
    kinds: Sequence[str] = KINDS,
    conditions: Sequence[tuple[float, bool]] = CONDITIONS,
) -> Iterator[Row]:
    """The table of coverage over `sets` sets from seed `first` on, row by row."""
    for noise, outliers in conditions:
        for kind in kinds:
            held = of_law if kind in LAWS else of_minima
            hits = [
                held(
                    dataset(noise, outliers, seed, kind == "clusters"),
                    kind,
                    noise,
                    bootstrap=refits,
                    seed=seed,
                )
                for seed in range(first, first + sets)
            ]
            yield Row(kind, noise, outliers, pd.DataFrame(hits).mean().to_dict())


def beyond() -> tuple[float, float, float]:
    """N, D and the law's loss at 30 times the largest budget, at its optimum."""
    N = float(optimum(TRUTH, np.array(BEYOND)))
    D, (E, A, alpha, B, beta) = BEYOND / 6 / N, TRUTH.values()
    return N, D, E + A / N**alpha + B / D**beta


def of_law(points: pd.DataFrame, kind: str, noise: float, **options: int) -> dict[str, bool]:
    """Whether the intervals of the exponent, of E, of the forecast and of one more run hold."""
    fit, (N, D, loss) = fit_law(points, few_starts(), **LAWS[kind], **options), beyond()
    run = loss * np.exp(noise * np.random.default_rng(30_000 + options["seed"]).normal())
    found = fit.parameters["a"], fit.parameters["E"], fit.predict(N=N, D=D), fit.one_run(N=N, D=D)
    truth = zip(("a", "E", "forecast", "run"), (EXPONENT, TRUTH["E"], loss, run), found, strict=True)
    return {name: e.low <= value <= e.high for name, value, e in truth}


def of_minima(points: pd.DataFrame, kind: str, noise: float, **options: int) -> dict[str, float]:
    """Whether those of the exponent and of the forecast hold, and the share of the budgets' N_opt that do."""
    fit = fit_isoflop(points, **MINIMA[kind], **options)
    a, best = fit.parameters["a"], fit.optimum(BEYOND).loss
    exact = optimum(TRUTH, np.array([curve.C for curve in fit.curves]))
    minima = [
        o["N"].low <= N <= o["N"].high
        for o, N, curve in zip(fit.optima, exact, fit.curves, strict=True)
        if not curve.refused
    ]
    held = {"a": a.low <= EXPONENT <= a.high}
    if not np.isnan(best.low):
        held["forecast"] = best.low <= beyond()[2] <= best.high
    return held | {"minima": np.mean(minima)}


if __name__ == "__main__":
    given = dict(zip(("number", "first", "kinds"), sys.argv[1:], strict=False))
    number, first = int(given.get("number", 200)), int(given.get("first", 0))
    begun = time.process_time()
    print(f"coverage of 90% intervals, {number} sets from seed {first} on, {REFITS} refits each")
    outside = 0
    for row in measure(number, first=first, kinds=given["kinds"].split(",") if "kinds" in given else KINDS):
        print(row, flush=True)
        outside += sum(not 0.85 <= share <= 0.95 for share in row.judged.values())
    print(f"{outside} shares outside 85 to 95%; {time.process_time() - begun:.0f} CPU seconds")
    sys.exit(min(outside, 1))
