"""What was tuned at one horizon and one batch, taken to others: rules that return a changed optimizer.

Over width and depth the parametrisation carries it (models/parametrization.py), with the numbers unchanged.
"""

import dataclasses
import math

from llm_jax.config import UserError
from llm_jax.optimizers import Optimizer

HORIZON_EXPONENT = 0.32  # the paper's fit over models of 50M to 2.7B parameters


def to_horizon(
    optimizer: Optimizer, tokens: float, tuned_tokens: float, exponent: float = HORIZON_EXPONENT
) -> Optimizer:
    """Rates for a run of `tokens` from those that were best at `tuned_tokens`: rate ~ tokens^-exponent.

    For one batch size, under a schedule that decays at the end (Bjorck et al. 2024, arXiv:2409.19913). Raises
    UserError for a number of tokens that isn't positive.
    """
    return _with_rates(optimizer, _ratio(tokens, tuned_tokens, "tokens") ** -exponent)


def to_batch(optimizer: Optimizer, batch_tokens: float, tuned_batch_tokens: float) -> Optimizer:
    """The optimizer for batches of `batch_tokens` from that for `tuned_batch_tokens`, k times as many.

    Rates go as sqrt(k) where steps don't grow with the gradient (Malladi et al. 2022, arXiv:2205.10287), as k
    for SGD (Goyal et al. 2017, arXiv:1706.02677), both below the critical batch size. Beta2 becomes beta2^k:
    it forgets after as many tokens (Marek et al. 2025, arXiv:2507.07101), and so does the average of the
    weights; beta1 stays, as there. Epsilon goes as the noise in the gradient, k^-1/2. Decay times rate grows
    as k, as it acts once a step.
    """
    k = _ratio(batch_tokens, tuned_batch_tokens, "tokens of a batch")
    power = 1.0 if optimizer.steps == {"sgd"} else 0.5
    changed = {"weight_decay": optimizer.weight_decay * k ** (1 - power)}
    if hasattr(optimizer, "beta2"):
        changed["beta2"] = optimizer.beta2**k
    if hasattr(optimizer, "epsilon"):
        changed["epsilon"] = optimizer.epsilon * k**-0.5
    if optimizer.average is not None:
        changed["average"] = optimizer.average**k
    return dataclasses.replace(_with_rates(optimizer, k**power), **changed)


def half_life_tokens(beta: float, batch_tokens: float) -> float:
    """After how many tokens a moving average by `beta` has forgotten half: log(1/2) / log(beta) steps."""
    return batch_tokens * math.log(0.5) / math.log(beta)


def beta_of_half_life(half_life: float, batch_tokens: float) -> float:
    """The beta that forgets half in `half_life` tokens, at batches of `batch_tokens`."""
    return 0.5 ** (batch_tokens / half_life)


def _with_rates(optimizer: Optimizer, factor: float) -> Optimizer:
    rates = [f.name for f in dataclasses.fields(optimizer) if f.name.endswith("learning_rate")]
    return dataclasses.replace(optimizer, **{name: getattr(optimizer, name) * factor for name in rates})


def _ratio(to: float, tuned: float, what: str) -> float:
    if not (to > 0 and tuned > 0 and math.isfinite(to) and math.isfinite(tuned)):
        raise UserError(f"{what}: from {tuned:g} to {to:g} there is no ratio; both must be positive")
    return to / tuned
