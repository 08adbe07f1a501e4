"""What a fit can be asked for: objectives, weights, bounds, ties, variable projection, envelopes,
comparisons.
"""

import json

import numpy as np
import pandas as pd
import pytest
import scipy.optimize
from known_laws import TRUTH, few_starts, sweep

from llm_jax.config import UserError
from llm_jax.experiment_file import load_experiment
from llm_jax.scaling import compare, identified, resampling, sensitivity
from llm_jax.scaling.fits import fit, fit_law
from llm_jax.scaling.objectives import objective

NAMES = ("E", "A", "alpha", "B", "beta")


def values(fitted) -> list[float]:
    return [fitted.parameters[name].value for name in NAMES]


@pytest.mark.parametrize("loss", ["huber:1e-2", "l2", "asymmetric:0.2:1e-2"])
@pytest.mark.parametrize("on", ["log", "raw"])
def test_no_optimiser_of_scipy_finds_a_lower_objective(loss, on):
    points = sweep(noise=0.01).assign(w=np.linspace(1, 3, 35))
    fitted = fit_law(points, few_starts(), loss=loss, on=on, weights="w", bootstrap=0)
    aim, weights = objective(loss, on), points["w"].to_numpy() / points["w"].mean()

    def total(theta):
        made = fitted.law.log_loss(theta[None], fitted.problem.x)[0]
        target = fitted.data.y[0]
        residual = np.exp(made) - np.exp(target) if on == "raw" else made - target
        size = np.abs(residual)
        rho = np.where(size <= aim.delta, residual**2 / 2, aim.delta * (size - min(aim.delta, 1e9) / 2))
        return float((weights * np.where(residual < 0, aim.share, 1.0) * rho).sum())

    assert total(fitted.theta) == pytest.approx(fitted.objective, rel=1e-9)
    for seed in range(2):
        start = fitted.theta * np.random.default_rng(seed).uniform(0.98, 1.02, 5)
        options = dict(xatol=1e-10, fatol=1e-16, maxiter=3000, maxfev=6000)
        end = scipy.optimize.minimize(total, start, method="Nelder-Mead", options=options)
        assert end.fun > fitted.objective * (1 - 1e-9)


def test_an_asymmetric_loss_fits_the_lower_envelope():
    points = sweep(noise=0.01)
    low, plain = (
        fit_law(points, few_starts(), loss=name, bootstrap=0) for name in ("asymmetric:0.05", "huber")
    )
    assert (low.residuals > 0).mean() > 0.7 > (plain.residuals > 0).mean()


def test_variable_projection_ends_where_least_squares_of_the_loss_do():
    points = sweep(noise=0.005)
    projected = fit(points, approach="vp", bootstrap=0)
    direct = fit_law(points, loss="l2", on="raw", bootstrap=0)
    assert values(projected) == pytest.approx(values(direct), rel=1e-6)
    assert projected.agreement > direct.agreement and projected.starts == 81
    assert values(fit(sweep(), approach="vp", bootstrap=0)) == pytest.approx(
        [TRUTH[n] for n in NAMES], rel=1e-6
    )
    known = fit(points, approach="vp", fixed={"E": 1.8}, bootstrap=0)
    alone = fit_law(points, loss="l2", on="raw", fixed={"E": 1.8}, bootstrap=0)
    assert values(known) == pytest.approx(values(alone), rel=1e-6)
    tied = fit(points, "chinchilla-tied", approach="vp", bootstrap=0)
    assert tied.parameters["alpha"].value == tied.parameters["beta"].value
    with pytest.raises(UserError, match="needs a sum of powers"):
        fit(points, "kaplan", approach="vp")


def test_a_term_that_the_points_have_not_gets_no_negative_coefficient():
    points = sweep().assign(loss=lambda f: 5 - 0.1 * np.log(f["N"]))
    found = fit(points, approach="vp", bootstrap=0).parameters
    assert all(found[name].value >= 0 for name in ("E", "A", "B"))


def test_weights_count_as_repeated_runs_do():
    points = sweep(noise=0.01).assign(w=[1, 2, 3, 1, 1] * 7)
    weighted = fit_law(points, few_starts(), weights="w", bootstrap=0)
    repeated = points.loc[points.index.repeat(points["w"])].reset_index(drop=True)
    repeated = fit_law(
        repeated.assign(seed=repeated.groupby(["N", "D"]).cumcount()), few_starts(), bootstrap=0
    )
    assert values(weighted) == pytest.approx(values(repeated), rel=1e-6)
    for text in ("-w", "w - 1", "'a'"):
        with pytest.raises(UserError, match="weights are positive numbers"):
            fit_law(points, few_starts(), weights=text)


def test_bounds_and_ties_are_kept_and_bounds_hit_are_named():
    held = fit_law(sweep(noise=0.003), few_starts(), bounds={"E": (1.0, 1.5)}, bootstrap=0)
    assert held.parameters["E"].value == pytest.approx(1.5) and held.bounds_hit == {"E": "upper"}
    assert any("E is at its upper bound" in warning for warning in held.warnings)
    tied = fit_law(sweep(noise=0.003), few_starts(), tied={"alpha": "beta"}, bootstrap=0)
    assert tied.theta[2] == tied.theta[4] and tied.free == 4
    for options, said in (
        (dict(bounds={"E": (2, 1)}), "is no range"),
        (dict(bounds={"G": (1, 2)}), "no parameter 'G'"),
        (dict(tied={"alpha": "gamma"}), "no parameter 'gamma'"),
        (dict(tied={"alpha": "alpha"}), "is tied itself"),
        (dict(fixed={"E": 1.0}, bounds={"E": (1, 2)}), "E is fixed"),
    ):
        with pytest.raises(UserError, match=said):
            fit_law(sweep(), few_starts(), **options)


def test_rows_of_one_run_are_drawn_together_and_rows_of_one_name_are_not():
    points, run = sweep(noise=0.001), np.arange(35) // 4
    points["loss"] *= np.exp(0.01 * np.random.default_rng(0).normal(size=9))[run]
    together = fit_law(points.assign(run=run), few_starts(), bootstrap=100)
    alone, named = (fit_law(p, few_starts(), bootstrap=100) for p in (points, points.assign(name=run)))
    assert values(named) == values(alone) and named.freedom == 30 and together.freedom == 4
    widths = [f.parameters["a"].high - f.parameters["a"].low for f in (together, alone, named)]
    assert widths[0] > 1.3 * widths[1] == 1.3 * widths[2]
    assert "35 rows are of 9 runs" in together.table() and "rows are of" not in named.table()


def test_percentiles_are_drawn_in_for_five_parameters_alone():
    points, known = sweep(noise=0.003), {"E": TRUTH["E"]}
    assert fit_law(points, few_starts(), bootstrap=0).stretch < 0.9
    assert fit_law(points, few_starts(), fixed=known, bootstrap=0).stretch == 1


def test_what_the_user_holds_is_not_blamed_on_the_points():
    high = fit_law(sweep(noise=0.003), few_starts(), fixed={"E": 5.0}, bootstrap=0)
    assert any(text.startswith("E=5 is fixed above the lowest loss, 2.139") for text in high.warnings)
    held = fit_law(sweep(noise=0.003), few_starts(), bounds={"E": (0.5, 1.5)}, bootstrap=0)
    assert "E is at its upper bound; as --bounds holds it" in held.warnings


def test_a_bad_run_widens_no_prediction_of_a_good_one():
    points = sweep(noise=0.003)
    points.loc[17, "loss"] *= 1.5
    fitted = fit_law(points, few_starts(), bootstrap=0)
    assert fitted.noise == pytest.approx(0.003, rel=0.4) and fitted.freedom == 29


def test_what_the_runs_hardly_tell_is_said_of_the_optimum_asked_for():
    known = identified.of_optimum(fit_law(sweep(noise=0.003), few_starts(), bootstrap=0), 1e24)
    assert known.exponent < 0.03 and known.factor < 1.3 and not known.doubt
    near = sweep(noise=0.01, budgets=(1e20, 2e20), sizes=5, span=1.5)
    hardly = fit_law(near, few_starts(), bootstrap=0)
    assert any("hardly tell the optimum" in text for text in hardly.warnings)


def test_the_exponents_predicted_error_is_that_of_many_fits():
    found = [fit_law(sweep(noise=0.003, seed=s), few_starts(), loss="l2", bootstrap=0) for s in range(60)]
    spread = 1.645 * np.std([f.parameters["a"].value for f in found])
    known = np.median([identified.of_optimum(f, 1e24).exponent for f in found])
    assert known == pytest.approx(spread, rel=0.25)


def test_seeds_that_repeat_tell_their_noise():
    seeds = [sweep(noise=0.01, seed=s).assign(seed=s) for s in range(3)]
    fitted = fit_law(pd.concat(seeds, ignore_index=True), few_starts(), bootstrap=0)
    noise, freedom = fitted.seed_noise
    assert noise == pytest.approx(0.01, rel=0.2) and freedom == 70
    assert "between seeds" in fitted.table() and fitted.to_json()["seed_noise"] == noise


def test_a_prediction_of_one_run_is_wider_than_that_of_the_law():
    fitted = fit_law(sweep(noise=0.01), few_starts(), bootstrap=200)
    law, run = fitted.predict(N=1e10, D=1e11), fitted.one_run(N=1e10, D=1e11)
    assert run.low < law.low < law.value == run.value < law.high < run.high


def test_the_sensitivity_table_names_every_change_and_its_numbers():
    points = sweep(noise=0.003).assign(N_total=lambda f: f["N"] * 1.3 + 1e7)
    fitted = fit_law(points, few_starts(), bootstrap=0)
    content = json.loads(json.dumps(sensitivity.facts(fitted)))
    changes = [row["change"] for row in content["sensitivity"]]
    assert changes[0] == "as fitted" and "loss lad" in changes and "N counted as N_total" in changes
    assert sum(change.startswith("without C=") for change in changes) == 5
    assert (
        content["leave_largest_out"]["C"] == pytest.approx(1e22) and content["leave_largest_out"]["runs"] == 7
    )
    lad = fit_law(points, few_starts(), loss="lad", bootstrap=0)
    row = content["sensitivity"][changes.index("loss lad")]["values"]
    assert [row[name] for name in NAMES] == pytest.approx(values(lad), rel=1e-6)
    without = fit_law(points[points["C"] < 1e22], few_starts(), bootstrap=0)
    largest = points[points["C"] > 5e21]
    missed = np.log(largest["loss"] / without.predict(N=largest["N"], D=largest["D"]).value)
    assert content["leave_largest_out"]["rms"] == pytest.approx(np.sqrt((missed**2).mean()), rel=1e-6)
    assert "predicted by the others" in sensitivity.table(content)


def test_the_right_law_wins_the_comparison():
    rows = compare.compare(sweep(noise=0.003), ["kaplan", "chinchilla"], bootstrap=0)
    assert rows[0].law == "chinchilla" and rows[0].aicc < rows[1].aicc - 50
    assert rows[0].largest < rows[1].largest and "kaplan" in compare.compared_table(rows)
    with pytest.raises(UserError, match="two laws or more"):
        compare.compare(sweep(), ["chinchilla"])
    with pytest.raises(UserError, match="laws of N and of loss can't be held against each other"):
        compare.compare(sweep(), ["chinchilla", "n-opt"])
    with pytest.raises(UserError, match="keep the best at each"):
        compare.compare(sweep(), ["chinchilla", "power"])


@pytest.mark.parametrize("law", [few_starts(), "power"])
def test_a_recipe_that_saves_compute_shows_its_multiplier(law):
    saved = 1.5
    if law == "power":
        C = np.geomspace(1e15, 1e20, 9)
        first = pd.DataFrame({"C": C, "loss": 1.7 + 300 * C**-0.15})
        second = pd.DataFrame({"C": C, "loss": 1.7 + 300 * (saved * C) ** -0.15})
    else:
        better = dict(
            TRUTH, A=TRUTH["A"] * saved ** (-TRUTH["alpha"] / 2), B=TRUTH["B"] * saved ** (-TRUTH["beta"] / 2)
        )
        first, second = sweep(noise=0.002), sweep(better, noise=0.002, seed=5)
    table = pd.concat([first.assign(rule="adam"), second.assign(rule="muon")], ignore_index=True)
    fitted, text = compare.multiplier(table, law, "rule", bootstrap=100)
    number = fitted.parameters["multiplier"]
    assert number.value == pytest.approx(saved, rel=0.02) and "rule=muon reaches with C" in text
    if law != "power":
        assert number.low < saved < number.high
    with pytest.raises(UserError, match="names 1 recipes"):
        compare.multiplier(table[table["rule"] == "adam"], law, "rule")


def test_the_report_of_optimizers_draws_the_curves_that_it_multiplies():
    C = np.geomspace(1e15, 1e20, 6)
    rows = [(c, 1.7 + 300 * (s * c) ** -0.15, kind) for kind, s in (("adamw", 1), ("muon", 1.5)) for c in C]
    points = pd.DataFrame(rows, columns=["C", "loss", "optimizer"])
    optimizers, _ = load_experiment("experiments/optimizers.py")
    fitted, _ = optimizers.multiplier_of(points, "adamw", "muon", bootstrap=100)
    first, second = (compare.best_loss(fitted, C, second).value for second in (False, True))
    assert first == pytest.approx(points["loss"][:6], rel=1e-4)
    assert second == pytest.approx(points["loss"][6:], rel=1e-4)
    assert optimizers.by_compute(points, {"muon": fitted}).axes[0].lines


def test_runs_without_common_budgets_are_left_out_by_fifths_or_tenths(chinchilla_points):
    fitted = fit_law(chinchilla_points, few_starts(), where="excluded_by_epoch == 0", bootstrap=0)
    left = [v.runs for v in sensitivity.variants(fitted) if v.change.startswith("without C=")]
    assert left == [216] * 10


def curves(sizes: int = 30) -> pd.DataFrame:
    """Training curves under the known law."""
    parts = []
    for number, N in enumerate(np.geomspace(1e7, 1e10, sizes)):
        D = np.geomspace(1e8, 2e12, 60)
        loss = TRUTH["E"] + TRUTH["A"] / N ** TRUTH["alpha"] + TRUTH["B"] / D ** TRUTH["beta"]
        parts.append(pd.DataFrame(dict(run=f"run{number}", N=N, D=D, loss=loss)))
    return pd.concat(parts, ignore_index=True)


def test_the_envelope_of_training_curves_has_the_exponent_of_the_law():
    fitted = fit(curves(), approach=1)
    exact = TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"])
    assert fitted.parameters["a"].value == pytest.approx(exact, abs=0.01)
    assert fitted.parameters["a"].value + fitted.parameters["b"].value == pytest.approx(1, abs=1e-6)
    smallest, largest = 1e7, 1e10
    assert fitted.frontier["N"].between(smallest * 1.01, largest * 0.99).all()  # edge minima are left out
    content = json.loads(json.dumps(fitted.to_json()))
    assert content["approach"] == 1 and content["parameters"]["a"]["low"] is None
    assert "Approach 1" in fitted.table() and "std. error" not in fitted.table()
    with pytest.raises(UserError, match="a column run"):
        fit(curves().drop(columns="run"), approach=1)
    with pytest.raises(UserError, match="3 training curves or more"):
        fit(curves(2), approach=1)


def test_runs_of_small_weight_add_no_noise():
    points = sweep(noise=0.003).assign(weight=1.0)
    points.loc[:4, "loss"] *= 1.2
    points.loc[:4, "weight"] = 1e-6
    weighted = fit(points, few_starts(), weights="weight", bootstrap=100)
    assert weighted.noise == pytest.approx(0.003, rel=0.5)
    aim = {"N": 1e9, "D": 2e10}
    law, run = weighted.predict(**aim), weighted.one_run(**aim)
    assert run.high - run.low < 0.05 * law.value


def test_runs_on_a_ladder_of_one_ratio_are_told_of():
    rungs = sweep(noise=0.003).drop(columns="C")
    ladder = rungs.assign(D=20 * rungs["N"] * np.exp(0.1 * np.random.default_rng(0).normal(size=len(rungs))))
    ladder["loss"] = [
        TRUTH["E"] + TRUTH["A"] / N ** TRUTH["alpha"] + TRUTH["B"] / D ** TRUTH["beta"]
        for N, D in zip(ladder["N"], ladder["D"], strict=True)
    ]
    told = [text for text in fit(ladder, few_starts(), bootstrap=0).warnings if "power of N" in text]
    assert len(told) == 1 and "which of the two lowers the loss" in told[0]
    assert not any("power of N" in text for text in fit(rungs, few_starts(), bootstrap=0).warnings)


def test_the_larger_law_has_the_smaller_residuals_that_its_aicc_is_of():
    for seed in range(5):
        points = sweep(noise=0.01, seed=seed)
        rows = {
            row.law: row for row in compare.compare(points, ["chinchilla", "chinchilla-tied"], bootstrap=0)
        }
        # One parameter more costs at most this; the likelihood can't fall.
        assert rows["chinchilla"].aicc < rows["chinchilla-tied"].aicc + 3.2


def test_the_largest_budget_is_itself_or_none():
    points = sweep(noise=0.003)
    few = pd.concat(
        [points[points["C"] < points["C"].quantile(0.1)], points[points["C"] > points["C"].quantile(0.5)]]
    )
    found = fit(few, few_starts(), bootstrap=0)
    tests = sensitivity.held_out(found)
    largest = sensitivity.largest(found, tests)
    assert largest is None or max(test.C for test in tests) == largest.C
    assert sensitivity.largest(found, tests[:-1]) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bounds": {"alpha": (-1.0, -0.5)}}, "--bounds: alpha is at least"),
        ({"fixed": {"alpha": 1e9}}, r"--fix=alpha=1e\+09: it lies between"),
    ],
)
def test_values_that_no_law_has_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        fit(sweep(), few_starts(), bootstrap=0, **options)


def test_an_optimum_is_not_asked_for_at_what_the_law_knows_not():
    found = fit(sweep(), few_starts(), bootstrap=0)
    with pytest.raises(UserError, match="it knows no U beside"):
        found.optimum(1e21, U=1e9)


def test_runs_without_a_name_are_each_by_themselves():
    points = sweep(noise=0.003).assign(name=[f"run{n}" for n in range(len(sweep()))])
    points.loc[:2, "name"] = None
    assert len(set(fit(points, few_starts(), bootstrap=0).points.clusters)) == len(points)


def test_a_large_table_tells_how_far_its_fit_is_and_blocks_of_refits_are_those_of_one(monkeypatch):
    table, said = pd.concat([sweep(noise=0.003, seed=seed) for seed in range(100)], ignore_index=True), []
    table = table.assign(seed=np.arange(len(table)))
    whole = fit_law(table, few_starts(), bootstrap=6, say=said.append)
    assert not said, "all weights are held at once, and starts are few"
    monkeypatch.setattr(resampling, "_WEIGHTS", 2 * len(table))
    parted = fit_law(table, few_starts(), bootstrap=6, say=said.append)
    assert said == ["2 of 6 refits", "4 of 6 refits", "6 of 6 refits"]
    assert parted.draws == pytest.approx(whole.draws, rel=1e-9)
