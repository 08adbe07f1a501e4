"""Approach 1 (Hoffmann et al. 2022, section 3.1): the lowest of all training curves at each compute.

Every row is a point of a training curve. ln loss of each run is interpolated over ln C; at each of many C
the run that is lowest gives N_opt and D_opt. Where that is the smallest or the largest size, the true best
may lie beyond, and the point is left out.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from llm_jax.config import UserError
from llm_jax.scaling.powers import FORMULAS, PowerLaws, lines_through
from llm_jax.scaling.results import heading, plain, remarks, row
from llm_jax.scaling.tables import check_points


@dataclasses.dataclass(frozen=True)
class EnvelopeFit(PowerLaws):
    """Power laws through the envelope of training curves. frontier: its points, a table of run, C, N, D and
    loss.
    """

    frontier: pd.DataFrame
    runs: int
    approach: ClassVar[int] = 1

    def to_json(self) -> dict[str, Any]:
        """Every number of the fit as JSON values (NaN becomes null)."""
        content = {"approach": 1, "runs": self.runs, "frontier": self.frontier.to_dict("list")}
        return plain(self.common_json() | content)

    def table(self) -> str:
        """The fit as text."""
        low, high = self.frontier["C"].min(), self.frontier["C"].max()
        lines = [
            f"Approach 1: envelope of {self.runs} training curves    (N: {self.conventions['N']})",
            f"{len(self.frontier)} points from C={low:.3g} to {high:.3g}, "
            f"{self.frontier['N'].nunique()} sizes are the best somewhere",
            f"{FORMULAS}; {len(self.draws)} bootstrap refits",
            heading(self.level),
        ]
        lines += [row(name, number) for name, number in self.parameters.items()]
        return "\n".join(lines + remarks(self.points, self.warnings))


def fit_envelope(
    points: pd.DataFrame,
    *,
    grid: int = 1500,
    bootstrap: int = 1000,
    level: float = 0.9,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
    where: str | None = None,
    counting: str = "as given in the table",
    flops_per_nd: float = 6.0,
) -> EnvelopeFit:
    """Approach 1 on a table with columns run, N, D, loss (C where it isn't flops_per_nd N D), many rows a
    run.

    grid: log-spaced C between the ends of the curves. Intervals: whole runs are drawn with replacement.
    Raises UserError where fewer than three sizes are ever best with a smaller and a larger one beside them.
    """
    checked = check_points(
        points, ("N", "D", "C", "loss"), columns, where, flops_per_nd=flops_per_nd, curves=True
    )
    frame = checked.frame.assign(cluster=checked.clusters).sort_values("C", kind="stable")
    curves = [curve for _, curve in frame.groupby("cluster") if len(curve) > 1]
    if len(curves) < 3:
        raise UserError(
            f"an envelope needs 3 training curves or more; {len(curves)} runs have more than one row"
        )
    log_c = np.linspace(
        np.log(min(c["C"].iloc[0] for c in curves)), np.log(max(c["C"].iloc[-1] for c in curves)), grid
    )
    sizes = np.log([float(curve["N"].iloc[0]) for curve in curves])
    losses = np.stack(
        [_over(log_c, curve, "loss") for curve in curves]
    )  # [runs, grid], inf beyond a curve's ends
    tokens = np.stack([_over(log_c, curve, "D") for curve in curves])

    whole = _frontier(losses, sizes, np.ones(len(curves), bool))
    if len(np.unique(sizes[whole[whole >= 0]])) < 2:
        raise UserError(
            "fewer than 2 sizes are ever the best between a smaller and a larger one; an envelope needs more "
            "sizes, or curves that overlap in compute"
        )
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(curves), np.full(len(curves), 1 / len(curves)), size=bootstrap) > 0
    lines = _laws(whole, log_c, sizes, tokens, losses)
    draws = (
        np.stack([_laws(_frontier(losses, sizes, kept), log_c, sizes, tokens, losses) for kept in drawn])
        if bootstrap
        else np.empty((0, 3, 2))
    )
    finite = np.isfinite(draws).all((1, 2))
    warnings = []
    if bootstrap:
        warnings.append(
            "intervals tell how far the envelope hangs on single runs, not how noise moves them all"
        )
    if not finite.all():
        warnings.append(f"{(~finite).sum()} of {bootstrap} refits have no envelope and are left out")
    used = np.flatnonzero(whole >= 0)
    best = whole[used]
    if len(used) < grid / 2:
        warnings.append(
            f"at {1 - len(used) / grid:.0%} of the budgets the smallest or the largest size is the best"
        )
    table = pd.DataFrame(
        {
            "run": best,
            "C": np.exp(log_c[used]),
            "N": np.exp(sizes[best]),
            "D": np.exp(tokens[best, used]),
            "loss": np.exp(losses[best, used]),
        }
    )
    conventions = {
        "N": counting, "flops_per_nd": flops_per_nd, "grid": grid, "on": "ln loss over ln C",
        "reduction": "least squares, each point of the envelope of weight 1",
        "resampled": "runs", "columns": dict(columns or {}), "where": where, "seed": seed,
    }  # fmt: skip
    return EnvelopeFit(
        lines,
        draws[finite],
        float("nan"),
        0,
        checked,
        level,
        conventions,
        tuple(warnings),
        table,
        len(curves),
    )


def _over(log_c: np.ndarray, curve: pd.DataFrame, column: str) -> np.ndarray:
    """ln of a column of one curve at ln C, linear between its rows; infinite where the curve has none."""
    x, y = np.log(curve["C"].to_numpy(float)), np.log(curve[column].to_numpy(float))
    return np.where((log_c >= x[0]) & (log_c <= x[-1]), np.interp(log_c, x, y), np.inf)


def _frontier(losses: np.ndarray, sizes: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The lowest run at each C [grid]; -1 where it is the smallest or the largest of the sizes there."""
    there = np.isfinite(losses) & kept[:, None]
    best = np.where(there, losses, np.inf).argmin(0)
    low = np.where(there, sizes[:, None], np.inf).min(0)
    high = np.where(there, sizes[:, None], -np.inf).max(0)
    return np.where((sizes[best] > low) & (sizes[best] < high), best, -1)


def _laws(
    best: np.ndarray, log_c: np.ndarray, sizes: np.ndarray, tokens: np.ndarray, losses: np.ndarray
) -> np.ndarray:
    """Lines [3, 2] of ln N, ln D and ln loss of the envelope over ln C."""
    used = np.flatnonzero(best >= 0)
    runs = best[used]
    if len(np.unique(sizes[runs])) < 2:
        return np.full((3, 2), np.nan)
    return lines_through(log_c[used], np.stack([sizes[runs], tokens[runs, used], losses[runs, used]]))
