"""The cheapest run that reaches a loss: to train, or to train and then serve (Sardana et al. 2023).

A model of N parameters that is trained on D tokens and then reads and writes T costs k N D + (k/3) N T FLOPs:
a forward pass is a third of a training step. Among all N and D of equal loss the cheapest is smaller, and
trained for longer, the larger T is.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from llm_jax.config import UserError
from llm_jax.scaling.law import Law, lowest
from llm_jax.scaling.law import Optimum as Run
from llm_jax.scaling.results import Estimate, Fit

_LARGEST = 100.0  # ln of N and D


class Cheapest(NamedTuple):
    """The cheapest run: parameters, tokens, FLOPs of training, of inference and of both, and the share of
    the latter that it saves beside the run that is cheapest to train.
    """

    N: Estimate
    D: Estimate
    training: Estimate
    inference: Estimate
    total: Estimate
    saved: Estimate


def cheapest(fit: Fit, loss: float, inference_tokens: float = 0.0, **given: float) -> Cheapest:
    """The cheapest run that reaches `loss` [nats/token] and then serves `inference_tokens`.

    given: what else the law depends on, such as U. Where a refit can't reach the loss at all, its run is
    infinite. Raises UserError where the law itself can't, or isn't one of N and D.
    """
    k, third = fit.conventions["flops_per_nd"], fit.conventions["flops_per_nd"] / 3
    if fit.law.output != "loss":
        raise UserError(f"{fit.law.formula} is no law of a loss that a run could reach")

    def at(theta: np.ndarray) -> tuple[np.ndarray, ...]:
        def priced(tokens: float) -> tuple[np.ndarray, ...]:
            N, D = run(fit.law, theta, loss, tokens, given)
            return N, D, k * N * D, third * N * inference_tokens if inference_tokens else np.zeros_like(N)

        N, D, training, inference = priced(inference_tokens)
        total, plain = training + inference, sum(priced(0.0)[2:])
        with np.errstate(invalid="ignore"):  # where no run reaches the loss none saves anything
            return N, D, training, inference, total, np.nan_to_num(1 - total / plain)

    best, draws = at(fit.theta[None]), at(fit.draws)
    if not np.isfinite(best[0][0]):
        raise UserError(
            f"no run reaches a loss of {loss:g}: {fit.law.formula} stays above it at every N and D"
        )
    return Cheapest(*(fit.with_interval(b[0], d) for b, d in zip(best, draws, strict=True)))


def run(law: Law, theta: np.ndarray, loss: float, inference_tokens: float, given: Mapping[str, float]) -> Run:
    """N and D [S] of the cheapest run that reaches `loss`; infinite where there is none."""
    log_loss, served = law.of_size_and_data(theta, given), np.log(max(inference_tokens / 3, 1e-300))

    def needed(log_n: np.ndarray) -> np.ndarray:
        """ln D that reaches the loss; infinite where no D does."""
        low, high = np.zeros_like(log_n), np.full_like(log_n, _LARGEST)
        within = log_loss(log_n, high) <= np.log(loss)
        for _ in range(60):
            middle = (low + high) / 2
            enough = log_loss(log_n, middle) <= np.log(loss)
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        return np.where(within, high, np.inf)

    log_n = lowest(lambda log_n: log_n + np.logaddexp(needed(log_n), served), np.full(len(theta), _LARGEST))
    log_d = needed(log_n)
    return np.where(np.isfinite(log_d), np.exp(log_n), np.inf), np.exp(log_d)
