"""The drift of the best rate: recovered where it is known, and refused where there is no minimum."""

import itertools

import numpy as np
import pandas as pd
import pytest

from llm_jax.config import UserError
from llm_jax.scaling.drift import drift

SIZES, RATES = (16, 32, 64, 128), tuple(1e-3 * 10 ** (k / 3) for k in range(7))


def table(slope, noise=0.0, seeds=2, rates=RATES, best_of_first=2e-2):
    """Parabolas in ln rate whose minimum goes as size^slope, 2.5 nats lower by size^0.1."""
    generator, rows = np.random.default_rng(0), []
    for size, rate, seed in itertools.product(SIZES, rates, range(seeds)):
        away = np.log(rate / best_of_first) - slope * np.log(size / SIZES[0])
        log_loss = (
            np.log(2.5) - 0.1 * np.log(size / 16) + 0.02 * away**2 + noise * generator.standard_normal()
        )
        rows.append({"size": size, "rate": rate, "seed": seed, "loss": np.exp(log_loss)})
    return pd.DataFrame(rows).assign(status="done", name="run")


@pytest.mark.parametrize("slope", [0.0, -0.6])
def test_a_known_drift_is_recovered_and_its_cost_too(slope):
    found = drift(table(slope))
    assert found.slope.value == pytest.approx(slope, abs=1e-6) and found.transfers == (slope == 0)
    assert [best.size for best in found.best] == list(SIZES) and not found.refused
    for best in found.best:
        away = slope * np.log(best.size / 16)
        assert best.rate.value == pytest.approx(2e-2 * np.exp(away), rel=1e-6)
        assert best.loss == pytest.approx(2.5 * (best.size / 16) ** -0.1, rel=1e-6)
        # Off the fitted parabola the cost is read between trained rates.
        assert best.kept == pytest.approx(best.loss * np.exp(0.02 * away**2), rel=0.01)


def test_with_noise_the_interval_holds_the_drift_and_says_that_another_does_not_transfer():
    still, moving = drift(table(0.0, noise=0.005)), drift(table(-0.6, noise=0.005))
    assert still.transfers and still.slope.low < 0 < still.slope.high
    assert moving.slope.low < -0.6 < moving.slope.high < 0 and not moving.transfers
    assert 0.003 < moving.noise < 0.008
    assert all(best.rate.low < best.rate.value < best.rate.high for best in moving.best)


def test_a_best_rate_at_the_edge_is_refused_and_the_others_still_tell():
    found = drift(table(-0.6, rates=RATES[3:], best_of_first=3e-2))
    assert [bool(best.refused) for best in found.best] == [False, False, True, True]
    assert found.best[3].refused == "the smallest rate is the best, the minimum may lie below it"
    assert found.slope.value == pytest.approx(-0.6, abs=1e-6)
    assert found.warnings == (
        "2 of 4 sizes are refused",
        "under-identified: a line through 2 sizes leaves nothing to judge it by",
    )


def test_without_two_minima_there_is_no_slope_and_it_says_why():
    found = drift(table(0.0, rates=RATES[4:]))
    assert "0 of 4 sizes have a minimum" in found.refused and not found.transfers
    assert all(best.refused for best in found.best) and np.isnan(found.slope.value)


def test_diverged_runs_are_left_out_and_too_few_rates_are_refused():
    runs = table(0.0)
    runs.loc[runs["rate"] > 5e-2, ["status", "loss"]] = "diverged", np.nan
    assert drift(runs).slope.value == pytest.approx(0, abs=1e-6)
    runs.loc[(runs["rate"] > 2e-3) & (runs["size"] == 64), "status"] = "diverged"
    with pytest.raises(UserError, match="size 64: 1 rates didn't diverge, a minimum needs 3"):
        drift(runs)
