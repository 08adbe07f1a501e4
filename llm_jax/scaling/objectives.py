"""What a fit minimises: a Huber loss of ln L or of L, perhaps kinder to runs above the law than to those
below.
"""

import dataclasses

import numpy as np

from llm_jax.config import UserError, nearest

LAD_DELTA = 1e-9  # a Huber loss this narrow is the absolute deviation to nine digits
KINDS = "huber:DELTA, lad, l2 or asymmetric:SHARE[:DELTA]"


@dataclasses.dataclass(frozen=True)
class Objective:
    """sum_i w_i rho(r_i), r = fitted - measured; rho(r) = r^2/2 up to `delta`, delta (|r| - delta/2) beyond.

    name: as the user wrote it. delta: inf is least squares. raw: r is of L [nats], else of ln L. share: what
    a run above the law counts, one below it counts 1: a bad rate or seed can only raise a loss, so a small
    share fits the lower envelope.
    """

    name: str = "huber:1e-3"
    delta: float = 1e-3
    share: float = 1.0
    raw: bool = False

    def parts(self, residual: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """rho, its slope, its curvature, and the curvature of a parabola that lies above it everywhere."""
        size = np.abs(residual)
        inside = (size <= self.delta).astype(float)
        if np.isinf(self.delta):
            parts = residual**2 / 2, residual, inside, inside
        else:
            parts = (
                np.where(inside > 0, residual**2 / 2, self.delta * (size - self.delta / 2)),
                np.clip(residual, -self.delta, self.delta),
                inside,
                np.where(inside > 0, 1.0, self.delta / np.maximum(size, self.delta)),
            )
        if self.share == 1.0:
            return parts
        kind = np.where(residual < 0, self.share, 1.0)
        return tuple(kind * part for part in parts)

    @property
    def on(self) -> str:
        """What the residuals are of, for a reader."""
        return "the loss itself" if self.raw else "ln of the loss"


def objective(loss: str = "huber:1e-3", on: str = "log") -> Objective:
    """The objective that `--loss` and `--on` name; UserError for what they can't mean."""
    if on not in ("log", "raw"):
        raise UserError(f"--on={on}: log (residuals of ln L) or raw (residuals of L)")
    kind, *bounds = loss.split(":")
    if kind not in ("huber", "lad", "l2", "asymmetric"):
        raise UserError(f"no loss {loss!r}; {nearest(loss, ['huber:1e-3', 'lad', 'l2', 'asymmetric:0.1'])}")
    limit = {"huber": 1, "asymmetric": 2}.get(kind, 0)
    try:
        numbers = [float(bound) for bound in bounds]
    except ValueError:
        numbers = [-1.0]
    if len(numbers) > limit or not all(number > 0 for number in numbers):
        raise UserError(
            f"--loss={loss}: bounds are positive numbers, as in {KINDS}; for a bound of 0 write lad"
        )
    share = 1.0
    if kind == "asymmetric":
        share, numbers = (numbers or [0.1])[0], numbers[1:]
        if share > 1:
            raise UserError(f"--loss={loss}: the share of runs above the law is at most 1, such as 0.1")
    delta = {"lad": LAD_DELTA, "l2": np.inf}.get(kind) or max((numbers or [1e-3])[0], LAD_DELTA)
    return Objective(loss, delta, share, on == "raw")
