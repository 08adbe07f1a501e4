"""Learning-rate schedules: each is a table, one factor of the peak rate for each step of a run.

Steps count from 0. Warm-up rises in equal parts, so that step 0 already moves and the peak stands first at
step `warmup`. A decay is its curve on the span that ends with the run, sampled at the start of each step: it
starts at the peak and would reach the final fraction at step `steps`, so the last step still moves.
"""

import dataclasses
from typing import Literal

import numpy as np

from llm_jax.config import Tagged, UserError
from llm_jax.values import hints


@dataclasses.dataclass(frozen=True)
class Schedule(Tagged):
    """Root of the union; every member warms up over a fraction of the run's steps, or over `warmup_steps`.

    Runs of different lengths have their first steps in common if the warm-up is given in steps (trunks.py).
    """

    warmup_fraction: float = 0.02
    warmup_steps: int | None = dataclasses.field(default=None, kw_only=True)

    def validate(self) -> None:
        for name, kind in hints(type(self)).items():
            value = getattr(self, name)
            if kind is float and not 0 <= value <= 1:
                raise UserError(f"optimizer.schedule.{name} is {value}; a fraction lies between 0 and 1")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise UserError(
                f"optimizer.schedule.warmup_steps is {self.warmup_steps}; it is none, or 0 or more"
            )

    def check_length(self, steps: int) -> None:
        """Raises UserError if a run of `steps` steps ends before its warm-up does."""
        if (self.warmup_steps or 0) >= steps:
            raise UserError(
                f"optimizer.schedule.warmup_steps is {self.warmup_steps}, which leaves nothing of the "
                f"{steps} steps"
            )

    def warmup(self, steps: int) -> int:
        """How many of the steps warm up."""
        return round(self.warmup_fraction * steps) if self.warmup_steps is None else self.warmup_steps

    def table(self, steps: int) -> np.ndarray:
        """float64 [steps]: the factor of the peak rate at each step of a run of that many steps."""
        step = np.arange(steps, dtype=np.float64)
        warmup = self.warmup(steps)
        return np.where(step < warmup, (step + 1) / (warmup + 1), self.after_warmup(step, warmup, steps))

    def after_warmup(self, step: np.ndarray, warmup: int, steps: int) -> np.ndarray:
        """The factor at each step from `warmup` on (what it says before that is not used)."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Constant(Schedule, kind="constant"):
    """The peak rate to the end; also the trunk from which decays branch."""

    def after_warmup(self, step: np.ndarray, warmup: int, steps: int) -> np.ndarray:
        return np.ones_like(step)


@dataclasses.dataclass(frozen=True)
class Linear(Schedule, kind="linear"):
    """A straight line from the peak to `final_fraction` of it."""

    final_fraction: float = 0.0

    def after_warmup(self, step: np.ndarray, warmup: int, steps: int) -> np.ndarray:
        return _decay("linear", step, warmup, steps, self.final_fraction)


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule, kind="cosine"):
    """Half a cosine from the peak to `final_fraction` of it (Loshchilov, Hutter 2017, arXiv:1608.03983)."""

    final_fraction: float = 0.1

    def after_warmup(self, step: np.ndarray, warmup: int, steps: int) -> np.ndarray:
        return _decay("cosine", step, warmup, steps, self.final_fraction)


@dataclasses.dataclass(frozen=True)
class WSD(Schedule, kind="wsd"):
    """Warm-up, stable, decay: the peak rate, then a decay over the last `decay_fraction` of the steps.

    Until its decay begins it is the trunk of every longer run; it never begins before the warm-up has ended.

    Hu et al. 2024 (arXiv:2404.06395); the shape 1 - sqrt from Hägele et al. 2024 (arXiv:2405.18392).
    """

    decay_fraction: float = 0.2
    shape: Literal["linear", "cosine", "one_minus_sqrt"] = "one_minus_sqrt"
    final_fraction: float = 0.0

    def validate(self) -> None:
        super().validate()
        if self.warmup_steps is None and self.warmup_fraction + self.decay_fraction > 1:
            raise UserError(
                f"optimizer.schedule.warmup_fraction {self.warmup_fraction} and "
                f"optimizer.schedule.decay_fraction {self.decay_fraction} together exceed the run; their sum "
                "is at most 1"
            )

    def after_warmup(self, step: np.ndarray, warmup: int, steps: int) -> np.ndarray:
        start = max(warmup, steps - round(self.decay_fraction * steps))
        return _decay(self.shape, step, start, steps, self.final_fraction)


SHAPES = {
    "linear": lambda u: 1 - u,
    "cosine": lambda u: (1 + np.cos(np.pi * u)) / 2,
    "one_minus_sqrt": lambda u: 1 - np.sqrt(u),
}


def _decay(shape: str, step: np.ndarray, start: int, steps: int, final: float) -> np.ndarray:
    """1 up to step `start`, then the curve that reaches `final` at step `steps`."""
    progress = np.clip((step - start) / max(1, steps - start), 0, 1)
    return final + (1 - final) * SHAPES[shape](progress)
