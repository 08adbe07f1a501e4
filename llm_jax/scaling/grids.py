"""IsoFLOP grids: which models to train, on how many tokens, at each compute budget.

A grid is planned from numbers alone. The caller counts its models (models/counting.py) and hands over a
table of candidates; nothing here knows what a model is. Compute is counted in whatever convention the
column `flops_per_token` follows, so a budget means the same thing to every cell of the grid.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from llm_jax.config import UserError

NEEDED = ("N", "flops_per_token", "tokens_per_step")
SAME_BUDGET = 0.05  # runs whose ln C differ by less are one budget: D is rounded to whole steps
MOST_TOKENS = 1e18

# N_opt as a function of the budget: a prior before the sweep, a fitted law after it.
Optimum = Callable[[float], float]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a cell must keep to.

    available_tokens: tokens of one epoch; no cell may see more (None: unlimited) unless `repeat`.
    minimum_steps: below it a run is mostly warm-up, and rounding D to whole steps bends the budget.
    """

    available_tokens: int | None = None
    minimum_steps: int = 100
    repeat: bool = False

    def remedy(self, cells: pd.DataFrame) -> str:
        """What to add to the refusal of `cells` that one epoch is too short for."""
        short = self.available_tokens is not None and (cells["D"] > self.available_tokens).any()
        return "; name a larger corpus by --config.data.corpus=FOLDER" if short and not self.repeat else ""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Planned runs, one row each, and what the planner has to say about them.

    cells has the candidates' columns and name, role ("grid" or "holdout"), budget_flops, steps, D [tokens],
    flops [of the whole run] and deviation [(flops - budget) / budget, from rounding to whole steps].
    """

    cells: pd.DataFrame
    notes: tuple[str, ...] = ()

    def __add__(self, other: "Grid") -> "Grid":
        return Grid(pd.concat([self.cells, other.cells], ignore_index=True), self.notes + other.notes)

    @property
    def flops(self) -> float:
        """The price of all cells in FLOPs."""
        return float(self.cells["flops"].sum())

    def seconds(self, flops_per_second: float) -> float:
        """The price in seconds of one device that achieves `flops_per_second`, compilation not included."""
        if not flops_per_second > 0:
            raise UserError(f"flops_per_second is {flops_per_second}; a price needs a positive speed")
        return self.flops / flops_per_second


def ratio_optimum(candidates: pd.DataFrame, tokens_per_parameter: float = 20.0) -> Optimum:
    """The prior that D/N is constant at the optimum (about 20 in Hoffmann et al. 2022, table A3).

    D/N = C / (flops_per_token * N) falls with N, so for each budget C the N with the wanted ratio is read
    off the candidates, log-interpolated between them and clipped to their range.
    """
    table = candidates.sort_values("N")
    cost = np.log((table["flops_per_token"] * table["N"]).to_numpy(float))
    sizes = np.log(table["N"].to_numpy(float))
    return lambda budget: float(np.exp(np.interp(np.log(budget / tokens_per_parameter), cost, sizes)))


def isoflop(
    candidates: pd.DataFrame,
    budgets: Sequence[float],
    optimum: Optimum,
    limits: Limits = Limits(),
    sizes: int = 7,
    span: float = 4.0,
    minimum_sizes: int = 5,
) -> Grid:
    """A grid of `sizes` models around the prior optimum at each budget.

    Args:
        candidates: one row per model: N, flops_per_token, tokens_per_step, and whatever else (width,
            layers ...), which is carried along.
        budgets: FLOPs of one run, each.
        optimum: N_opt(budget) as expected beforehand, for example `ratio_optimum(candidates)`.
        span: the sizes reach from optimum / span to optimum * span, evenly in log N.
        minimum_sizes: a parabola through fewer says nothing about its own fit.

    Raises UserError for a malformed table, and when fewer than `minimum_sizes` candidates keep within
    `limits` at some budget. Candidates left out for that reason are named in the notes.
    """
    check_candidates(candidates)
    budgets = sorted(float(budget) for budget in budgets)
    if not budgets or budgets[0] <= 0 or (np.diff(np.log(budgets)) <= SAME_BUDGET).any():
        raise UserError(
            f"budgets are {budgets}; an isoFLOP grid needs positive budgets, each at least "
            f"{np.expm1(SAME_BUDGET):.1%} above the one before, or they count as one"
        )
    if not 1 < span < np.inf or sizes < minimum_sizes:
        raise UserError(f"sizes={sizes}, span={span}; sizes must be {minimum_sizes} or more and span above 1")
    notes, parts = [], []
    for budget in budgets:
        every = cells_at(candidates, budget, "grid")
        problems = problems_of(every, limits)
        allowed = every[problems == ""]
        if len(allowed) < minimum_sizes:
            counts = problems[problems != ""].value_counts()
            reasons = "; ".join(f"{count} would see {text}" for text, count in counts.items())
            raise UserError(
                f"budget {budget:.3g} FLOPs: {len(allowed)} of {len(every)} candidates can be trained, "
                f"a parabola needs {minimum_sizes}"
                + (f" ({reasons})" if reasons else "")
                + limits.remedy(every)
            )
        centre = optimum(budget)
        wanted = centre * span ** np.linspace(-1, 1, sizes)
        inside = every["N"].between(wanted[0], wanted[-1]) & (problems != "")
        for cell, text in zip(every[inside].itertuples(), problems[inside], strict=True):
            notes.append(f"budget {budget:.3g}: N={cell.N:,} left out, it would see {text}")
        picked = allowed.iloc[_nearest(allowed["N"].to_numpy(float), wanted)].sort_values("N")
        low, high = picked["N"].iloc[0], picked["N"].iloc[-1]
        if not low < centre < high:
            notes.append(
                f"budget {budget:.3g}: the expected optimum N={centre:,.0f} lies outside "
                f"the sizes trained, {low:,} to {high:,}"
            )
        parts.append(picked)
    return Grid(pd.concat(parts, ignore_index=True), tuple(notes))


def holdout(candidates: pd.DataFrame, budget: float, optimum: Optimum, limits: Limits = Limits()) -> Grid:
    """The one run a forecast is checked by: the candidate nearest the optimum expected at `budget`.

    `budget` should lie well above the largest fitted one (4x, better 10x), or the check is an
    interpolation. Raises UserError when no candidate keeps within `limits` there.
    """
    check_candidates(candidates)
    every = cells_at(candidates, budget, "holdout")
    centre = optimum(budget)
    order = np.argsort(np.abs(np.log(every["N"].to_numpy(float) / centre)), kind="stable")
    every = every.iloc[order].reset_index(drop=True)
    problems = problems_of(every, limits)
    notes = []
    for position, text in enumerate(problems):
        size = every["N"].iloc[position]
        if not text:
            return Grid(every.iloc[[position]].reset_index(drop=True), tuple(notes))
        notes.append(f"hold-out at {budget:.3g}: N={size:,} left out, it would see {text}")
    raise UserError(
        f"no candidate can be the hold-out at {budget:.3g} FLOPs: the nearest to the optimum, "
        f"N={every['N'].iloc[0]:,}, would see {problems.iloc[0]}{limits.remedy(every)}"
    )


def cells_at(candidates: pd.DataFrame, budget: float, role: str) -> pd.DataFrame:
    """Every candidate trained on D = budget / flops_per_token tokens, rounded to whole steps."""
    cells = candidates.sort_values("N").reset_index(drop=True)
    return cells_of(cells, budget / cells["flops_per_token"], role, float(budget))


def cells_of(
    rows: pd.DataFrame, tokens: np.ndarray | pd.Series, role: str, budget: float | None = None
) -> pd.DataFrame:
    """Rows of candidates trained on `tokens` each, rounded to whole steps; without a budget each is its
    own.
    """
    tokens = np.asarray(tokens, float)
    if not tokens.max(initial=0) < MOST_TOKENS:
        of = f" of a budget of {budget:.3g} FLOPs" if budget else ""
        raise UserError(f"{tokens.max():.3g} tokens{of} are more than a plan can count, {MOST_TOKENS:.0e}")
    steps = np.maximum(1, np.rint(tokens / rows["tokens_per_step"])).astype(np.int64)
    flops = steps * (rows["flops_per_token"] * rows["tokens_per_step"]).astype(float)
    budgets = np.full(len(rows), budget) if budget else (rows["flops_per_token"] * tokens).to_numpy(float)
    named = zip(budgets, rows["N"], strict=True)
    return rows.assign(
        name=[f"{role}-{each:.2e}-{size}".replace("+", "") for each, size in named],
        role=role,
        budget_flops=budgets,
        steps=steps,
        D=steps * rows["tokens_per_step"],
        flops=flops,
        deviation=flops / budgets - 1.0,
    )


def problems_of(cells: pd.DataFrame, limits: Limits) -> pd.Series:
    """What each cell would see that `limits` forbid; empty where it keeps to them."""
    few = cells["steps"] < limits.minimum_steps
    text = np.where(few, f"fewer than {limits.minimum_steps:,} steps", "")
    if limits.available_tokens is not None and not limits.repeat:
        again = ~few & (cells["D"] > limits.available_tokens)
        text = np.where(again, f"more than one epoch of {limits.available_tokens:,} tokens", text)
    return pd.Series(text, index=cells.index)


def check_candidates(candidates: pd.DataFrame) -> None:
    """Raises UserError unless every candidate has a positive size, cost and batch, and sizes differ."""
    for column in NEEDED:
        if column not in candidates:
            raise UserError(f"the table of candidates has no column {column!r}; it needs {', '.join(NEEDED)}")
        if not (np.isfinite(candidates[column]).all() and (candidates[column] > 0).all()):
            raise UserError(f"the table of candidates has values in {column!r} that are not positive numbers")
    repeated = candidates["N"][candidates["N"].duplicated()]
    if len(repeated):
        raise UserError(f"two candidates have N={repeated.iloc[0]:,}; every size may stand once")


def _nearest(sizes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Distinct indices into `sizes` [S], nearest in log to `wanted` [W] in total; min(S, W) of them."""
    from scipy.optimize import linear_sum_assignment  # imported where used: a quarter of a second

    distance = np.abs(np.log(sizes[:, None] / wanted[None, :]))
    return linear_sum_assignment(distance)[0]
