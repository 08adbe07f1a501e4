"""Mixing laws: known constants are recovered, and an unseen mixture is predicted."""

import numpy as np
import pandas as pd
import pytest

from llm_jax.config import UserError
from llm_jax.scaling import forecast, mixing

TRUTH = {"a": (1.5, 0.8, -3.0), "b": (2.2, 0.4, -5.0)}
SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95)


def runs(shares=SHARES, noise=0.0, seeds=2):
    """What a sweep's table holds; of the held-out tokens three quarters are a's."""
    generator, rows = np.random.default_rng(0), []
    for share in shares:
        for seed in range(seeds):
            row = {"seed": seed, "status": "done", "N": 1e4, "D": 1e6, "C": 6e10}
            for name, own in (("a", share), ("b", 1 - share)):
                c, k, t = TRUTH[name]
                loss = (c + k * np.exp(t * own)) * np.exp(noise * generator.standard_normal())
                row |= {f"share/{name}": own, f"loss/{name}": loss}
            row |= {"held_out_tokens/a": 3000, "held_out_tokens/b": 1000}
            rows.append(row | {"loss": 0.75 * row["loss/a"] + 0.25 * row["loss/b"]})
    return pd.DataFrame(rows)


def test_the_constants_of_both_sources_are_recovered():
    fitted = mixing.fit_mixture(runs(), ["a", "b"], bootstrap=0)
    for name, truth in TRUTH.items():
        found = fitted.fits[name].parameters
        assert [found[key].value for key in "ckt"] == pytest.approx(truth, rel=1e-4)


def test_an_unseen_mixture_is_forecast_within_its_interval_and_source_by_source():
    table = runs(noise=0.003)
    fitted = mixing.fit_mixture(table, ["a", "b"], bootstrap=200)
    unseen = runs(shares=(0.27,), seeds=1).iloc[0]
    seeds = fitted.seed_noise
    assert seeds.freedom == 9 and 0.0012 < seeds.deviation < 0.0036  # chi square of 9 around 0.0024
    made = forecast.make(fitted.at({"a": 0.27, "b": 0.73}), N=1e4, D=1e6, C=6e10, seed_noise=seeds)
    assert made.seed_noise == seeds.deviation
    checked = forecast.check(made, unseen["loss"], table)
    assert checked.covered[0.9] and abs(checked.relative_error) < 0.005
    assert made.extrapolation == 1
    for name, share in (("a", 0.27), ("b", 0.73)):
        number = fitted.one_run(name, share)
        assert number.low < unseen[f"loss/{name}"] < number.high < 1.03 * number.low


def test_the_best_share_is_where_both_slopes_are_equal():
    found = mixing.fit_mixture(runs(), ["a", "b"], bootstrap=0).best_share("a")
    slope = {
        name: k * t * np.exp(t * own)
        for (name, (_, k, t)), own in zip(TRUTH.items(), (found.value, 1 - found.value), strict=True)
    }
    assert slope["a"] == pytest.approx(slope["b"], rel=0.02)


def test_a_best_share_at_the_edge_of_those_trained_is_refused():
    table = runs(shares=(0.05, 0.1, 0.15, 0.2, 0.25))
    with pytest.raises(UserError, match="at the edge"):
        mixing.fit_mixture(table, ["a", "b"], bootstrap=0).best_share("a")


def test_the_true_form_predicts_mixtures_left_out_better_than_another():
    table = runs(shares=SHARES[::2], noise=0.001, seeds=1)
    errors = {form: mixing.left_out(table, ["a", "b"], form) for form in mixing.FORMS}
    assert all(errors["exponential"][name] < 0.01 < errors["power"][name] for name in "ab")


def test_other_than_two_sources_are_refused():
    with pytest.raises(UserError, match="two sources, not 3"):
        mixing.fit_mixture(runs(), ["a", "b", "c"])
