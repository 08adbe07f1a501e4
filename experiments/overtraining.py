"""Does the loss of a model trained on far more tokens than is optimal follow from a sweep of shorter runs?

Gadre et al. 2024 (arXiv:2403.08540): with M = D/N tokens a parameter, L = E + (a M^eta + b M^-eta) C^-eta, so
every M has the same exponent in C, and runs of small M foretell those of large M. Several sizes are trained
at each of a few budgets, M from 4 to 160; the law is fitted, the forecast of a run with more compute and
M three times larger is written down, and only then is it trained.

    python -m launch.local --config=experiments/overtraining.py:cpu --workers=2
    python -m launch.local --config=experiments/overtraining.py:smoke --workers=2

Cost: smoke 15 seconds, cpu 5 CPU minutes, without the runs of other seeds; not run, estimated: gpu half an
hour on one H100, full some days on a pod.

Result (cpu, 2026-11-22), negative: inside the sweep the law holds to 1.1% and the best ratio is 24 tokens a
parameter (90% interval 19 to 29), but at ten times its largest budget and M = 480 it forecast 2.013 (1.947
to 2.093), and the run reached 1.929. eta is 0.27 (0.17 to 0.33), E 1.68 (1.32 to 1.81): 24 runs this small
leave the asymptote open. One exponent is barely refuted: alpha - beta is 0.03 to 0.51. That sweep had no
other seeds: the noise of one run was that of the residuals.

With C = 6 N D the law is Chinchilla's with alpha = beta = 2 eta; that law with both free is fitted too, and
says whether the exponents may be one.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llm_jax import ladder
from llm_jax.config import UserError
from llm_jax.ladder import COUNTING, Shapes, candidates, epoch_note, epoch_tokens, points, run_of, shapes
from llm_jax.models.transformer import Transformer
from llm_jax.run import Run, Sweep
from llm_jax.scaling import figures, fits, grids, page, plots
from llm_jax.scaling import forecast as forecasting
from llm_jax.scaling.page import Answer, Drawing, Page, Table
from llm_jax.scaling.report import fitted, too_small, verdict
from llm_jax.scaling.results import Fit
from llm_jax.scaling.style import power, short
from llm_jax.scaling.tables import SeedNoise, between_seeds
from llm_jax.values import check_least


@dataclasses.dataclass(frozen=True)
class Overtraining(Sweep, kind="overtraining"):
    """At each budget `sizes` models, M = D/N from `lowest` to `highest`; the hold-out has more of both.

    seeds: of the run nearest to the hold-out, which tell the noise of one run.
    """

    budgets_flops: tuple[float, ...] = (4e9, 8e9, 1.6e10, 3.2e10)
    holdout_flops: float = 3.2e11
    holdout_ratio: float = 512.0
    shapes: Shapes = shapes((6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40), 2)
    lowest: float = 4.0
    highest: float = 160.0
    sizes: int = 6
    seeds: int = 3
    rate_exponent: float = -0.7
    horizon_exponent: float = 0.0
    minimum_steps: int = 64
    bootstrap: int = 1000

    def validate(self) -> None:
        if not 0 < self.lowest < self.highest < self.holdout_ratio or self.bootstrap < 100:
            raise UserError(
                "0 < sweep.lowest < sweep.highest < sweep.holdout_ratio, and sweep.bootstrap >= 100"
            )
        check_least(self, "sweep.", seeds=1)
        if len(self.budgets_flops) < 3 or self.holdout_flops <= max(self.budgets_flops):
            raise UserError("sweep.budgets_flops needs 3, and sweep.holdout_flops lies above all of them")


def grown(widths: tuple[int, ...], layers: int, *budgets: float) -> Overtraining:
    """A sweep at all `budgets` but the last, which is the hold-out's."""
    return Overtraining(budgets[:-1], budgets[-1], shapes=shapes(widths, layers), minimum_steps=100)


SCALES = {
    "cpu": Overtraining(),
    "smoke": Overtraining(
        (2e8, 4e8, 8e8),
        3.2e9,
        shapes=shapes((4, 6, 8, 12, 16), 1),
        sizes=5,
        seeds=2,
        minimum_steps=8,
        bootstrap=200,
    ),
    "gpu": grown((64, 80, 96, 128, 160, 192, 256, 320), 4, 2e13, 4e13, 8e13, 1.6e14, 1.6e15),
    "full": grown((256, 320, 384, 512, 640, 768, 1024, 1280), 12, 1e17, 3e17, 1e18, 3e18, 9e19),
}


def get_config(scale: str) -> Run:
    return Run(
        model=Transformer(),
        data=ladder.text(scale),
        optimizer=ladder.OPTIMIZER,
        name=f"overtraining-{scale}",
        sweep=SCALES[scale],
        execution=ladder.execution(scale),
    )


# ---- the runs ----


def sweep(base: Run) -> list[Run]:
    """The grid, and other seeds of the run nearest to the hold-out: the smallest at the largest budget."""
    grid = cells(base, "grid")
    last = max(grid, key=lambda cell: (cell["budget_flops"], -cell["N"]))
    seeds = range(base.seed + 1, base.seed + base.sweep.seeds)
    return [*(run_of(base, cell) for cell in grid), *(run_of(base, last, seed=seed) for seed in seeds)]


def holdout(base: Run) -> list[Run]:
    """The run that the forecast is for."""
    return [run_of(base, cell) for cell in cells(base, "holdout")]


def plan_notes(base: Run) -> list[str]:
    return [
        epoch_note(base, max(cell["D"] for cell in plan(base).cells.to_dict("records"))),
        *plan(base).notes,
    ]


@functools.cache
def plan(base: Run) -> grids.Grid:
    """isoFLOP sizes around the middle of the ratios: at a budget M goes as 1/N^2."""
    settings = base.sweep
    table = candidates(base, settings.shapes)
    limits = grids.Limits(epoch_tokens(base), settings.minimum_steps)
    middle = grids.ratio_optimum(table, (settings.lowest * settings.highest) ** 0.5)
    span = (settings.highest / settings.lowest) ** 0.25
    grid = grids.isoflop(table, settings.budgets_flops, middle, limits, settings.sizes, span)
    beyond = grids.ratio_optimum(table, settings.holdout_ratio)
    return grid + grids.holdout(table, settings.holdout_flops, beyond, limits)


def cells(base: Run, role: str) -> list[dict[str, Any]]:
    table = plan(base).cells
    return table[table["role"] == role].to_dict("records")


# ---- the law ----


def fit_law(base: Run, runs: pd.DataFrame, law: str) -> Fit:
    table = points(runs[runs["role"] == "grid"])
    table = table.assign(M=table["D"] / table["N"])
    return fits.fit_law(table, law, bootstrap=base.sweep.bootstrap, counting=COUNTING)


def seed_noise(runs: pd.DataFrame) -> SeedNoise:
    """Of the runs that differ by their seed alone."""
    table = points(runs[runs["role"] != "holdout"])
    table = table[table["status"] == "done"]
    return between_seeds(np.log(table["loss"].astype(float)), [table["N"], table["D"]])


def forecast(base: Run, runs: pd.DataFrame, run: Run) -> forecasting.Forecast:
    """The loss that `run` will reach; written before it starts."""
    cell = next(cell for cell in cells(base, "holdout") if cell["D"] == run.tokens)
    law, noise = fit_law(base, runs, "overtraining"), seed_noise(runs)
    return forecasting.make(law, N=cell["N"], D=cell["D"], C=cell["flops"], seed_noise=noise)


def report(base: Run, folder: Path, runs: pd.DataFrame, forecasts: Mapping[str, Any]) -> dict[str, Any]:
    """Fits, prints and writes the report; returns its numbers."""
    law, free = (fit_law(base, runs, name) for name in ("overtraining", "chinchilla"))
    outcomes = forecasting.outcomes(forecasts, runs)
    table = points(runs[runs["status"] == "done"])
    alike, M = one_exponent(free), law.parameters["M_opt"]
    best = Answer(f"The best ratio is {M.value:.3g} tokens a parameter ({M.low:.3g} to {M.high:.3g}).")
    content = Page(
        title=f"Over-training: {base.name}",
        question=__doc__.splitlines()[0],
        caution=too_small(law),
        answers=[*map(verdict, outcomes), best, alike],
        warnings=law.warnings,
        figures=[
            Drawing("ratios", "Loss by tokens a parameter at each budget, and the law.", drawing(law, table)),
            Drawing("residuals", "What the law leaves.", figures.residuals(law, outcomes)),
        ],
        fits=[fitted(law), fitted(free)],
        tables=[("Runs", runs_table(table, law))],
        conventions={"N counts": COUNTING, "M": "D/N of that N", "C": "6 N D"},
        notes=plan_notes(base),
    )
    page.show(folder, content)
    numbers = {"law": law.to_json(), "chinchilla": free.to_json(), "one_exponent": alike.good}
    return numbers | {"forecasts": [outcome.to_json() for outcome in outcomes]}


def one_exponent(free: Fit) -> Answer:
    """Whether alpha and beta of the same runs may be equal, as the law has it."""
    drawn = free.values(free.draws)
    alpha, beta = (free.parameters[name].value for name in ("alpha", "beta"))
    gap = free.with_interval(alpha - beta, drawn["alpha"] - drawn["beta"])
    good = bool(gap.low <= 0 <= gap.high)
    return Answer(
        f"One exponent is {'not ' * good}refuted: free, alpha is {alpha:.2f} and beta {beta:.2f}.",
        f"{free.level:.0%} of the refits have alpha - beta from {gap.low:.2f} to {gap.high:.2f}.",
        good,
    )


def runs_table(runs: pd.DataFrame, law: Fit) -> Table:
    runs = runs.sort_values(["role", "budget_flops", "N"])
    N, D = runs["N"].astype(float), runs["D"].astype(float)
    residual = runs["loss"] / law.predict(N=N, D=D).value - 1
    rows = [
        [name, short(n), short(d), f"{d / n:.1f}", f"{loss:.4f}", f"{off:+.2%}"]
        for name, n, d, loss, off in zip(runs["name"], N, D, runs["loss"], residual, strict=True)
    ]
    return Table(["run", "N", "D", "M", "loss", "vs law"], rows)


def drawing(law: Fit, runs: pd.DataFrame) -> Any:
    """Draws loss over M at each budget, the hold-out's too."""
    runs = runs[runs["role"] != "rate"].assign(M=lambda table: table["D"] / table["N"])
    lowest, series = runs["M"].min(), []
    for group, ((role, budget), own) in enumerate(runs.groupby(["role", "budget_flops"])):
        held = role == "holdout"
        M = np.geomspace(lowest if held else own["M"].min(), own["M"].max(), 40)
        line = law.predict(C=np.full(40, budget), M=M).value
        label = f"{power(budget)} FLOPs{', hold-out' * held}"
        series.append(plots.Series(label, own["M"], own["loss"], group=group))
        series.append(plots.Series(None, M, line, mark="--" if held else "-", group=group))
    panel = plots.Panel("M, tokens a parameter", "held-out loss [nats/token]", series, log="x")
    note = f"Dashed: the law beyond what it was fitted to. {figures.conventions(law)}"
    return plots.draw("Loss by tokens a parameter", [panel], note)
