"""The exponent without embeddings: Pearce and Song's numbers, and the minimum that it is the slope of."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar

from llm_jax.scaling.embeddings import OMEGA_PER_TOKEN, local_exponent, recount

EPOCH = {"A": 482.01, "alpha": 0.3478, "B": 2085.43, "beta": 0.3658}  # Besiroglu et al. 2024, rounded
EXPONENTS = EPOCH["alpha"], EPOCH["beta"]


@pytest.mark.parametrize(("vocabulary", "exponent"), [(256, 0.52), (4096, 0.61), (32768, 0.94)])
def test_a_larger_vocabulary_moves_the_exponent_as_published_at_five_million_parameters(vocabulary, exponent):
    assert round(local_exponent(5e6, OMEGA_PER_TOKEN * vocabulary, *EXPONENTS), 2) == exponent


def test_the_limits_are_chinchillas_exponent_and_that_of_embeddings_alone():
    alpha, beta = EXPONENTS
    assert local_exponent(1e15, 1e4, *EXPONENTS) == pytest.approx(beta / (alpha + beta), rel=1e-4)
    assert local_exponent(1.0, 1e12, *EXPONENTS) == pytest.approx(beta / (alpha / 3 + beta), rel=1e-4)


@pytest.mark.parametrize("power", [1 / 3, 1 / 2])
@pytest.mark.parametrize("omega", [300.0, 3e4])
def test_it_is_the_slope_of_the_sizes_that_minimise_the_loss(power, omega):
    def best(C):
        def loss(log_n):
            N = np.exp(log_n)
            total, D = N + omega * N**power, C / (6 * N)
            return EPOCH["A"] * total ** -EPOCH["alpha"] + EPOCH["B"] * D ** -EPOCH["beta"]

        return minimize_scalar(loss, bounds=(2, 25), method="bounded", options={"xatol": 1e-10}).x

    for C in (1e14, 1e17):
        slope = (best(C * 1.02) - best(C / 1.02)) / (2 * np.log(1.02))
        assert local_exponent(np.exp(best(C)), omega, *EXPONENTS, power) == pytest.approx(slope, rel=2e-3)


def test_where_loss_follows_all_parameters_the_exponent_without_embeddings_moves_as_predicted():
    width, D = (grid.ravel() for grid in np.meshgrid([64, 128, 256, 512, 1024], 4.0 ** np.arange(12, 16)))
    rest, embeddings = 24 * width**2, 8192 * width
    law = {name: EPOCH[name] for name in ("alpha", "beta")}
    loss = 1.8 + EPOCH["A"] * (rest + embeddings) ** -law["alpha"] + EPOCH["B"] * D ** -law["beta"]
    noise = np.exp(1e-2 * np.random.default_rng(0).standard_normal(len(D)))
    counts = {"N_total": rest + embeddings, "N_non_embedding": rest, "N_embedding": embeddings}
    found = recount(pd.DataFrame({**counts, "D": D, "loss": loss * noise}), law, bootstrap=60)
    assert found.given == pytest.approx(law["beta"] / sum(law.values()))
    assert found.predicted_shift > 0.03 and found.agrees
    body = found.body.parameters["a"]
    assert found.shift.high - found.shift.low < 0.9 * (body.high - body.low), "both fits saw the same draws"
