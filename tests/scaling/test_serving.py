"""The cheapest run to a loss: published ratios, brute force, and what can't be reached."""

import numpy as np
import pytest
import scipy.optimize
from known_laws import TRUTH, few_starts, optimum, sweep

from llm_jax.config import UserError
from llm_jax.scaling import laws, serving
from llm_jax.scaling.fits import fit_law

# Hoffmann et al. 2022 as Sardana et al. 2023 take it.
SARDANA = dict(E=1.69, A=406.4, alpha=0.336, B=410.7, beta=0.283)


def loss_of(N, D, E, A, alpha, B, beta):
    return E + A / N**alpha + B / D**beta


@pytest.mark.parametrize(
    ("size", "tokens", "smaller", "more_data", "saved"),
    [(13e9, 2e12, 7e9, 2.16, 0.17), (30e9, 1e13, 13.6e9, 2.84, 0.28)],
)
def test_published_savings_of_serving_come_back(size, tokens, smaller, more_data, saved):
    """Sardana et al. 2023, figure 1 (13B and 2T tokens: 7B, 1.7e22 FLOPs or 17% less) and section 2 (30B and
    10T tokens: 13.6B on 2.84 times the data, 28% less), for the quality of a Chinchilla of that size.
    """
    C = scipy.optimize.brentq(lambda C: optimum(SARDANA, np.array(C)) / size - 1, 1e20, 1e27)
    D = C / 6 / size
    theta = np.array([[p.inner(SARDANA[p.name]) for p in laws.Chinchilla.parameters]])
    (N,), (longer,) = serving.run(laws.Chinchilla(), theta, loss_of(size, D, **SARDANA), tokens, {})
    assert pytest.approx(smaller, rel=0.006) == N and longer / D == pytest.approx(more_data, abs=0.006)
    plain = 6 * size * D + 2 * size * tokens
    less = plain - 6 * N * longer - 2 * N * tokens
    assert less / plain == pytest.approx(saved, abs=0.006)
    if size == 13e9:
        assert less == pytest.approx(1.7e22, rel=0.01)


@pytest.fixture(scope="module")
def fitted():
    return fit_law(sweep(noise=0.003), few_starts(), bootstrap=100)


def test_no_run_of_brute_force_is_cheaper(fitted):
    loss, tokens = 2.2, 3e12
    found = serving.cheapest(fitted, loss, tokens)
    values = {name: e.value for name, e in fitted.parameters.items() if name in TRUTH}
    N = np.geomspace(1e8, 1e12, 200_001)
    left = loss - values["E"] - values["A"] / N ** values["alpha"]
    D = (values["B"] / np.where(left > 0, left, np.nan)) ** (1 / values["beta"])
    total = 6 * N * D + 2 * N * tokens
    best = int(np.nanargmin(total))
    assert found.total.value == pytest.approx(total[best], rel=1e-8) and found.total.value <= total[best]
    assert found.N.value == pytest.approx(N[best], rel=1e-3)
    assert loss_of(found.N.value, found.D.value, **values) == pytest.approx(loss, rel=1e-9)
    assert found.training.value + found.inference.value == pytest.approx(found.total.value)
    assert found.N.low < found.N.value < found.N.high and found.saved.value > 0


def test_without_serving_it_is_the_run_that_is_best_at_its_own_compute(fitted):
    found = serving.cheapest(fitted, 2.2)
    best = fitted.optimum(found.training.value)
    assert found.N.value == pytest.approx(best.N.value, rel=1e-4) and found.saved.value == 0
    assert best.loss.value == pytest.approx(2.2, rel=1e-8)


def test_a_loss_below_the_law_is_refused_and_refits_that_miss_it_open_the_interval(fitted):
    with pytest.raises(UserError, match="no run reaches a loss"):
        serving.cheapest(fitted, 1.5)
    number = fitted.parameters["E"]
    found = serving.cheapest(fitted, number.value + 0.2 * (number.high - number.value))
    assert found.total.high == np.inf and np.isfinite(found.total.low)


def test_laws_that_choose_no_N_and_D_are_refused():
    power = fit_law(sweep()[3::7], "power", bootstrap=0)
    with pytest.raises(UserError, match="has no N and D to choose"):
        serving.cheapest(power, 2.2)
