"""How much compute does another optimizer save?

Every optimizer trains the same ladder of models, at its own best rate on each rung. Its losses and AdamW's
are fitted by one power law of compute with a shared asymptote and exponent; how far the two curves lie apart
is the compute multiplier: with C FLOPs it reaches what AdamW reaches with multiplier x C.

    python -m launch.local --config=experiments/optimizers.py:cpu
    python -m launch.local --config=experiments/optimizers.py:smoke

Cost: smoke 15 seconds, cpu 4 minutes on 2 CPU cores; gpu and full not run.

Result (cpu, 2026-11-22), 90% intervals: schedule-free AdamW reaches with C what AdamW does with 1.60 C (1.30
to 1.79), Lion with 1.08 C (0.93 to 1.22), Muon with 0.89 C (0.81 to 0.97). Widths of 12 to 32 and 96 to 400
steps say nothing of larger runs; ones so short favour what needs no decay.

FLOPs are 6 N D for all: what an optimizer's own arithmetic costs shows in the column of its speed.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llm_jax.config import UserError
from llm_jax.data import Python, SentencePiece, Text
from llm_jax.ladder import COUNTING, execution
from llm_jax.models.transformer import Transformer
from llm_jax.optimizers import AdamW, Lion, Muon, Optimizer, ScheduleFree
from llm_jax.run import Cell, Checkpointing, Run, Sweep
from llm_jax.scaling import figures, page, plots
from llm_jax.scaling.compare import best_loss, multiplier
from llm_jax.scaling.page import Answer, Drawing, Page, Table, Tile, ranged
from llm_jax.scaling.plots import Panel, Series
from llm_jax.scaling.rates import tune
from llm_jax.scaling.results import Fit
from llm_jax.schedules import Constant, Cosine

M = 10**6
DECAY = Cosine(warmup_fraction=0.05, final_fraction=0.0)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An optimizer with its rates at width 64; they go with the width to `width_exponent`."""

    optimizer: Optimizer = AdamW()
    width_exponent: float = -0.7

    def at(self, width: int, multiple: float) -> Optimizer:
        """All rates (Muon has two) by the rule, times `multiple`."""
        factor = multiple * (width / 64) ** self.width_exponent
        rates = [f.name for f in dataclasses.fields(self.optimizer) if f.name.endswith("learning_rate")]
        scaled = {name: factor * getattr(self.optimizer, name) for name in rates}
        return dataclasses.replace(self.optimizer, **scaled)


RECIPES = (
    Recipe(AdamW(learning_rate=9e-3, schedule=DECAY)),
    Recipe(Muon(learning_rate=0.03, adam_learning_rate=9e-3, schedule=DECAY)),
    Recipe(Lion(learning_rate=4.8e-3, schedule=DECAY)),
    Recipe(ScheduleFree(learning_rate=9e-3, schedule=Constant(warmup_fraction=0.05))),
)


@dataclasses.dataclass(frozen=True)
class Optimizers(Sweep, kind="optimizers"):
    """The first recipe is what the others are held against; rungs: (width, layers, tokens)."""

    recipes: tuple[Recipe, ...] = RECIPES
    rungs: tuple[tuple[int, int, int], ...] = (
        (12, 1, 49152),
        (16, 1, 73728),
        (24, 1, 131072),
        (32, 1, 204800),
    )
    multiples: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    seeds: int = 2
    bootstrap: int = 1000

    def validate(self) -> None:
        if len({recipe.optimizer.kind for recipe in self.recipes}) < max(2, len(self.recipes)):
            raise UserError("sweep.recipes: at least two, each of another kind of optimizer")
        if len(self.rungs) < 3 or len(self.multiples) < 3 or self.seeds < 1:
            raise UserError("sweep: a curve of compute takes 3 rungs, a best rate 3 multiples; seeds >= 1")


SCALES = {
    "cpu": Optimizers(),
    "smoke": Optimizers(
        RECIPES[:2], tuple((8, 1, 8192 * n) for n in (1, 2, 4)), (0.5, 2.0, 8.0), seeds=1, bootstrap=100
    ),
    # About 20 tokens for each parameter of the body and the head.
    "gpu": Optimizers(rungs=((128, 4, 16 * M), (192, 5, 45 * M), (256, 6, 96 * M), (384, 6, 214 * M))),
    "full": Optimizers(
        rungs=((512, 8, 840 * M), (768, 12, 2200 * M), (1024, 16, 4700 * M), (1536, 20, 12_300 * M)), seeds=3
    ),
}
SMALL = Text(Python(), sequence_length=64, batch_size=8, held_out_bytes=2**15)
DATA = {
    "gpu": Text(Python(packages=True), sequence_length=256, batch_size=32),
    # Name a corpus of some 20 billion tokens: --config.data.corpus=FOLDER.
    "full": Text(tokenizer=SentencePiece(vocabulary=32768), sequence_length=1024, batch_size=256),
}


def get_config(scale: str) -> Run:
    """The run that the sweep varies: optimizer, model and tokens."""
    return Run(
        data=DATA.get(scale, SMALL),
        name=f"optimizers-{scale}",
        sweep=SCALES[scale],
        execution=execution(scale, checkpoint=Checkpointing(at_end=False)),
    )


def sweep(base: Run) -> list[Run]:
    settings = base.sweep
    return [
        dataclasses.replace(
            base,
            model=Transformer(width=width, layers=layers, heads=max(1, width // 16)),
            optimizer=recipe.at(width, multiple),
            tokens=tokens,
            seed=base.seed + extra,
            name=f"{recipe.optimizer.kind}-{width}-{tokens}-{multiple:g}x-seed{base.seed + extra}",
            cell=Cell("grid"),
        )
        for recipe in settings.recipes
        for width, layers, tokens in settings.rungs
        for multiple in settings.multiples
        for extra in range(settings.seeds)
    ]


# ---- what the runs say ----


def best_points(runs: pd.DataFrame, kinds: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """Every optimizer at its best rate on each rung: optimizer, C, seed, loss, rate; and what was refused."""
    points, refused = [], []
    columns = {"flops_6nd_matmul": "C", "optimizer.learning_rate": "rate", "loss": "value"}
    runs = runs.assign(loss=runs["loss"].where(runs["status"] == "done")).rename(columns=columns)
    for kind in kinds:
        found = tune(runs[runs["optimizer.kind"] == kind], "C")
        points.append(found.points.assign(optimizer=kind).rename(columns={"value": "loss"}))
        refused += [f"{kind} at {C:.2e} FLOPs left out: {why}" for C, why in found.refused.items()]
    return pd.concat(points, ignore_index=True), refused


def multiplier_of(points: pd.DataFrame, first: str, other: str, bootstrap: int) -> tuple[Fit, str]:
    """The compute multiplier of `other` against `first`; UserError where either has fewer than 3 rungs."""
    pair = [points[points["optimizer"] == kind] for kind in (first, other)]
    for kind, mine in zip((first, other), pair, strict=True):
        if mine["C"].nunique() < 3:
            raise UserError(f"{kind} has a best rate on {mine['C'].nunique()} rungs; a curve takes 3")
    table = pd.concat(pair, ignore_index=True)
    return multiplier(table, "power", "optimizer", bootstrap=bootstrap, counting=COUNTING)


def by_rung(fit: Fit, mine: pd.DataFrame) -> np.ndarray:
    """The multiplier of each rung alone, along the first optimizer's curve: a trend breaks the shared law."""
    E, A, a = (fit.parameters[name].value for name in ("E", "A", "a"))
    losses = mine.groupby("C")["loss"].mean()
    return (np.maximum(losses - E, 0) / A) ** (-1 / a) / losses.index


def report(base: Run, folder: Path, runs: pd.DataFrame, forecasts: Mapping[str, Any]) -> dict[str, Any]:
    """Fits every optimizer beside the first, prints and writes the report; returns its numbers."""
    kinds = [recipe.optimizer.kind for recipe in base.sweep.recipes]
    points, warnings = best_points(runs, kinds)
    speed = runs.groupby("optimizer.kind")["tokens_per_second"].median()
    fits: dict[str, Fit] = {}
    answers, rows = [], []
    for kind in kinds:
        mine = points[points["optimizer"] == kind]
        if kind != kinds[0]:
            try:
                fits[kind], line = multiplier_of(points, kinds[0], kind, base.sweep.bootstrap)
                answers.append(Answer(f"{line}."))
                warnings += [f"{kind}: {text}" for text in fits[kind].warnings]
            except UserError as error:
                warnings.append(f"{kind}: no multiplier: {error}")
        number = ranged(fits[kind].parameters["multiplier"]) if kind in fits else "refused"
        losses = " ".join(f"{loss:.3f}" for loss in mine.groupby("C")["loss"].mean())
        rates = " ".join(f"{rate:.1e}" for rate in mine.groupby("C")["rate"].first())
        alone = " ".join(f"{each:.2f}" for each in by_rung(fits[kind], mine)) if kind in fits else ""
        relative = f"{speed[kind] / speed[kinds[0]]:.2f}"
        rows.append([kind, "1" if kind == kinds[0] else number, alone, losses, rates, relative])
    header = ["optimizer", "compute multiplier", "rung by rung", "losses", "best rates", "tokens/s, relative"]
    drawing = Drawing("multipliers", "Loss by compute.", by_compute(points, fits))
    result = Page(
        title=f"Optimizers: {base.name}",
        question=__doc__.splitlines()[0],
        tiles=[Tile(ranged(fit.parameters["multiplier"]), f"{kind}, compute") for kind, fit in fits.items()],
        answers=answers,
        warnings=warnings,
        figures=[drawing],
        tables=[("Compute multipliers, with 90% intervals", Table(header, rows, (0, 1, 2, 3, 4)))],
        notes=[
            f"{len(runs)} runs; C = 6 N D, N without the input table; best rates by a parabola in ln rate"
        ],
    )
    page.show(folder, result)
    return {
        "multipliers": {kind: fit.to_json() for kind, fit in fits.items()},
        "points": points.to_dict("records"),
        "warnings": warnings,
    }


def by_compute(points: pd.DataFrame, fits: Mapping[str, Fit]) -> Any:
    """Loss against compute: each optimizer's runs at the best rate, and the law shared with AdamW."""
    series, C = [], np.geomspace(points["C"].min(), points["C"].max(), 60)
    for kind, mine in points.groupby("optimizer", sort=False):
        series.append(Series(kind, mine["C"], mine["loss"], group=kind))
        if fit := fits.get(kind, next(iter(fits.values()), None)):
            told = best_loss(fit, C, second=kind in fits)
            series.append(Series(None, C, told.value, told.low, told.high, "-", kind))
    panel = Panel("C, training compute [FLOPs]", "held-out loss [nats/token]", series)
    told = [figures.conventions(fit) for fit in fits.values()][:1]
    return plots.draw("Loss by compute", [panel], " ".join(["Lines: each with the first.", *told]))
