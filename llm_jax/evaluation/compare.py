"""Two models on the same items: differences in pairs, with intervals over what was drawn independently."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtri, stdtrit

from llm_jax.config import UserError
from llm_jax.evaluation.scores import Outcome, pulls, together
from llm_jax.evaluation.tasks import Score


class Difference(NamedTuple):
    """Two ratios of sums over the same items, the second minus the first, and its interval.

    count: items. units: what was drawn independently: items, or groups of them that share what varies.
    """

    first: float
    second: float
    difference: float
    low: float
    high: float
    count: int
    units: int

    def named(self, first: str, second: str) -> dict[str, Any]:
        """As JSON, the two ratios by names of their own."""
        values = self._asdict()
        return {first: values.pop("first"), second: values.pop("second")} | values


def difference(
    pairs: Sequence[tuple[Score, Score]],
    draws: int = 2000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
) -> Difference:
    """Percentiles of the difference over items, or whole groups, drawn with replacement (nan for only one).

    groups: what each item shares with others. The interval is no narrower than Student's t, since percentiles
    are too sure of few units, nor, where scores are 0 or 1 (or so many right of as many), than `newcombe`'s,
    since they would be sure that what never happened in these items never does.
    """
    items = np.array(pairs, np.float64)  # [items, model, (sum, count)]
    sums = together(items, groups)
    units = len(sums)
    weights = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=draws)
    drawn = np.einsum("du,ums->dms", weights, sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        changes = drawn[:, 1, 0] / drawn[:, 1, 1] - drawn[:, 0, 0] / drawn[:, 0, 1]
    first, second = sums[:, :, 0].sum(0) / sums[:, :, 1].sum(0)
    right, asked = items[..., 0], items[..., 1]
    shares = (asked == asked.flat[0]).all() and (right == np.round(right).clip(0, asked)).all()
    low = high = math.nan
    if units > 1:
        bounds = [tuple(np.nanpercentile(changes, [50 * (1 - level), 50 * (1 + level)]))]
        variance = np.square(pulls(sums[:, 1]) - pulls(sums[:, 0])).sum() * units / (units - 1)
        half = float(stdtrit(units - 1, (1 + level) / 2)) * math.sqrt(variance)
        bounds.append((second - first - half, second - first + half))
        bounds += [newcombe(*(right / asked).T, level)] if shares else []
        low, high = min(low for low, _ in bounds), max(high for _, high in bounds)
        low, high = (max(low, -1.0), min(high, 1.0)) if shares else (low, high)
    return Difference(*map(float, (first, second, second - first, low, high)), len(items), units)


def newcombe(first: np.ndarray, second: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The interval of the mean of `second` [n] minus that of `first` [n], both zeros and ones in pairs (of
    what lies between, which varies less, it is too wide).

    Newcombe (Statistics in Medicine 17, 1998, 2635-2650), method 10: Wilson's intervals of the two means, put
    together by their correlation phi with its continuity correction. It has a width for 0 of n, too.
    """
    n, p, q = len(first), float(second.mean()), float(first.mean())
    (p_low, p_high), (q_low, q_high) = _wilson(p, n, level), _wilson(q, n, level)
    together = float(np.mean(first * second)) - p * q
    together = max(together - 1 / (2 * n), 0.0) if together > 0 else together
    spread = math.sqrt(p * (1 - p) * q * (1 - q))
    phi = together / spread if spread else 0.0

    def combined(of_p: float, of_q: float) -> float:
        return math.sqrt(of_p**2 - 2 * phi * of_p * of_q + of_q**2)

    return p - q - combined(p - p_low, q_high - q), p - q + combined(p_high - p, q - q_low)


def _wilson(share: float, n: int, level: float) -> tuple[float, float]:
    """The interval of a share of n (Wilson 1927)."""
    z = float(ndtri((1 + level) / 2))
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def of_all(comparisons: int, level: float = 0.95) -> float:
    """The level at which so many intervals hold all together as often as `level` says (Bonferroni's)."""
    return 1 - (1 - level) / comparisons


def paired(first: Outcome, second: Outcome, draws: int = 2000, level: float = 0.95) -> dict[str, Difference]:
    """By metric, over the items that both outcomes could judge. Raises UserError for other items."""
    if [item.place for item in first.items] != [item.place for item in second.items]:
        raise UserError(f"{first.name}: the two models were asked about other items")
    both: dict[str, list[tuple[Score, Score, Hashable]]] = {}
    for one, other, shared in zip(first.scores, second.scores, first.shared, strict=True):
        for name in one.keys() & other.keys():
            both.setdefault(name, []).append((one[name], other[name], shared))
    names: Mapping[str, Score] = next(filter(None, first.scores), {})
    return {
        name: difference([pair[:2] for pair in pairs], draws, groups=[pair[2] for pair in pairs], level=level)
        for name in names
        if name in both
        for pairs in [both[name]]
    }
