"""The mathematics of batch sizes: known trade-offs and known noise are recovered, the rest is refused."""

import numpy as np
import pandas as pd
import pytest

from llm_jax.config import UserError
from llm_jax.scaling import batches

S_MIN, E_MIN = 50.0, 40_000.0
SIZES = np.array([64, 128, 512, 1024, 4096, 16384.0])


def points(power=1.0, noise=0.0, seeds=3):
    generator = np.random.default_rng(0)
    steps = S_MIN + E_MIN / SIZES**power
    return pd.DataFrame(
        {"B": B, "seed": seed, "steps": s * np.exp(noise * generator.standard_normal())}
        for seed in range(seeds)
        for B, s in zip(SIZES, steps, strict=True)
    )


def test_the_trade_off_is_recovered_from_points_without_noise():
    found = batches.fit_tradeoff(points(), bootstrap=50).parameters
    for name, truth in (("S_min", S_MIN), ("E_min", E_MIN), ("B_crit", E_MIN / S_MIN)):
        assert found[name].value == pytest.approx(truth, rel=1e-6)
    free = batches.fit_tradeoff(points(power=0.8), free=True, bootstrap=0).parameters
    assert free["a"].value == pytest.approx(0.8, rel=1e-6)
    assert free["B_crit"].value == pytest.approx((E_MIN / S_MIN) ** (1 / 0.8), rel=1e-5)


def test_the_interval_of_the_critical_batch_holds_the_truth_under_noise():
    found = batches.fit_tradeoff(points(noise=0.05), bootstrap=300).parameters["B_crit"]
    assert found.low < E_MIN / S_MIN < found.high < 1.5 * found.low


def test_the_critical_batch_costs_twice_the_least_of_steps_and_of_tokens():
    critical = E_MIN / S_MIN
    steps = batches.fit_tradeoff(points(), bootstrap=0).predict(B=critical).value
    assert steps == pytest.approx(2 * S_MIN, rel=1e-6)
    assert steps * critical == pytest.approx(2 * E_MIN, rel=1e-6)


def test_three_batches_are_refused():
    with pytest.raises(UserError, match="needs 4 batch sizes"):
        batches.fit_tradeoff(points().query("B < 1000"))


def test_the_noise_scale_of_a_known_gradient_is_unbiased():
    # |g|^2 over batches of B has the mean |G|^2 + tr(covariance)/B.
    trace, square = batches.noise_scale(8, 512, 4.0 + 96 / 8, 4.0 + 96 / 512)
    assert (trace, square) == (pytest.approx(96), pytest.approx(4))
    generator = np.random.default_rng(1)
    true, deviation = generator.normal(size=20), 3 * generator.random(20)
    measured = []
    for _ in range(400):
        gradients = true + deviation * generator.normal(size=(64, 20))
        small, big = (gradients**2).sum(1).mean(), (gradients.mean(0) ** 2).sum()
        measured.append(batches.noise_scale(1, 64, small, big))
    found = batches.pooled_noise_scale(*zip(*measured, strict=True))
    assert found.low < (deviation**2).sum() / (true**2).sum() < found.high < 1.2 * found.low


def test_a_gradient_lost_in_its_noise_has_no_noise_scale():
    with pytest.raises(UserError, match="isn't told from its noise"):
        batches.pooled_noise_scale([10.0, 12.0], [0.1, -0.2])
    assert batches.pooled_noise_scale([10.0, 12.0, 9.0], [0.1, -0.09, 0.05]).high > 1e6


def test_the_step_to_a_loss_is_exact_where_loss_is_linear_in_the_logarithm():
    steps = np.array([10, 30, 90, 270])
    curve = pd.DataFrame({"step": steps, "loss": 5 - 0.5 * np.log(steps)})
    assert batches.steps_to(curve, 5 - 0.5 * np.log(70)) == pytest.approx(70)
    assert batches.steps_to(curve, 4.0) == 10
    assert batches.steps_to(curve, 1.0) == np.inf


def test_what_a_loss_costs_is_found_from_curves_alone_and_batches_without_a_best_rate_are_left_out():
    rates, curves, steps = 0.01 * 2.0 ** np.arange(4), [], np.arange(10, 4000, 10)
    for B in (*SIZES, 32768.0):
        for rate in rates:
            best = 0.5 if B == 32768 else 0.025
            needed = (S_MIN + E_MIN / B) * np.exp(0.3 * np.log(rate / best) ** 2)
            loss = 3 - 0.4 * np.log(steps / needed)
            curve = pd.DataFrame({"step": steps, "loss": loss, "trace": 700.0, "square": 0.5})
            curve.attrs |= {"B": B, "rate": rate, "seed": 0}
            curves.append(curve)
    found = batches.at_loss(3.0, curves, bootstrap=50)
    assert found.fit.parameters["B_crit"].value == pytest.approx(E_MIN / S_MIN, rel=1e-3)
    assert found.power.value == pytest.approx(1, abs=1e-2)
    assert found.noise.value == pytest.approx(1400)
    assert found.tuning.refused == {32768.0: "the largest rate is the best"}
    assert found.warnings[0] == "B=32768 left out: the largest rate is the best"
    nothing = batches.at_loss(-5.0, curves, bootstrap=50)
    assert nothing.fit is nothing.noise is None and "0 do" in " ".join(nothing.warnings)
