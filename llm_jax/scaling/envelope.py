"""Approach 1 (Hoffmann et al. 2022, section 3.1): the lowest of all training curves at each compute.

Every row is a point of a training curve. ln loss of each run is interpolated over ln C; at each of many C
the run that is lowest gives N_opt and D_opt. Where that is the smallest or the largest size, the true best
may lie beyond, and the point is left out.

There are no intervals: the lowest of a few noisy curves moves in jumps and is biased, and whole runs drawn
with replacement did not hold the truth as often as they said (LOG.md).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from llm_jax.config import UserError
from llm_jax.files import with_nulls
from llm_jax.scaling.powers import FORMULAS, PowerLaws, lines_through
from llm_jax.scaling.results import remarks, row
from llm_jax.scaling.tables import check_points

NO_INTERVALS = (
    "no intervals: the lowest of few curves moves in jumps and is biased; 90% intervals of curves drawn "
    "anew held the true exponent in 68% (10 curves) to 97% (30) of simulated sets; those of Approaches 2, 3 "
    "and vp hold"
)


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
        return with_nulls(self.common_json() | content)

    def table(self) -> str:
        """The fit as text."""
        low, high = self.frontier["C"].min(), self.frontier["C"].max()
        lines = [
            f"Approach 1: envelope of {self.runs} training curves    (N: {self.conventions['N']})",
            f"{len(self.frontier)} points from C={low:.3g} to {high:.3g}, "
            f"{self.frontier['N'].nunique()} sizes are the best somewhere",
            FORMULAS,
        ]
        lines += [row(name, number) for name, number in self.parameters.items()]
        return "\n".join(lines + remarks(self.points, self.warnings))


def fit_envelope(
    points: pd.DataFrame,
    *,
    grid: int = 1500,
    columns: Mapping[str, str] | None = None,
    where: str | None = None,
    counting: str = "as given in the table",
    flops_per_nd: float = 6.0,
) -> EnvelopeFit:
    """Approach 1 on a table with columns run, N, D, loss (C where it isn't flops_per_nd N D), many rows a
    run.

    grid: log-spaced C between the ends of the curves. Raises UserError where fewer than two sizes are ever
    best with a smaller and a larger one beside them.
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

    lowest = _frontier(losses, sizes)
    used = np.flatnonzero(lowest >= 0)
    best = lowest[used]
    if len(np.unique(sizes[best])) < 2:
        raise UserError(
            "fewer than 2 sizes are ever the best between a smaller and a larger one; an envelope needs more "
            "sizes, or curves that overlap in compute"
        )
    lines = lines_through(log_c[used], np.stack([sizes[best], tokens[best, used], losses[best, used]]))
    warnings = [NO_INTERVALS]
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
        "columns": dict(columns or {}), "where": where,
    }  # fmt: skip
    return EnvelopeFit(
        lines,
        np.empty((0, 3, 2)),
        float("nan"),
        0,
        checked,
        float("nan"),
        conventions,
        tuple(warnings),
        table,
        len(curves),
    )


def _over(log_c: np.ndarray, curve: pd.DataFrame, column: str) -> np.ndarray:
    """ln of a column of one curve at ln C, linear between its rows; infinite where the curve has none."""
    x, y = np.log(curve["C"].to_numpy(float)), np.log(curve[column].to_numpy(float))
    return np.where((log_c >= x[0]) & (log_c <= x[-1]), np.interp(log_c, x, y), np.inf)


def _frontier(losses: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The lowest run at each C [grid]; -1 where it is the smallest or the largest of the sizes there."""
    there = np.isfinite(losses)
    best = np.where(there, losses, np.inf).argmin(0)
    low = np.where(there, sizes[:, None], np.inf).min(0)
    high = np.where(there, sizes[:, None], -np.inf).max(0)
    return np.where((sizes[best] > low) & (sizes[best] < high), best, -1)
