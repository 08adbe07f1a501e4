"""Does loss on Python's own source follow L(N, D), and does the law hold beyond what it was fitted to?

Models of several sizes are trained at each of a few compute budgets (Hoffmann et al. 2022, approaches 2 and
3). A law is fitted, a forecast for a larger budget is written down, and only then is that run trained.

    make quickstart
    python -m launch.local --config=experiments/isoflop.py:cpu --workers=2
    python -m launch.local --config=experiments/isoflop.py:smoke --workers=2

Compute is C = 6 N D, where N counts the matrices of the body and of the logits, as Porian et al. 2024 do. All
runs, the hold-out too, see every byte at most once.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from llm_jax.config import UserError
from llm_jax.data import Python, Text
from llm_jax.models import counting
from llm_jax.models.transformer import Transformer
from llm_jax.optimizers import AdamW
from llm_jax.run import Cell, Run, Sweep
from llm_jax.scaling import grids
from llm_jax.schedules import Cosine


@dataclasses.dataclass(frozen=True)
class Isoflop(Sweep, kind="isoflop"):
    """The grid: `sizes` models at every budget, around the N that `tokens_per_parameter` expects.

    shapes: (width, layers) of the candidates. The learning rate is the optimizer's at `rate_width`, and
    falls with the width to the power `rate_exponent`; it is checked with `rate_seeds` seeds.
    """

    budgets_flops: tuple[float, ...] = (5e10, 1e11, 2e11, 4e11)
    holdout_flops: float = 1.6e12
    shapes: tuple[tuple[int, int], ...] = ((16, 2), (24, 2), (32, 2), (48, 2), (48, 3), (64, 3), (96, 3), (128, 4))
    sizes: int = 5
    span: float = 4.0
    tokens_per_parameter: float = 20.0
    rate_width: int = 64
    rate_exponent: float = -0.5
    rate_seeds: int = 2
    minimum_steps: int = 100
    draws: int = 1000

    def validate(self) -> None:
        if self.holdout_flops < 4 * max(self.budgets_flops):
            raise UserError(
                f"sweep.holdout_flops is {self.holdout_flops:.3g}; a check of the law lies at least 4 times above "
                f"the largest budget, {max(self.budgets_flops):.3g}"
            )


SCALES = {
    "quickstart": Isoflop(),
    "smoke": Isoflop(
        budgets_flops=(3e8, 6e8, 1.2e9), holdout_flops=4.8e9, shapes=((4, 1), (6, 1), (8, 1), (12, 1), (16, 1), (24, 1)),
        minimum_steps=4, draws=200,
    ),
}  # fmt: skip


def get_config(scale: str) -> Run:
    """The run that the sweep varies: its width, its depth, its tokens and its rate."""
    return Run(
        model=Transformer(layers=3, width=64, heads=4),
        data=Text(Python(), sequence_length=128, batch_size=8, held_out_bytes=2**18),
        optimizer=AdamW(learning_rate=6e-3, schedule=Cosine(warmup_fraction=0.05, final_fraction=0.0)),
        tokens=2**19,
        name=f"isoflop-{scale}",
        sweep=SCALES[scale],
    )


def sweep(base: Run) -> list[Run]:
    """The grid, and the runs that check the rate: the smallest and the largest model at half and double."""
    cells = plan(base).cells
    grid = [_run(base, cell) for _, cell in cells[cells["role"] == "grid"].iterrows()]
    checks = []
    for size in (min, max):
        N = size(cells["N"][cells["role"] == "grid"])
        cell = cells[(cells["N"] == N) & (cells["role"] == "grid")].iloc[0]
        for multiple in (0.5, 1.0, 2.0):
            for seed in range(base.seed, base.seed + base.sweep.rate_seeds):
                checks.append(_run(base, cell, "rate", multiple, seed))
    return grid + checks


def holdout(base: Run) -> list[Run]:
    """The run that the forecast is for."""
    cells = plan(base).cells
    return [_run(base, cell) for _, cell in cells[cells["role"] == "holdout"].iterrows()]


def plan(base: Run) -> grids.Grid:
    """The grid and the hold-out as numbers, within one epoch of the corpus."""
    settings, limits = base.sweep, grids.Limits(base.data.open().available_tokens, base.sweep.minimum_steps)
    rows = []
    for width, layers in settings.shapes:
        numbers = counting.closed_form(_model(base, width, layers).resolve(base.data), base.data.sequence_length)
        rows.append({"width": width, "layers": layers, "N": numbers["N_matmul"]})
    candidates = pd.DataFrame(rows)
    candidates = candidates.assign(
        flops_per_token=6 * candidates["N"], tokens_per_step=base.data.tokens_per_step
    )
    optimum = grids.ratio_optimum(candidates, settings.tokens_per_parameter)
    grid = grids.isoflop(
        candidates, settings.budgets_flops, optimum, limits, settings.sizes, settings.span
    )
    return grid + grids.holdout(candidates, settings.holdout_flops, optimum, limits)


def _model(base: Run, width: int, layers: int) -> Transformer:
    heads = max(1, width // 16)
    return dataclasses.replace(base.model, width=width, layers=layers, heads=heads)


def rate(base: Run, width: float) -> float:
    """The learning rate that the rule gives a model of `width`."""
    return base.optimizer.learning_rate * (width / base.sweep.rate_width) ** base.sweep.rate_exponent


def _run(base: Run, cell: pd.Series, role: str | None = None, multiple: float = 1.0, seed: int | None = None) -> Run:
    rule = rate(base, cell["width"])
    return dataclasses.replace(
        base,
        model=_model(base, int(cell["width"]), int(cell["layers"])),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=multiple * rule),
        tokens=int(cell["D"]),
        seed=base.seed if seed is None else seed,
        name=cell["name"] if role is None else f"{role}-{cell['N']}-{multiple:g}x-seed{seed}",
        cell=Cell(role or cell["role"], float(cell["budget_flops"])),

    )
