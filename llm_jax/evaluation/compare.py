"""Two models on the same items: differences in pairs, with bootstrap intervals over items."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.config import UserError
from llm_jax.evaluation.scores import Outcome
from llm_jax.evaluation.tasks import Score


class Difference(NamedTuple):
    """Two ratios of sums over the same items, the second minus the first, and its 95% interval."""

    base: float
    instruct: float
    difference: float
    low: float
    high: float
    count: int


def difference(pairs: Sequence[tuple[Score, Score]], draws: int = 2000, seed: int = 0) -> Difference:
    """Percentiles of the difference over items drawn with replacement (nan for fewer than two)."""
    sums = np.array(pairs, np.float64)  # [items, model, (sum, count)]
    items = len(sums)
    weights = np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), size=draws)
    drawn = np.einsum("di,ims->dms", weights, sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        changes = drawn[:, 1, 0] / drawn[:, 1, 1] - drawn[:, 0, 0] / drawn[:, 0, 1]
    low, high = np.nanpercentile(changes, [2.5, 97.5]) if items > 1 else (np.nan, np.nan)
    base, instruct = sums[:, :, 0].sum(0) / sums[:, :, 1].sum(0)
    return Difference(*map(float, (base, instruct, instruct - base, low, high)), items)


def paired(base: Outcome, instruct: Outcome, draws: int = 2000) -> dict[str, Difference]:
    """By metric, over the items that both outcomes could judge. Raises UserError for other items."""
    if [item.place for item in base.items] != [item.place for item in instruct.items]:
        raise UserError(f"{base.name}: the two models were asked about other items")
    both: dict[str, list[tuple[Score, Score]]] = {}
    for one, other in zip(base.scores, instruct.scores, strict=True):
        for name in one.keys() & other.keys():
            both.setdefault(name, []).append((one[name], other[name]))
    first: Mapping[str, Score] = next(filter(None, base.scores), {})
    return {name: difference(both[name], draws) for name in first if name in both}
