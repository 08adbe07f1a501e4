"""Plans other than isoFLOP grids: ladders, token sweeps, seeds, the best design for a forecast; and their
price.

Everything is counted as in grids.py: candidates are a table of models, a plan is a `Grid` of cells.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd

from llm_jax.config import UserError, nearest
from llm_jax.scaling.grids import Grid, Limits, cells_of, check_candidates, problems_of
from llm_jax.scaling.law import Law


def ladder(
    candidates: pd.DataFrame,
    multiples: Sequence[float],
    limits: Limits = Limits(),
    tokens_per_parameter: float = 20.0,
) -> Grid:
    """Every candidate at multiples of its Chinchilla-optimal D = tokens_per_parameter * N.

    Cells beyond `limits` are left out and named; raises UserError where none is left.
    """
    check_candidates(candidates)
    if not len(multiples) or min(multiples) <= 0:
        raise UserError(
            f"multiples are {list(multiples)}; a ladder needs positive ones, such as 0.5, 1, 2, 4"
        )
    rows = candidates.loc[candidates.index.repeat(len(multiples))].reset_index(drop=True)
    tokens = np.tile(np.asarray(multiples, float), len(candidates)) * tokens_per_parameter * rows["N"]
    return _allowed(cells_of(rows, tokens, "ladder"), limits)


def token_sweep(
    candidates: pd.DataFrame, N: float, tokens: Sequence[float], limits: Limits = Limits()
) -> Grid:
    """The candidate nearest N parameters on each number of tokens."""
    check_candidates(candidates)
    distance = np.abs(np.log(candidates["N"].to_numpy(float) / N))
    rows = candidates.iloc[np.full(len(tokens), distance.argmin())].reset_index(drop=True)
    return _allowed(cells_of(rows, pd.Series(tokens, dtype=float), "tokens"), limits)


def with_seeds(grid: Grid, seeds: int, every: float = 1.0) -> Grid:
    """The cells with seeds 0 ... seeds - 1; of those beyond the first only a share `every`, spread over the
    plan.

    A third of the cells with three seeds tells the noise of a run at little cost.
    """
    if seeds < 1 or not 0 < every <= 1:
        raise UserError(f"seeds={seeds}, every={every}; one seed or more, of a share in (0, 1]")
    count = len(grid.cells)
    again = np.unique(np.linspace(0, count - 1, max(1, round(every * count))).astype(int))
    parts = [grid.cells.assign(seed=0)]
    for seed in range(1, seeds):
        cells = grid.cells.iloc[again]
        parts.append(cells.assign(seed=seed, name=[f"{name}-seed{seed}" for name in cells["name"]]))
    return Grid(pd.concat(parts, ignore_index=True), grid.notes)


# ---- the design whose forecast is tightest ----


@dataclasses.dataclass(frozen=True)
class Target:
    """What is to be forecast: the loss of a run of N parameters on D tokens."""

    N: float
    D: float


def forecast_error(cells: pd.DataFrame, law: Law, theta: np.ndarray, target: Target, noise: float) -> float:
    """Standard error of ln loss at `target`, forecast by `law` fitted to `cells`, to first order.

    theta [P]: the law as it is expected. noise: of ln loss of one run. Infinite where the cells don't
    determine the law.
    """
    jacobian = _jacobian(law, theta, cells["N"], cells["D"])
    aim = _jacobian(law, theta, [target.N], [target.D])[0]
    scale = np.sqrt((jacobian**2).sum(0)) + 1e-300
    information = (jacobian / scale).T @ (jacobian / scale)
    if len(cells) < len(theta) or np.linalg.cond(information) > 1e13:
        return float("inf")
    return float(noise * np.sqrt((aim / scale) @ np.linalg.solve(information, aim / scale)))


def propose(
    candidates: pd.DataFrame,
    budget: float,
    law: Law,
    theta: np.ndarray,
    target: Target,
    limits: Limits = Limits(),
    largest_share: float = 0.1,
    ratios: Sequence[float] = tuple(np.geomspace(1, 400, 25)),
) -> Grid:
    """The cells, `budget` FLOPs in all, whose forecast at `target` has the smallest predicted interval.

    Greedy c-optimal design: of all candidates at all `ratios` of D/N within `limits`, each costing at most
    largest_share of the budget, the one that shrinks the variance of the forecast most for its FLOPs is
    added, cell by cell, and exchanges follow as long as they help. A cell may stand once. Raises UserError
    where the budget is too small to determine the law.
    """
    rows = candidates.loc[candidates.index.repeat(len(ratios))].reset_index(drop=True)
    check_candidates(candidates)
    cells = cells_of(rows, np.tile(np.asarray(ratios, float), len(candidates)) * rows["N"], "design")
    problems = problems_of(cells, limits)
    cells = cells[(problems == "") & (cells["flops"] <= largest_share * budget)].reset_index(drop=True)
    if len(cells) < len(theta):
        raise UserError(
            f"{len(cells)} cells keep within the limits and {largest_share:.0%} of {budget:.3g} FLOPs each; "
            f"{law.formula} has {len(theta)} parameters to determine"
        )
    jacobian = _jacobian(law, theta, cells["N"], cells["D"])
    scale = np.sqrt((jacobian**2).mean(0)) + 1e-300
    jacobian, aim = jacobian / scale, _jacobian(law, theta, [target.N], [target.D])[0] / scale
    cost = cells["flops"].to_numpy(float)
    chosen = _greedy(jacobian, aim, cost, budget)
    picked = cells.iloc[np.flatnonzero(chosen)].reset_index(drop=True)
    if np.linalg.cond(jacobian[chosen].T @ jacobian[chosen]) > 1e13:
        raise UserError(f"{budget:.3g} FLOPs are too few to determine {law.formula} by these candidates")
    error = forecast_error(picked, law, theta, target, 1.0)
    note = (
        f"forecast at N={target.N:.3g}, D={target.D:.3g}: {error:.2f} times the noise of a run to either side"
    )
    return Grid(picked, (note,))


def _greedy(jacobian: np.ndarray, aim: np.ndarray, cost: np.ndarray, budget: float) -> np.ndarray:
    """Which cells [n] bool to take: the best reduction of aim' M^-1 aim for the cost, then exchanges.

    The more are taken, the less one changes: a twentieth of them again at a time, and only the 50 that are
    missed least are exchanged.
    """
    chosen = np.zeros(len(cost), bool)
    inverse = np.eye(len(aim)) * 1e8  # hardly any prior knowledge, so that M can be inverted from the start

    def gains(inverse: np.ndarray) -> np.ndarray:
        moved = jacobian @ inverse
        return (moved @ aim) ** 2 / (1 + (moved * jacobian).sum(1))

    def add(inverse: np.ndarray, row: np.ndarray, sign: float) -> np.ndarray:
        step = inverse @ row
        return inverse - sign * np.outer(step, step) / (1 + sign * row @ step)

    left = budget
    while (open_ := ~chosen & (cost <= left)).any():
        worth = np.where(open_, gains(inverse) / cost, -1.0)
        for best in np.argsort(-worth, kind="stable")[: 1 + chosen.sum() // 20]:
            if open_[best] and cost[best] <= left:
                chosen[best], left, inverse = True, left - cost[best], add(inverse, jacobian[best], 1.0)
    for _ in range(4 * len(aim)):
        value, better = aim @ inverse @ aim, None
        moved = jacobian @ inverse
        missed = (moved @ aim) ** 2 / np.maximum(1 - (moved * jacobian).sum(1), 1e-12)
        for out in np.flatnonzero(chosen)[np.argsort((missed / cost)[chosen], kind="stable")[:50]]:
            without = add(inverse, jacobian[out], -1.0)
            gain = np.where(~chosen & (cost <= left + cost[out]), gains(without), -np.inf)
            into = int(gain.argmax())
            new = aim @ without @ aim - gain[into]
            if np.isfinite(gain[into]) and 0 < new < value * (1 - 1e-6):
                value, better = new, (out, into)
        if better is None:
            break
        out, into = better
        chosen[[out, into]] = False, True
        left += cost[out] - cost[into]
        inverse = add(add(inverse, jacobian[out], -1.0), jacobian[into], 1.0)
    return chosen


def _jacobian(law: Law, theta: np.ndarray, N: Sequence[float], D: Sequence[float]) -> np.ndarray:
    """Derivatives [n, P] of ln loss at N and D by the law's parameters."""
    x = {"N": np.log(np.asarray(N, float)), "D": np.log(np.asarray(D, float))}
    if set(law.inputs) != {"N", "D"}:
        raise UserError(f"a design needs a law of N and D, not {law.formula}")
    return law.with_jacobian(np.asarray(theta, float)[None], x)[1][0].T


# ---- the price ----


@dataclasses.dataclass(frozen=True)
class Rate:
    """What an hour of a device does and costs: peak FLOP/s in bfloat16, the share that training reaches,
    money.
    """

    peak: float
    money_per_hour: float
    utilisation: float = 0.4
    currency: str = "USD"


# Peaks by the makers' data sheets; money by public on-demand lists as remembered from 2025: put your own in.
RATES = {
    "A100": Rate(312e12, 1.79),
    "H100": Rate(989.4e12, 2.99),
    "TPU v4": Rate(275e12, 3.22),
    "TPU v5e": Rate(197e12, 1.20),
    "TPU v5p": Rate(459e12, 4.20),
    "TPU v6e": Rate(918e12, 2.70),
}


@dataclasses.dataclass(frozen=True)
class Price:
    """A plan's price: FLOPs, hours of one device, money."""

    device: str
    flops: float
    device_hours: float
    money: float
    currency: str

    def __str__(self) -> str:
        hours = f"{self.device_hours:,.3g} {self.device} hours"
        return f"{self.flops:.3g} FLOPs, {hours}, {self.money:,.3g} {self.currency}"


def price(grid: Grid, device: str, rate: Rate | None = None) -> Price:
    """What `grid` costs on a named device of RATES, or at a `rate` of your own; UserError for an unknown
    name.
    """
    if rate is None and device not in RATES:
        raise UserError(f"no device {device!r} in the price list; {nearest(device, RATES)}, or give its rate")
    rate = rate or RATES[device]
    hours = grid.seconds(rate.peak * rate.utilisation) / 3600
    return Price(device, grid.flops, hours, hours * rate.money_per_hour, rate.currency)


def _allowed(cells: pd.DataFrame, limits: Limits) -> Grid:
    """The cells that keep within the limits; what is left out is named."""
    problems = problems_of(cells, limits)
    left = cells[problems != ""]
    shown = zip(left["N"], left["D"], problems[problems != ""], strict=True)
    notes = tuple(f"N={N:,}, D={D:,} left out, it would see {text}" for N, D, text in shown)
    kept = cells[problems == ""].reset_index(drop=True)
    if not len(kept):
        raise UserError(f"no cell keeps within the limits: {notes[0] if notes else 'there are none'}")
    return Grid(kept, notes)
