"""Reading repetition off runs: where it stops helping, and what repeated tokens are worth."""

import numpy as np
import pandas as pd
import pytest

from llm_jax.config import UserError
from llm_jax.scaling.repeats import helpful, repeats, seed_noise

FRESH = 100.0 * 2 ** np.arange(7)


def law(D):
    return 1.5 + 20 * np.asarray(D, float) ** -0.5


def table(worth, noise=0.0, seeds=2, unique=100.0):
    """Fresh runs, and runs on `unique` tokens whose epochs 1, 2, 4 .. are worth so many fresh epochs."""
    generator = np.random.default_rng(0)
    epochs = 2.0 ** np.arange(len(worth))
    rows = [(1e3, D, D, 0, law(D)) for D in FRESH]
    rows += [
        (1e3, unique * e, unique, 1 + seed, law(unique * w) * np.exp(noise * generator.standard_normal()))
        for seed in range(seeds)
        for e, w in zip(epochs, worth, strict=True)
    ]
    return pd.DataFrame(rows, columns=["N", "D", "U", "seed", "loss"])


def test_repeated_tokens_are_worth_the_fresh_ones_that_give_the_same_loss():
    worth = (1.0, 2.0, 4.0, 6.0, 7.0, 5.0)
    read = next(r for r in repeats(table(worth, noise=1e-6)) if len(r.epochs) == 6)
    np.testing.assert_allclose(read.worth[[0, 1, 2]], [1, 2, 4], rtol=1e-3)  # where fresh runs stand
    np.testing.assert_allclose(read.worth, worth, rtol=0.03)  # and between them
    assert (read.best, read.helped) == (16.0, 16.0)


def test_a_gain_within_the_spread_of_seeds_does_not_count_as_help():
    gained = table((1.0, 2.0, 4.0, 4.01, 4.02, 4.03), noise=0.002)
    read = next(r for r in repeats(gained) if len(r.epochs) == 6)
    assert read.helped == 4.0


def test_the_noise_between_seeds_is_pooled_over_cells():
    noise, freedom = seed_noise(table(np.ones(200), noise=0.01, seeds=3))
    assert noise == pytest.approx(0.01, rel=0.1) and freedom >= 2 * 199
    with pytest.raises(UserError, match="another seed"):
        seed_noise(table((1.0, 2.0), seeds=1).iloc[3:])


def test_runs_past_the_lowest_loss_are_left_to_no_law():
    kept = helpful(table((1.0, 2.0, 4.0, 6.0, 5.0, 3.0)))
    assert kept[kept["U"] == 100]["D"].max() == 800
    assert set(FRESH) <= set(kept["D"])
