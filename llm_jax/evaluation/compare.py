"""Two models on the same items: differences in pairs, with 95% intervals over items."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.config import UserError
from llm_jax.evaluation.scores import Outcome
from llm_jax.evaluation.tasks import Score

NORMAL = 1.959964  # standard errors either way that hold 95%


class Difference(NamedTuple):
    """Two ratios of sums over the same items, the second minus the first, and its 95% interval."""

    first: float
    second: float
    difference: float
    low: float
    high: float
    count: int

    def named(self, first: str, second: str) -> dict[str, Any]:
        """As JSON, the two ratios by names of their own."""
        values = self._asdict()
        return {first: values.pop("first"), second: values.pop("second")} | values


def difference(pairs: Sequence[tuple[Score, Score]], draws: int = 2000, seed: int = 0) -> Difference:
    """Percentiles of the difference over items drawn with replacement (nan for fewer than two).

    Where all scores are 0 or 1 the interval is at least as wide as `newcombe`'s: percentiles alone would be
    sure that what never happened in these items never does.
    """
    sums = np.array(pairs, np.float64)  # [items, model, (sum, count)]
    items = len(sums)
    weights = np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), size=draws)
    drawn = np.einsum("di,ims->dms", weights, sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        changes = drawn[:, 1, 0] / drawn[:, 1, 1] - drawn[:, 0, 0] / drawn[:, 0, 1]
    low, high = np.nanpercentile(changes, [2.5, 97.5]) if items > 1 else (np.nan, np.nan)
    if items > 1 and np.isin(sums[..., 0], (0, 1)).all() and (sums[..., 1] == 1).all():
        least, most = newcombe(*sums[..., 0].T)
        low, high = min(low, least), max(high, most)
    first, second = sums[:, :, 0].sum(0) / sums[:, :, 1].sum(0)
    return Difference(*map(float, (first, second, second - first, low, high)), items)


def newcombe(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """The 95% interval of the mean of `second` [n] minus that of `first` [n], both zeros and ones in pairs.

    Newcombe (Statistics in Medicine 17, 1998, 2635-2650), method 10: Wilson's intervals of the two means, put
    together by their correlation phi with its continuity correction. It has a width for 0 of n, too.
    """
    n, p, q = len(first), float(second.mean()), float(first.mean())
    (p_low, p_high), (q_low, q_high) = _wilson(p, n), _wilson(q, n)
    together = float(np.mean(first * second)) - p * q
    together = max(together - 1 / (2 * n), 0.0) if together > 0 else together
    spread = math.sqrt(p * (1 - p) * q * (1 - q))
    phi = together / spread if spread else 0.0

    def combined(of_p: float, of_q: float) -> float:
        return math.sqrt(of_p**2 - 2 * phi * of_p * of_q + of_q**2)

    return p - q - combined(p - p_low, q_high - q), p - q + combined(p_high - p, q - q_low)


def _wilson(share: float, n: int) -> tuple[float, float]:
    """The 95% interval of a share of n (Wilson 1927)."""
    z2 = NORMAL**2
    middle, half = share + z2 / (2 * n), NORMAL * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)


def paired(first: Outcome, second: Outcome, draws: int = 2000) -> dict[str, Difference]:
    """By metric, over the items that both outcomes could judge. Raises UserError for other items."""
    if [item.place for item in first.items] != [item.place for item in second.items]:
        raise UserError(f"{first.name}: the two models were asked about other items")
    both: dict[str, list[tuple[Score, Score]]] = {}
    for one, other in zip(first.scores, second.scores, strict=True):
        for name in one.keys() & other.keys():
            both.setdefault(name, []).append((one[name], other[name]))
    names: Mapping[str, Score] = next(filter(None, first.scores), {})
    return {name: difference(both[name], draws) for name in names if name in both}
