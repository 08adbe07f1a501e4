"""Approach 3: published numbers, known constants, intervals, and what a fit says about itself."""

import dataclasses
import json
import time

import numpy as np
import pandas as pd
import pytest
import scipy.optimize
from known_laws import TRUTH, few_starts, sweep

from llm_jax.config import UserError
from llm_jax.scaling import fits, solver
from llm_jax.scaling.fits import fit_law
from llm_jax.scaling.laws import PowerLaw, TiedChinchilla
from llm_jax.scaling.results import gap, told

NAMES = ("A", "B", "E", "alpha", "beta")
# SOURCE.md beside the points; the published parameters are those of the least absolute deviation.
PUBLISHED = {
    "huber:1e-3": (477.82590, 2143.4173, 1.8172181, 0.34731050, 0.36717243, 0.00101827401780),
    "lad": (482.00598, 2085.4358, 1.8168641, 0.34781306, 0.36585415, 1.129494535),
    "huber:1e-4": (478.68871, 2065.4130, 1.8158236, 0.34740885, 0.36538474, 0.000111778748),
    "huber:1e-2": (538.75188, 2905.6000, 1.8380786, 0.35441550, 0.38153752, 0.00469622488),
    "l2": (593.32210, 4875.6378, 1.8645501, 0.36025280, 0.40588336, 0.00573094350),
}


def values(fit) -> list[float]:
    return [fit.parameters[name].value for name in NAMES]


@pytest.mark.parametrize("loss", PUBLISHED)
def test_the_chinchilla_points_give_the_published_optimum(chinchilla_points, loss):
    fit = fit_law(chinchilla_points, few_starts(), loss=loss, where="excluded_by_epoch == 0", bootstrap=0)
    assert [*values(fit), fit.objective] == pytest.approx(PUBLISHED[loss], rel=2e-7)


def test_the_five_worst_runs_move_the_exponent_of_the_data(chinchilla_points):
    fit = fit_law(chinchilla_points, few_starts(), bootstrap=0)
    assert values(fit) == pytest.approx((495.72601, 12845.613, 1.8913385, 0.34931289, 0.45304930), rel=1e-6)
    assert fit.objective == pytest.approx(0.00182601052307, rel=1e-9)


def test_the_full_grid_agrees_with_few_starts_and_says_how_many_arrive(chinchilla_points):
    fit = fit_law(chinchilla_points, "chinchilla", where="excluded_by_epoch == 0", bootstrap=0)
    assert values(fit) == pytest.approx(PUBLISHED["huber:1e-3"][:5], rel=1e-6)
    assert fit.starts == 4500 and 0.25 < fit.agreement < 0.9
    assert [warning[:23] for warning in fit.warnings] == ["more than 2.9% from the"]  # three runs


def test_lbfgs_finds_nothing_lower(chinchilla_points):
    """scipy's L-BFGS-B on the same sum, from the optimum and from around it."""
    points = chinchilla_points[chinchilla_points.excluded_by_epoch == 0]
    fit = fit_law(points, few_starts(), bootstrap=0)
    x = {name: np.log(points[name].to_numpy()) for name in ("N", "D")}
    y = np.log(points["loss"].to_numpy())

    def objective(theta):
        fitted, jacobian = fit.law.with_jacobian(theta[None], x)
        residual = fitted[0] - y
        size, slope = np.abs(residual), np.clip(residual, -1e-3, 1e-3)
        huber = np.where(size <= 1e-3, residual**2 / 2, 1e-3 * (size - 5e-4))
        return 1e3 * huber.sum(), 1e3 * jacobian[0] @ slope

    assert objective(fit.theta)[0] / 1e3 == pytest.approx(fit.objective, rel=1e-12)
    assert np.abs(objective(fit.theta)[1]).max() < 1e-6
    for seed in range(3):
        start = fit.theta * np.random.default_rng(seed).uniform(0.95, 1.05, 5)
        end = scipy.optimize.minimize(
            objective, start, jac=True, method="L-BFGS-B", options=dict(ftol=0, gtol=1e-10)
        )
        assert end.fun / 1e3 > fit.objective * (1 - 1e-9)


def test_bootstrap_errors_are_the_published_ones_and_4000_refits_take_seconds(chinchilla_points):
    start = time.process_time()
    fit = fit_law(chinchilla_points, few_starts(), where="excluded_by_epoch == 0", bootstrap=4000, level=0.95)
    assert time.process_time() - start < 60
    found = fit.parameters
    errors = {name: e.standard_error for name, e in found.items()}
    assert errors["E"] == pytest.approx(0.02566, rel=0.08)
    assert errors["alpha"] == pytest.approx(0.01540, rel=0.08)
    assert errors["beta"] == pytest.approx(0.02060, rel=0.08)
    assert errors["a"] == pytest.approx(0.020, rel=0.08)
    assert errors["A"] == pytest.approx(124.5, rel=0.1)
    assert errors["B"] == pytest.approx(1293.3, rel=0.15)  # of so skewed a spread few draws are half
    logs = fit.draws.std(0)  # ln E, ln A, alpha, ln B, beta
    assert logs[[0, 1, 3]] == pytest.approx((0.014, 0.258, 0.421), rel=0.08)
    ends = {
        "E": (1.769, 1.871),
        "alpha": (0.317, 0.373),
        "beta": (0.331, 0.415),
        "A": (285, 744),
        "B": (1042, 5810),
    }
    for name, published in ends.items():
        close = 0.006 if published[1] < 2 else 0.08 * published[1]
        assert (found[name].low, found[name].high) == pytest.approx(published, abs=close), name
    width = np.ptp(np.quantile(fit.values(fit.draws)["a"], [0.1, 0.9]))
    assert width == pytest.approx(0.051, abs=0.004)


@pytest.mark.parametrize(
    "constants",
    [
        (406.4, 410.7, 1.69, 0.34, 0.28),
        (482.01, 2085.43, 1.8172, 0.3478, 0.3658),
        (2000.0, 60.0, 0.5, 0.465, 0.155),
    ],
)
@pytest.mark.parametrize("loss", ["huber:1e-3", "lad", "l2"])
def test_noise_free_points_give_the_constants_back(constants, loss):
    points = sweep(dict(zip(NAMES, constants, strict=True)))
    assert values(fit_law(points, few_starts(), loss=loss, bootstrap=0)) == pytest.approx(constants, rel=1e-6)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    covered = []
    for seed in range(40):
        fit = fit_law(sweep(noise=0.003, seed=seed), few_starts(), bootstrap=200, level=0.9, seed=seed)
        truth = dict(TRUTH, a=TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"]))
        covered.append(
            [fit.parameters[n].low <= truth[n] <= fit.parameters[n].high for n in ("a", "E", "alpha")]
        )
    assert (np.mean(covered, axis=0) >= 0.78).all()
    assert np.mean(covered) < 0.995


def test_predictions_and_optima_carry_intervals_around_the_truth():
    fit = fit_law(sweep(noise=0.003), few_starts(), bootstrap=300)
    N, D = np.array([1e10, 1e11]), np.array([1e11, 1e12])
    truth = TRUTH["E"] + TRUTH["A"] / N ** TRUTH["alpha"] + TRUTH["B"] / D ** TRUTH["beta"]
    predicted = fit.predict(N=N, D=D)
    assert (predicted.low < truth).all() and (truth < predicted.high).all()
    single = fit.predict(N=1e10, D=1e11)
    assert single.value == predicted.value[0] and isinstance(single.low, float)
    optimum = fit.optimum(1e23)
    assert 6 * optimum.N.value * optimum.D.value == pytest.approx(1e23)
    assert optimum.loss.value == pytest.approx(fit.predict(N=optimum.N.value, D=optimum.D.value).value)
    assert optimum.N.low < optimum.N.value < optimum.N.high
    with pytest.raises(UserError, match="predicted at N, D; got N"):
        fit.predict(N=1e9)


def test_the_draws_of_a_prediction_have_its_interval_as_percentiles():
    fit = fit_law(sweep(noise=0.01, sizes=4), few_starts(), bootstrap=100)
    assert fit.stretch < 0.95  # so that draws taken as they are would have another
    at = {"N": np.array([1e9, 3e9]), "D": np.array([2e10, 6e10])}
    best, draws = fit.logs({name: np.log(value) for name, value in at.items()})
    expected = fit.predict(**at)
    assert np.exp(best) == pytest.approx(expected.value)
    assert np.exp(np.quantile(draws, 0.05, axis=0)) == pytest.approx(expected.low, rel=1e-4)
    assert np.exp(np.quantile(draws, 0.95, axis=0)) == pytest.approx(expected.high, rel=1e-4)


def test_tied_exponents_stay_equal_and_fixed_parameters_stay():
    tied = fit_law(sweep(noise=0.003), few_starts(TiedChinchilla), bootstrap=20)
    assert tied.theta[2] == tied.theta[4] and (tied.draws[:, 2] == tied.draws[:, 4]).all()
    fixed = fit_law(sweep(), few_starts(), fixed={"E": TRUTH["E"], "alpha": TRUTH["alpha"]}, bootstrap=20)
    assert values(fixed) == pytest.approx([TRUTH[n] for n in NAMES], rel=1e-6)
    assert (fixed.draws[:, 2] == TRUTH["alpha"]).all() and fixed.free == 3
    with pytest.raises(UserError, match="tied to alpha"):
        fit_law(sweep(), few_starts(TiedChinchilla), fixed={"beta": 0.3})
    with pytest.raises(UserError, match="no parameter 'gamma'"):
        fit_law(sweep(), few_starts(), fixed={"gamma": 0.3})


@pytest.mark.parametrize("asymptote, fixed", [(1.7, {}), (1.7, {"E": 1.7}), (0.0, {"E": 0.0})])
def test_power_laws_with_free_fixed_and_zero_asymptote(asymptote, fixed):
    C = np.geomspace(1e15, 1e20, 7)
    points = pd.DataFrame({"C": C, "loss": asymptote + 300 * C**-0.15})
    found = fit_law(points, few_starts(PowerLaw), fixed=fixed, bootstrap=0).parameters
    assert found["A"].value == pytest.approx(300, rel=1e-6) and found["a"].value == pytest.approx(
        0.15, rel=1e-6
    )
    assert found["E"].value == pytest.approx(asymptote, rel=1e-6)


def test_a_zero_asymptote_on_points_that_have_one_is_worse():
    C = np.geomspace(1e15, 1e20, 7)
    points = pd.DataFrame({"C": C, "loss": 1.7 + 300 * C**-0.15})
    free, zero = (fit_law(points, few_starts(PowerLaw), fixed=f, bootstrap=0) for f in ({}, {"E": 0.0}))
    assert zero.objective > 1e6 * free.objective


def test_as_many_points_as_parameters_is_flagged_and_fewer_refused():
    points = sweep(noise=0.003).iloc[[0, 8, 16, 24, 32]]
    fit = fit_law(points, few_starts(), bootstrap=0)
    assert any("under-identified: 5 points for 5 parameters" in warning for warning in fit.warnings)
    with pytest.raises(UserError, match="too few points: 4 for the 5"):
        fit_law(points.iloc[:4], few_starts())
    with pytest.raises(UserError, match="too few points: 3 for the 5"):
        fit_law(points.iloc[:3], "chinchilla")


def test_a_term_that_the_points_do_not_show_is_flagged():
    points = sweep(noise=0.001)
    points["loss"] = (1.8 + 482 / points["N"] ** 0.35) * points["loss"] / sweep()["loss"]  # D plays no part
    fit = fit_law(points, few_starts(), bootstrap=50)
    text = " ".join(fit.warnings)
    assert "bound" in text or "flat valley" in text


def test_the_same_seed_draws_the_same_intervals():
    first, again = (fit_law(sweep(noise=0.003), few_starts(), bootstrap=50, seed=7) for _ in range(2))
    other = fit_law(sweep(noise=0.003), few_starts(), bootstrap=50, seed=8)
    assert (first.draws == again.draws).all() and (first.draws != other.draws).any()


def test_the_json_holds_the_conventions_and_every_number():
    points = sweep(noise=0.003).assign(status="done")
    points.loc[[4, 9], "status"] = "diverged"
    points.loc[4, "loss"] = np.nan
    fit = fit_law(points, few_starts(), bootstrap=0, counting="without embeddings", where="N > 0")
    text = json.dumps(fit.to_json(), allow_nan=False)
    content = json.loads(text)
    assert content["conventions"]["N"] == "without embeddings" and content["conventions"]["delta"] == 1e-3
    assert content["parameters"]["alpha"]["value"] == pytest.approx(fit.parameters["alpha"].value)
    assert content["parameters"]["alpha"]["low"] is None  # nothing was resampled
    assert [run["reason"] for run in content["excluded"]] == ["status diverged"] * 2
    assert content["points"] == 33 and "left out: row 4 (status diverged)" in fit.table()


def test_a_loss_that_is_no_loss_is_refused():
    for text, said in (("huber:0", "positive"), ("huber:x", "positive"), ("hubr", "did you mean")):
        with pytest.raises(UserError, match=said):
            fit_law(sweep(), few_starts(), loss=text)


def test_refits_that_do_not_converge_are_counted_and_left_out(monkeypatch):
    points = sweep(noise=0.003)
    monkeypatch.setattr(fits.solver, "resume", lambda problem, ends, weights, which: ends)
    minimise = solver.minimise

    def stubborn(*arguments, **options):
        ends = minimise(*arguments, **options)
        return ends._replace(converged=ends.converged & (np.arange(len(ends.converged)) % 10 != 9))

    monkeypatch.setattr(fits.solver, "minimise", stubborn)
    fit = fit_law(points, few_starts(), bootstrap=50)
    assert len(fit.draws) == 45 and "5 of 50 refits did not converge and are left out" in fit.warnings


@pytest.fixture(scope="module")
def slow_valley():
    """Losses that fall for ever: E sinks towards 0, and every step moves it by a little."""
    N = np.geomspace(1e3, 1e5, 4).repeat(4)
    D = np.tile(np.geomspace(1e5, 1e7, 4), 4)
    scatter = np.random.default_rng(1).normal(size=16)
    return pd.DataFrame(dict(N=N, D=D, loss=(4 / N**0.08 + 30 / D**0.4) * np.exp(0.01 * scatter)))


def test_a_slow_valley_is_followed_to_its_end(slow_valley):
    fit = fit_law(slow_valley, bootstrap=50)
    assert not any("converge" in warning for warning in fit.warnings)


def test_bent_steps_end_as_low_as_straight_ones_after_a_fraction_of_their_number(slow_valley, monkeypatch):
    resumed, resume = [], solver.resume
    monkeypatch.setattr(
        fits.solver, "resume", lambda *arguments: resumed.append(arguments) or resume(*arguments)
    )
    fit_law(slow_valley, few_starts(), bootstrap=200)
    problem, ends, data, slow = max(resumed, key=lambda arguments: arguments[3].sum())
    calls, evaluate = [], type(problem).evaluate
    monkeypatch.setattr(type(problem), "evaluate", lambda *arguments: calls.append(1) or evaluate(*arguments))
    bent = resume(problem, ends, data, slow)
    count = len(calls)
    straight = solver.minimise(problem, ends.free[slow], data.of(slow), steps=20_000)
    assert slow.sum() >= 10 and bent.converged[slow].all()
    assert 3 * count < len(calls) - count
    assert np.median(bent.objective[slow] / straight.objective) < 1 + 1e-6
    assert bent.objective[slow].sum() < 1.001 * straight.objective.sum()


def test_thousands_of_runs_are_fitted_in_seconds():
    generator = np.random.default_rng(0)
    N = np.exp(generator.uniform(16, 23, 6000))
    points = pd.DataFrame({"N": N, "D": N * np.exp(generator.uniform(1, 6, 6000))})
    made = TRUTH["E"] + TRUTH["A"] / N ** TRUTH["alpha"] + TRUTH["B"] / points["D"] ** TRUTH["beta"]
    known = {"alpha": TRUTH["alpha"], "beta": TRUTH["beta"]}
    start = time.process_time()
    fit = fit_law(points.assign(loss=made), fixed=known, bootstrap=0)
    assert values(fit) == pytest.approx([TRUTH[name] for name in NAMES], rel=1e-6) and fit.starts == 180
    assert time.process_time() - start < 10


def test_all_parameters_fixed_leaves_nothing_to_fit():
    with pytest.raises(UserError, match="nothing is left to fit"):
        fit_law(sweep(), few_starts(), fixed=TRUTH)


def test_a_result_is_frozen():
    fit = fit_law(sweep(), few_starts(), bootstrap=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        fit.objective = 0.0


def test_losses_that_follow_no_law_are_flagged_and_break_nothing():
    points = sweep(sizes=3).assign(loss=np.random.default_rng(0).uniform(2, 3, 15))
    fit = fit_law(points, few_starts(), bootstrap=100)
    assert any("don't determine" in warning for warning in fit.warnings)
    json.dumps(fit.to_json(), allow_nan=False)
    optimum = fit.optimum(1e23)
    assert 1 <= optimum.N.low <= optimum.N.high <= 1e23 and np.isfinite(optimum.loss.high)


def test_a_difference_of_two_fits_of_the_same_cells_is_told_where_their_intervals_overlap():
    steeper = TRUTH | {"beta": TRUTH["beta"] + 0.02}  # a rises by 0.0137
    tables = [sweep(truth, noise=0.01) for truth in (TRUTH, steeper)]
    one, other = (fit_law(table, few_starts(), bootstrap=60) for table in tables)
    first, second = (fitted.parameters["a"] for fitted in (one, other))
    assert first.high > second.low, "apart, the two can't be told from each other"
    found = gap(one, other, lambda fitted, theta: fitted.values(theta)["a"])
    assert 0 < found.low < 0.0137 < found.high and told(found, "+.3f").endswith("more than chance")
    again = fit_law(sweep(noise=0.01, seed=1), few_starts(), bootstrap=60)
    alone = gap(one, again, lambda fitted, theta: fitted.values(theta)["a"])
    assert alone.low < 0 < alone.high and told(alone, "+.3f").endswith("not told apart")
    assert alone.high - alone.low > 1.2 * (first.high - first.low), "two sources of noise"
