"""Does loss on Python's own source follow L(N, D), and does the law hold beyond what it was fitted to?

Models of several sizes are trained at each of a few compute budgets (Hoffmann et al. 2022, Approaches 2 and
3). A law is fitted, a forecast for a larger budget is written down, and only then is that run trained.

    make quickstart
    python -m launch.local --config=experiments/isoflop.py:cpu --workers=2
    python -m launch.local --config=experiments/isoflop.py:smoke --workers=2

Cost: smoke 18 seconds, quickstart 4 minutes, cpu an hour, each on 2 CPU cores; gpu 25 minutes
on one H100 (not run); full some days on a pod, on a corpus of yours (not run). What was not run is estimated.

Result (quickstart, 2026-11-22): N_opt ~ C^0.53 (90% interval 0.42 to 0.65, Approach 2), C^0.43 (0.34 to 0.54,
Approach 3); the forecast for 4.4 times the largest budget was 1.572 nats/token (1.508 to 1.666), by
Approach 2; the hold-out reached 1.555. At cpu C^0.37 (0.14 to 0.61) and C^0.36 (0.30 to 0.46); the forecast
for 11 times the largest budget 1.250 (1.105 to 1.405), the hold-out 1.188.

Compute is C = 6 N D, where N counts the matrices of the body and of the logits, as Porian et al. 2024 do.
Every run, the hold-out too, sees each byte of the corpus at most once, and its decay ends at its own D.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from llm_jax import ladder
from llm_jax.config import UserError
from llm_jax.ladder import Shapes, shapes
from llm_jax.models.transformer import Transformer
from llm_jax.run import Run, Sweep
from llm_jax.scaling import fits, grids
from llm_jax.scaling import forecast as forecasting
from llm_jax.scaling import report as reports
from llm_jax.scaling.rates import RateCheck, check_rates
from llm_jax.values import check_least, write


@dataclasses.dataclass(frozen=True)
class Isoflop(Sweep, kind="isoflop"):
    """The grid: `sizes` models at every budget, from 1/`span` to `span` times the expected optimum.

    shapes: (width, layers) of the candidates. tokens_per_parameter: D/N expected at the optimum. The learning
    rate is the optimizer's at width 64 and goes with the width to the power `rate_exponent`, and with the
    tokens to the power -`horizon_exponent` (Bjorck et al. 2024: 0.32) from the base's on; the smallest and
    the largest model check it with `rate_seeds` seeds.
    """

    budgets_flops: tuple[float, ...] = (2e10, 4e10, 8e10, 1.6e11)
    holdout_flops: float = 7e11
    shapes: Shapes = shapes((*range(6, 21, 2), *range(24, 65, 4)), layers=2)
    sizes: int = 7
    span: float = 4.0
    tokens_per_parameter: float = 40.0
    rate_exponent: float = -0.7
    horizon_exponent: float = 0.0
    rate_seeds: int = 2
    minimum_steps: int = 100
    bootstrap: int = 1000

    def validate(self) -> None:
        check_least(self, "sweep.", ("tokens_per_parameter",), minimum_steps=1, bootstrap=100, rate_seeds=2)
        ladder.check_shapes(self.shapes)
        if len(self.budgets_flops) < 3:
            raise UserError(
                f"sweep.budgets_flops is {write(self.budgets_flops)}; three budgets at least: the law is "
                "tested on the largest, by a fit to the others"
            )
        if self.holdout_flops < 4 * max(self.budgets_flops):
            raise UserError(
                f"sweep.holdout_flops is {self.holdout_flops:.3g}; a check of the law lies at least 4 times "
                f"above the largest budget, {max(self.budgets_flops):.3g}"
            )


# The first is what --config=experiments/isoflop.py means.
SCALES = {
    "quickstart": Isoflop(),
    "smoke": Isoflop(
        budgets_flops=(2e8, 4e8, 8e8),
        holdout_flops=3.2e9,
        shapes=shapes((2, 4, 6, 8, 10), 1),
        sizes=5,
        minimum_steps=16,
        bootstrap=100,
    ),
    # The hold-out takes nearly all of the corpus, so it is larger than the optimum.
    "cpu": Isoflop(
        budgets_flops=(2e11, 4e11, 8e11, 1.6e12),
        holdout_flops=1.7e13,
        shapes=shapes((20, 24, 32, 40, 48, 56), 2) + shapes((64, 80, 96, 112, 128), 3),
        bootstrap=4000,
    ),
    "gpu": Isoflop(
        budgets_flops=(8e12, 1.6e13, 3.2e13, 6.4e13, 1.2e14),
        holdout_flops=1.25e15,
        shapes=shapes((48, 64, 80), 3) + shapes((96, 112, 128, 160), 4) + shapes((192, 224, 256, 320), 5),
        bootstrap=4000,
    ),
    "full": Isoflop(
        budgets_flops=(1e17, 3e17, 1e18, 3e18),
        holdout_flops=9e19,
        shapes=shapes((256, 320, 384, 448, 512), 8) + shapes((640, 768, 896, 1024, 1280, 1536), 12),
        tokens_per_parameter=20.0,
        bootstrap=4000,
    ),
}


def get_config(scale: str) -> Run:
    """The run that the sweep varies: its width, its depth, its tokens and its rate."""
    return Run(
        model=Transformer(layers=3, width=64, heads=4),
        data=ladder.text(scale),
        optimizer=ladder.OPTIMIZER,
        tokens=2**19,
        name=f"isoflop-{scale}",
        sweep=SCALES[scale],
        execution=ladder.execution(scale),
    )


# ---- the runs ----


def sweep(base: Run) -> list[Run]:
    """The grid, and the runs that check the rate at its smallest and its largest model."""
    grid = cells(base, "grid")
    runs = [ladder.run_of(base, cell) for cell in grid]
    # The smallest model at its smallest budget, the largest at its largest: the ends of the rule's range.
    ends = [f(grid, key=lambda cell: (cell["N"], cell["budget_flops"])) for f in (min, max)]
    return runs + [run for cell in ends for run in ladder.rate_runs(base, cell)]


def holdout(base: Run) -> list[Run]:
    """The run that the forecast is for."""
    return [ladder.run_of(base, cell) for cell in cells(base, "holdout")]


def plan_notes(base: Run) -> list[str]:
    """What the plan says beyond its table."""
    longest = max(cell["D"] for cell in plan(base).cells.to_dict("records"))
    return [ladder.epoch_note(base, longest), *plan(base).notes]


@functools.cache
def plan(base: Run) -> grids.Grid:
    """The grid and the hold-out as numbers, within one epoch of the corpus."""
    settings = base.sweep
    sizes = ladder.candidates(base, settings.shapes)
    limits = grids.Limits(ladder.epoch_tokens(base), settings.minimum_steps)
    optimum = grids.ratio_optimum(sizes, settings.tokens_per_parameter)
    budgets = settings.budgets_flops
    grid = grids.isoflop(sizes, budgets, optimum, limits, settings.sizes, settings.span)
    return grid + grids.holdout(sizes, settings.holdout_flops, optimum, limits)


def cells(base: Run, role: str) -> list[dict[str, Any]]:
    table = plan(base).cells
    return table[table["role"] == role].to_dict("records")


# ---- the law ----


def rate_checks(base: Run, runs: pd.DataFrame) -> list[RateCheck]:
    """The smallest and the largest model at half and double the rule's rate."""
    table = ladder.points(runs[runs["role"].isin(["grid", "rate"])])
    rule = [ladder.rate(base, width, D) for width, D in zip(table["width"], table["D"], strict=True)]
    return check_rates(table, rule, ladder.MULTIPLES)


@functools.cache
def laws(bootstrap: int) -> dict[str, forecasting.MakeFit]:
    """What a forecast may be made with: the law of N and D, or the power law through the isoFLOP minima."""
    options = {"bootstrap": bootstrap, "counting": ladder.COUNTING}
    return {
        "Approach 3": forecasting.once(functools.partial(fits.fit, law="chinchilla", **options)),
        "Approach 2": forecasting.once(functools.partial(fits.fit, approach=2, **options)),
    }


def backtests(base: Run, grid: pd.DataFrame) -> dict[str, float]:
    """How far each law misses the budgets from the third on, fitted to smaller ones [rms of ln loss]."""
    done = grid[grid["status"] == "done"]
    made = laws(base.sweep.bootstrap)
    return {name: forecasting.backtest(make_fit, done) for name, make_fit in made.items()}


def back_tested(base: Run, grid: pd.DataFrame) -> list[str]:
    """Lines: each law at the largest budget, and the preferred one at every budget from the third on."""
    errors = backtests(base, grid)
    best = min(errors, key=errors.get)
    rolled = forecasting.rollout(laws(base.sweep.bootstrap)[best], grid[grid["status"] == "done"])
    told = " and ".join(f"{name} by {error:.2%}" for name, error in errors.items())
    chosen = (
        f"Fitted to smaller budgets, the laws miss the run nearest to the optimum: {told}; {best} forecasts."
    )
    return [chosen, *(f"Rollout of {best}, {one}" for one in rolled)]


def forecast(base: Run, runs: pd.DataFrame, run: Run) -> forecasting.Forecast:
    """The loss that `run` will reach, by the law that the back-test prefers; written before it starts."""
    grid = ladder.points(runs[runs["role"] == "grid"])
    errors = backtests(base, grid)
    fit = laws(base.sweep.bootstrap)[min(errors, key=errors.get)](grid)
    cell = next(cell for cell in cells(base, "holdout") if cell["D"] == run.tokens)
    noise = max((c.seed_noise for c in rate_checks(base, runs) if c.judged), default=None)
    return forecasting.make(fit, N=cell["N"], D=cell["D"], C=cell["flops"], seed_noise=noise)


def report(base: Run, folder: Path, runs: pd.DataFrame, forecasts: Mapping[str, Any]) -> dict[str, Any]:
    """Fits, prints and writes the report; returns its numbers."""
    grid = ladder.points(runs[runs["role"] == "grid"])
    fit, warnings, minima = laws(base.sweep.bootstrap), [], None
    try:
        minima = fit["Approach 2"](grid)
    except UserError as error:
        warnings.append(f"Approach 2: {error}")
    try:
        rates = rate_checks(base, runs)
    except UserError as error:
        rates = []
        warnings.append(f"rate not checked: {error}")
    diverged = runs[(runs["role"] == "holdout") & (runs["status"] == "diverged")]["name"]
    warnings += [f"the hold-out {name} diverged; its forecast stays unchecked" for name in diverged]
    result = reports.Report(
        title=f"IsoFLOP sweep: {base.name}",
        question=__doc__.splitlines()[0],
        runs=ladder.points(runs),
        law=fit["Approach 3"](grid),
        isoflop=minima,
        outcomes=forecasting.outcomes(forecasts, runs, grid),
        rates=rates,
        warnings=warnings,
        backtests=back_tested(base, grid),
        notes=plan_notes(base),
        curves=reports.training_curves(folder, grid),
    )
    page = reports.write(folder, result)
    print(reports.summary(result))
    pictures = ", ".join(sorted(picture.name for picture in folder.glob("*.png")))
    print(f"\nreport: {page}, and beside it {pictures}")
    return reports.facts(result)
