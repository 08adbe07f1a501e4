"""How large a batch still pays, and does the noise of the gradient say so beforehand?

Small models are trained at many batch sizes, each at several rates, to a few losses on held-out documents;
S steps and E tokens at the best rate follow (S/S_min - 1)(E/E_min - 1) = 1, whose E_min/S_min is the critical
batch size (McCandlish et al. 2018, arXiv:1812.06162). Beside it stands the simple noise scale, measured from
gradients at two batch sizes as the runs pass those losses.

    python -m launch.local --config=experiments/batch_size.py:cpu
    python -m launch.local --config=experiments/batch_size.py:smoke

Cost: smoke 15 seconds, cpu 3 minutes on 2 CPU cores; gpu and full not run.

Result (cpu, 2026-11-22), 90% intervals: at 2.6, 2.5 and 2.4 nats/token the critical batch is 1,350 (1,060 to
1,730), 1,740 (1,370 to 2,160) and 2,020 (1,590 to 2,640) tokens, the noise scale 1,320 (980 to 1,760), 1,450
(1,310 to 1,610) and 1,700 (1,560 to 1,870). A free power of B is 0.90 (0.69 to 1.10), 1.02 (0.82 to 1.29) and
1.04 (0.83 to 1.30), so the form holds. The best rate grows with the batch up to the critical one, then stays.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llm_jax import gradient_noise, records
from llm_jax.config import UserError
from llm_jax.data import Python, SentencePiece, Text
from llm_jax.ladder import execution
from llm_jax.models.transformer import Transformer
from llm_jax.optimizers import AdamW
from llm_jax.run import Cell, Checkpointing, Run, Sweep
from llm_jax.scaling import batches, page, plots
from llm_jax.scaling.page import Answer, Drawing, Page, Table, Tile, ranged
from llm_jax.scaling.plots import Panel, Series
from llm_jax.scaling.style import short
from llm_jax.schedules import Constant

RATE = "optimizer.learning_rate"
NOISE_ROWS = 32  # the big batch that gradients are measured on; the small one is a row


@dataclasses.dataclass(frozen=True)
class BatchSize(Sweep, kind="batch_size"):
    """Every batch size at `multiples` of the rate that the rule gives it, with `seeds` seeds each.

    batch_sizes, expected: rows; `expected` is a guess of the critical batch, by which lengths and rates are
    set: a run has steps * (1 + expected/B) steps at the rate optimizer.learning_rate / sqrt(1 + expected/B).
    """

    batch_sizes: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128)
    targets: tuple[float, ...] = (2.6, 2.5, 2.4)
    multiples: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    seeds: int = 2
    expected: float = 16.0
    steps: int = 100
    evaluations: int = 20
    bootstrap: int = 1000

    def validate(self) -> None:
        if len(set(self.batch_sizes)) < 4 or len(self.multiples) < 3:
            raise UserError("sweep: a trade-off takes 4 batch_sizes, a best rate 3 multiples")
        if not self.targets or self.seeds < 1 or self.evaluations < 5 or not self.expected > 0:
            raise UserError("sweep needs a target, a seed, 5 evaluations and an expected batch above 0")


SCALES = {
    "cpu": BatchSize(),
    "smoke": BatchSize((2, 8, 32, 128), (3.0,), (0.5, 2.0, 8.0), 1, 16.0, 15, 6, 100),
    "gpu": BatchSize((4, 16, 64, 256, 1024), (1.5, 1.35, 1.25), seeds=3, expected=64.0, steps=2000),
    "full": BatchSize((16, 64, 256, 1024, 4096), (3.4, 3.2, 3.0), seeds=3, expected=512.0, steps=10_000),
}
SMALL = Text(Python(), sequence_length=64, held_out_bytes=2**13)
DATA = {
    "gpu": Text(Python(packages=True), sequence_length=256),
    # Name a corpus of some 20 billion tokens: --config.data.corpus=FOLDER.
    "full": Text(tokenizer=SentencePiece(vocabulary=32768), sequence_length=1024),
}
MODELS = {"smoke": (1, 16), "gpu": (6, 256), "full": (12, 768)}


def get_config(scale: str) -> Run:
    """The run that the sweep varies: batch, rate, tokens and seed."""
    layers, width = MODELS.get(scale, (1, 32))
    return Run(
        model=Transformer(layers=layers, width=width, heads=max(1, width // 16)),
        data=DATA.get(scale, SMALL),
        optimizer=AdamW(learning_rate=2e-2, beta2=0.99, schedule=Constant(warmup_fraction=0.02)),
        name=f"batch_size-{scale}",
        sweep=SCALES[scale],
        execution=execution(scale, checkpoint=Checkpointing(at_end=False)),
    )


def sweep(base: Run) -> list[Run]:
    settings = base.sweep
    return [
        run_of(base, size, multiple, base.seed + extra)
        for size in settings.batch_sizes
        for multiple in settings.multiples
        for extra in range(settings.seeds)
    ]


def run_of(base: Run, size: int, multiple: float, seed: int) -> Run:
    slower = 1 + base.sweep.expected / size
    steps = round(base.sweep.steps * slower)
    every = max(1, steps // base.sweep.evaluations)
    data = dataclasses.replace(base.data, batch_size=size)
    return dataclasses.replace(
        base,
        data=data,
        optimizer=dataclasses.replace(
            base.optimizer, learning_rate=multiple * base.optimizer.learning_rate / slower**0.5
        ),
        tokens=steps * data.tokens_per_step,
        seed=seed,
        execution=dataclasses.replace(base.execution, evaluate_every_steps=every),
        name=f"batch-{size}-{multiple:g}x-seed{seed}",
        cell=Cell("grid"),
    )


def hooks(run: Run) -> list:
    return [gradient_noise.hook(run, small_rows=1, count=NOISE_ROWS)]


# ---- what the runs say ----


def curves(base: Run, folder: Path, runs: pd.DataFrame) -> list[pd.DataFrame]:
    """Each run's evaluations: step, loss, the noise's trace and square, and the run's B, seed and rate."""
    row, out = base.data.sequence_length, []
    for run in runs.to_dict("records"):
        table = records.metrics(folder / run["run"])
        if "held_out/loss" not in table:
            continue
        table = table.dropna(subset="held_out/loss").reset_index(drop=True)
        squares = (table[f"held_out/{name}"] for name in (gradient_noise.SMALL, gradient_noise.BIG))
        trace, square = batches.noise_scale(row, NOISE_ROWS * row, *squares)
        found = pd.DataFrame(
            {"step": table["step"], "loss": table["held_out/loss"], "trace": trace, "square": square}
        )
        found.attrs |= {"B": row * run["data.batch_size"], "seed": run["seed"], "rate": run[RATE]}
        out.append(found)
    return out


def report(base: Run, folder: Path, runs: pd.DataFrame, forecasts: Mapping[str, Any]) -> dict[str, Any]:
    """Fits every target, prints and writes the report; returns its numbers."""
    found = curves(base, folder, runs)
    if not found:
        raise UserError("no run of this sweep has an evaluation: there is nothing to compare")
    every = [batches.at_loss(target, found, base.sweep.bootstrap) for target in base.sweep.targets]
    fitted = [each for each in every if each.fit]
    rows, tried, answers = [], [], []
    for each in every:
        loss = f"{each.loss:g}"
        numbers = [each.fit and each.fit.parameters[name] for name in ("S_min", "E_min", "B_crit")]
        rows.append([loss, *map(ranged, (*numbers, each.power, each.noise))])
        for B, group in each.tuning.points.groupby("B"):
            steps = np.exp(np.log(group["steps"]).mean())
            tried.append([loss, short(B), f"{steps:,.0f}", short(B * steps), f"{group['rate'].iloc[0]:.2e}"])
        if each.fit:
            line = f"At {loss} nats/token the critical batch is {ranged(numbers[2])} tokens"
            ratio = (
                f", the noise scale {each.noise.value / numbers[2].value:.2g} times that"
                if each.noise
                else ""
            )
            answers.append(Answer(f"{line}{ratio}."))
    header = [
        "loss",
        "S_min [steps]",
        "E_min [tokens]",
        "B_crit [tokens]",
        "power of B",
        "noise scale [tokens]",
    ]
    sizes = [row * base.data.sequence_length for row in base.sweep.batch_sizes]
    drawing = Drawing("tradeoff", "What each batch costs.", tradeoff(fitted))
    result = Page(
        title=f"Critical batch size: {base.name}",
        question=__doc__.splitlines()[0],
        tiles=[Tile(rows[i][3], f"B_crit at {rows[i][0]} [tokens]") for i in range(len(rows))],
        answers=answers,
        warnings=[f"loss {each.loss:g}: {warning}" for each in every for warning in each.warnings],
        figures=[drawing] if fitted else [],
        tables=[
            ("To each loss, with 90% intervals", Table(header, rows)),
            ("At the best rate", Table(["loss", "B [tokens]", "steps", "tokens", "best rate"], tried)),
        ],
        notes=[f"batches of {short(min(sizes))} to {short(max(sizes))} tokens; power: S = S_min + E_min/B^a"],
    )
    page.show(folder, result)
    return {"losses": [each.to_json() for each in every], "warnings": list(result.warnings)}


def tradeoff(fitted: Sequence[batches.AtLoss]) -> Any:
    """Steps and tokens against the batch, with their fits."""
    steps, tokens = [], []
    for each in fitted:
        points, label = each.tuning.points, f"{each.loss:g} nats/token"
        B = np.geomspace(points["B"].min(), points["B"].max(), 60)
        S = each.fit.predict(B=B)
        for series, by, along in ((steps, 1, 1), (tokens, points["B"], B)):
            series.append(Series(label, points["B"], points["steps"] * by, group=label))
            series.append(Series(None, B, S.value * along, S.low * along, S.high * along, "-", label))
    panels = [Panel("B, batch [tokens]", "S, steps", steps), Panel("B, batch [tokens]", "E, tokens", tokens)]
    return plots.draw("What a batch costs", panels, "Each batch at its best rate; a point a seed.")
