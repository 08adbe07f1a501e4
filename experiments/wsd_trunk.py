"""Does a law from trunks and branches agree with one from independent cosine runs, and what does it cost?

Every size is trained to several data sizes D in two ways: by a cosine schedule from start to end, one run for
each D; and by WSD, where all of a size's runs share one trunk of constant rate and train their decays only
(Hägele et al. 2024, arXiv:2405.18392). Each way gives a law L(N, D). The launcher finds the trunks by itself.

    python -m launch.local --config=experiments/wsd_trunk.py:cpu --workers=2
    python -m launch.local --config=experiments/wsd_trunk.py:smoke --workers=2
    python -m launch.local --config=experiments/wsd_trunk.py:cpu --dry_run      # the graph and its price

Cost: smoke 20 s, cpu 2 minutes, each on 2 CPU cores; gpu 20 minutes on one H100 (not run); full some days on
a pod, on a corpus of yours (not run). What was not run is estimated.

Result (cpu, 2026-11-22), 90% intervals: trunks cost 1.08e12 FLOPs and independent runs 1.73e12, 37% saved.
N_opt ~ C^0.52 (0.35 to 0.65) from trunks, C^0.47 (0.34 to 0.64) from cosine runs: not told apart (+0.05,
-0.12 to 0.14); C^0.52 by Approach 1 on the trunks. At the same N and D branches have 1.2% less loss in the
mean (-2.7% to +0.8%). Neither law determines E: for that the sweep is too small.

Both ways have the rate that suits them: the middle size at the second D checks it at half and double.
Compute is C = 6 N D, where N counts the matrices of the body and of the logits. No run sees a byte twice.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llm_jax import ladder
from llm_jax.config import UserError
from llm_jax.ladder import Shapes, shapes
from llm_jax.models.transformer import Transformer
from llm_jax.optimizers import AdamW
from llm_jax.run import Run, Sweep
from llm_jax.scaling import figures, fits, page, plots, style
from llm_jax.scaling import report as reports
from llm_jax.scaling.envelope import EnvelopeFit
from llm_jax.scaling.page import Answer, Drawing, Page, Table, Tile
from llm_jax.scaling.rates import RateCheck, check_rates
from llm_jax.scaling.results import Estimate, Fit, gap, told
from llm_jax.scaling.trunks import Savings, constant_rate_curves, law_panels, savings, tree_panels
from llm_jax.schedules import WSD, Cosine
from llm_jax.values import check_least, write

WAYS = {"wsd": "trunks and branches", "cosine": "independent cosine runs"}


@dataclasses.dataclass(frozen=True)
class WsdTrunk(Sweep, kind="wsd_trunk"):
    """Every size at every D; the optimizer's schedule is the trunk's.

    shapes: (width, layers). D_tokens: the data sizes. rate_exponent: of the rate's fall with the width;
    cosine_rate: the cosine's peak rate over the trunk's. rate_seeds: seeds of each rate check (0: none).
    target: the budget, over the largest trained one, at which the two laws are compared.
    """

    shapes: Shapes = shapes((8, 12, 16, 24, 32), layers=2)
    D_tokens: tuple[int, ...] = tuple(2**k * 512 * 300 for k in range(4))
    rate_exponent: float = -0.7
    horizon_exponent: float = 0.0
    cosine_rate: float = 2.0
    rate_seeds: int = 2
    target: float = 4.0
    bootstrap: int = 1000

    def validate(self) -> None:
        check_least(self, "sweep.", ("cosine_rate", "target"), rate_seeds=0, bootstrap=100)
        ladder.check_shapes(self.shapes, least=3)
        if len(self.D_tokens) < 3 or min(self.D_tokens) < 1:
            raise UserError(f"sweep.D_tokens is {write(self.D_tokens)}; three sizes at least, each positive")
        if self.rate_seeds == 1:
            raise UserError(
                "sweep.rate_seeds is 1; one seed shows no spread: it is 0 (no check) or at least 2"
            )


SCALES = {
    "cpu": WsdTrunk(),
    "smoke": WsdTrunk(
        shapes=shapes((4, 8, 16), layers=1),
        D_tokens=tuple(512 * steps for steps in (40, 60, 90)),
        rate_seeds=0,
        bootstrap=200,
    ),
    "gpu": WsdTrunk(
        shapes=shapes((48, 64, 96), layers=3) + shapes((128, 192, 256), layers=4),
        D_tokens=tuple(2**k * 8192 * 500 for k in range(5)),
        bootstrap=4000,
    ),
    "full": WsdTrunk(
        shapes=shapes((256, 384, 512), layers=8) + shapes((768, 1024, 1536), layers=12),
        D_tokens=tuple(2**k * 2**30 for k in range(5)),
        bootstrap=4000,
    ),
}


def get_config(scale: str) -> Run:
    """The run that the sweep varies: its width, its depth, its tokens, its schedule and its rate."""
    warmup_steps = {"smoke": 8, "full": 200}.get(scale, 40)
    return Run(
        model=Transformer(layers=3, width=64, heads=4),
        data=ladder.text(scale),
        optimizer=AdamW(learning_rate=3e-3, schedule=WSD(decay_fraction=0.2, warmup_steps=warmup_steps)),
        tokens=SCALES[scale].D_tokens[0],
        name=f"wsd_trunk-{scale}",
        sweep=SCALES[scale],
        execution=ladder.execution(scale),
    )


# ---- the runs ----


def sweep(base: Run) -> list[Run]:
    """The same cells in both ways, and the runs that check each way's rate."""
    runs = []
    for way in WAYS:
        grid = cells(base, way)
        runs += [ladder.run_of(trained_by(base, way), cell) for cell in grid]
        runs += ladder.rate_runs(trained_by(base, way), middle(base, grid))
    return runs


def trained_by(base: Run, way: str) -> Run:
    """The base with a way's schedule and rate."""
    if way == "wsd":
        return base
    optimizer = dataclasses.replace(
        base.optimizer,
        learning_rate=base.sweep.cosine_rate * base.optimizer.learning_rate,
        schedule=Cosine(warmup_fraction=0.05, final_fraction=0.0),
    )
    return dataclasses.replace(base, optimizer=optimizer)


def cells(base: Run, way: str) -> list[dict[str, Any]]:
    """Every size at every D, as run_of takes them."""
    available = ladder.epoch_tokens(base)
    if max(base.sweep.D_tokens) > available:
        raise UserError(
            f"sweep.D_tokens goes up to {max(base.sweep.D_tokens):,}, and one epoch has {available:,} tokens"
        )
    return [
        size | {"D": D, "name": f"{way}-{size['N']}-{D}", "role": way, "budget_flops": None}
        for size in ladder.candidates(base, base.sweep.shapes).to_dict("records")
        for D in base.sweep.D_tokens
    ]


def middle(base: Run, grid: list[dict[str, Any]]) -> dict[str, Any]:
    """The cell at which rates are checked: the middle size at the second D."""
    return grid[len(base.sweep.shapes) // 2 * len(base.sweep.D_tokens) + 1]


def plan_notes(base: Run) -> list[str]:
    return [ladder.epoch_note(base, max(base.sweep.D_tokens))]


# ---- the laws ----


def of_way(runs: pd.DataFrame, way: str) -> pd.DataFrame:
    """A way's runs, those that check its rate too."""
    return runs[runs["optimizer.schedule.kind"] == way]


def fit_law(base: Run, runs: pd.DataFrame, way: str) -> Fit:
    """Approach 3 on a way's cells that are done in both ways, so that draws of both are of the same cells."""
    both = (
        runs[runs["role"].isin(WAYS) & (runs["status"] == "done")]
        .groupby(["N", "D"])
        .filter(lambda cell: cell["role"].nunique() == len(WAYS))
    )
    grid = both[both["role"] == way].sort_values(["N", "D"])
    return fits.fit(grid, "chinchilla", bootstrap=base.sweep.bootstrap, counting=ladder.COUNTING)


def rate_check(base: Run, runs: pd.DataFrame, way: str) -> RateCheck | None:
    """Whether the middle cell is better at another rate; None where that isn't asked."""
    if not base.sweep.rate_seeds:
        return None
    table = of_way(runs, way)
    rule = [ladder.rate(trained_by(base, way), *run) for run in zip(table["width"], table["D"], strict=True)]
    return check_rates(table, rule, ladder.MULTIPLES)[0]


def envelope(folder: Path, runs: pd.DataFrame) -> EnvelopeFit:
    """Approach 1: the lowest of the trunks' training curves at each compute, while their rate is constant."""
    trunks = runs[(runs["role"] == "wsd") & (runs["status"] == "done")]
    return fits.fit(constant_rate_curves(folder, trunks), approach=1, counting=ladder.COUNTING)


def differences(runs: pd.DataFrame) -> pd.DataFrame:
    """Every cell that is done in both ways: N, D, and the two losses."""
    done = runs[runs["status"] == "done"]
    sides = [done[done["role"] == way][["N", "D", "loss"]] for way in WAYS]
    return sides[0].merge(sides[1], on=["N", "D"], suffixes=["_wsd", "_cosine"])


def gaps(laws: Mapping[str, Fit], target: float) -> dict[str, Estimate]:
    """How far trunks lie above cosine runs: in the exponent a, and in the best loss at `target` FLOPs."""
    ways = laws["cosine"], laws["wsd"]
    return {
        "a": gap(*ways, lambda law, theta: law.values(theta)["a"]),
        "loss": gap(*ways, lambda law, theta: law.best_at(theta, target)[2]),
    }


def report(base: Run, folder: Path, runs: pd.DataFrame, forecasts: Mapping[str, Any]) -> dict[str, Any]:
    """Fits both laws, prints and writes the report; returns its numbers."""
    runs = ladder.points(runs)
    laws = {way: fit_law(base, runs, way) for way in WAYS}
    checks = {way: rate_check(base, runs, way) for way in WAYS}
    grid = runs[runs["role"].isin(WAYS)]
    costs = {way: float(grid[grid["role"] == way]["flops_spent"].sum()) for way in WAYS}
    target = base.sweep.target * float(grid["C"].max())
    pairs, saved = differences(runs), savings(of_way(grid, "wsd"))
    named = {WAYS[way]: law for way, law in laws.items()}
    size = middle(base, cells(base, "wsd"))["N"]
    panels = tree_panels(folder, grid[(grid["role"] == "wsd") & (grid["N"] == size)])
    lowest, warnings = None, []
    try:
        lowest = envelope(folder, runs)
    except UserError as error:
        warnings.append(f"Approach 1: {error}")
    relative = (pairs["loss_wsd"] / pairs["loss_cosine"] - 1).to_numpy()
    result = Page(
        title=f"Trunks and branches: {base.name}",
        question=__doc__.splitlines()[0],
        caution=reports.too_small(laws["wsd"]),
        tiles=list(tiles(laws, saved, costs)),
        answers=[*answers(laws, saved, costs, relative, target), *by_envelope(lowest)],
        warnings=[
            *warnings,
            *(f"{WAYS[way]}: {check}" for way, check in checks.items() if check and check.doubtful),
            *(f"{WAYS[way]}: {text}" for way, law in laws.items() for text in law.warnings),
        ],
        figures=[
            Drawing(
                "laws",
                "Loss by D at every size: points of both ways, lines of both laws.",
                plots.draw("Two laws", law_panels(named), figures.conventions(laws["wsd"])),
            ),
            Drawing(
                "tree",
                "The middle size: its trunk, and what each branch trained itself.",
                plots.draw("A trunk and its branches", panels, f"N: {ladder.COUNTING}. Training loss."),
            ),
        ],
        fits=[
            reports.fitted(law)._replace(heading=f"{WAYS[way]}: {law.formula}") for way, law in laws.items()
        ],
        tables=[("Every cell in both ways", cell_table(pairs))],
        notes=[*plan_notes(base), *(f"{WAYS[way]}: {check}" for way, check in checks.items() if check)],
    )
    print(result)
    print(f"\nreport: {page.write(folder, result)}")
    return {
        "laws": {way: law.to_json() for way, law in laws.items()},
        "envelope": lowest and lowest.to_json(),
        "costs_flops": costs,
        "trunks_less_cosine": {name: apart._asdict() for name, apart in gaps(laws, target).items()},
        "at_target": {way: law.optimum(target)._asdict() for way, law in laws.items()},
        "wsd_over_cosine": {"mean": float(relative.mean()), "deviation": float(relative.std(ddof=1))},
        "rates": {way: str(check) for way, check in checks.items() if check},
    }


# ---- what the report shows ----


def tiles(laws: Mapping[str, Fit], saved: Savings | None, costs: Mapping[str, float]):
    if saved:
        yield Tile(f"{saved.share:.0%}", "of the compute saved by shared trunks", str(saved))
    yield Tile(f"{costs['cosine'] / costs['wsd']:.2f}x", "cost of the same cells by cosine runs")
    for way, law in laws.items():
        a = law.parameters["a"]
        yield Tile(f"{a.value:.3f}", f"N_opt ∝ C^a by {WAYS[way]}", f"90%: {a.low:.3f} to {a.high:.3f}")


def answers(
    laws: Mapping[str, Fit],
    saved: Savings | None,
    costs: Mapping[str, float],
    relative: np.ndarray,
    target: float,
):
    price = " and ".join(f"{WAYS[way]} {cost:.3g}" for way, cost in costs.items())
    yield Answer(
        f"Cost [FLOPs]: {price}, {costs['cosine'] / costs['wsd']:.2f} times as much.", str(saved or "")
    )
    yield Answer(
        f"WSD's loss beside cosine's at the same N and D: {relative.mean():+.2%} in the mean, "
        f"{relative.min():+.2%} to {relative.max():+.2%}."
    )
    best = f"the best loss at {style.flops(target)} FLOPs"
    numbers = {"N_opt ∝ C^a": [law.parameters["a"] for law in laws.values()]}
    numbers[best] = [law.optimum(target).loss for law in laws.values()]
    for (name, (one, other)), apart in zip(numbers.items(), gaps(laws, target).values(), strict=True):
        yield Answer(
            f"{name}: {one.value:.3f} ({one.low:.3f} to {one.high:.3f}) by {WAYS['wsd']}, {other.value:.3f} "
            f"({other.low:.3f} to {other.high:.3f}) by {WAYS['cosine']}; trunks less cosine "
            f"{told(apart, '+.3f')}.",
            "Both laws are fitted to each draw of cells: 90% intervals of the difference.",
            bool(apart.low <= 0 <= apart.high),
        )


def by_envelope(fit: EnvelopeFit | None):
    if fit:
        a = fit.parameters["a"].value
        yield Answer(
            f"N_opt ∝ C^a: {a:.3f} by Approach 1, the envelope of {fit.runs} trunks at their constant rate.",
            "; ".join(fit.warnings),
        )


def cell_table(pairs: pd.DataFrame) -> Table:
    rows = [
        [style.short(c.N), style.short(c.D), f"{c.loss_wsd:.4f}", f"{c.loss_cosine:.4f}",
         f"{c.loss_wsd / c.loss_cosine - 1:+.2%}"]
        for c in pairs.sort_values(["N", "D"]).itertuples()
    ]  # fmt: skip
    return Table(["N", "D", "branch", "cosine run", "difference"], rows, ())
