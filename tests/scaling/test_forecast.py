"""Forecasts: written before, unchangeable after, and their intervals cover as often as they say."""

import dataclasses
import json
import pathlib

import known_laws
import numpy as np
import pandas as pd
import pytest
import synthetic_sweep as sweep

from llm_jax import experiment_file
from llm_jax.config import UserError
from llm_jax.scaling import forecast
from llm_jax.scaling.fits import fit
from llm_jax.scaling.isoflop import fit_isoflop
from llm_jax.scaling.tables import SeedNoise

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"


def fitted(table, **options):
    return fit(table[table["role"] == "grid"], sweep.FewStarts(), **({"bootstrap": 120} | options))


@pytest.fixture(scope="module")
def table():
    return sweep.runs()


@pytest.fixture(scope="module")
def law(table):
    return fitted(table)


@pytest.fixture
def made(table, law):
    held = table[table["role"] == "holdout"].iloc[0]
    return forecast.make(law, held["N"], held["D"], held["C"])


def test_intervals_cover_as_often_as_they_say_for_small_sweeps():
    """100 sweeps of 18 runs, 0.3% noise, forecast at 4x; the bounds are about 2.3 binomial sigma."""
    hits = {0.9: 0, 0.95: 0}
    for seed in range(100):
        table = sweep.runs(seed)
        held = table[table["role"] == "holdout"].iloc[0]
        made = forecast.make(fitted(table), held["N"], held["D"])
        for level, covered in forecast.check(made, held["loss"]).covered.items():
            hits[level] += covered
    print(f"coverage of 100: {hits}")
    assert 83 <= hits[0.9] <= 97
    assert 90 <= hits[0.95] <= 100


def test_the_interval_is_wider_than_that_of_the_law_and_grows_with_level_and_seed_noise(table, law, made):
    low, high = made.intervals[0.9]
    alone = law.predict(N=made.N, D=made.D)
    assert low < alone.low < made.loss < alone.high < high
    assert made.intervals[0.95][0] < low and high < made.intervals[0.95][1]
    noisier = forecast.make(law, made.N, made.D, made.C, seed_noise=SeedNoise(0.02, 40))
    assert noisier.intervals[0.9][1] > high and "between seeds" in noisier.method
    told_by_two = forecast.make(law, made.N, made.D, made.C, seed_noise=SeedNoise(0.02, 2))
    assert told_by_two.intervals[0.9][1] - made.loss > 1.3 * (noisier.intervals[0.9][1] - made.loss)
    assert "with 2 degrees of freedom" in told_by_two.method and told_by_two.seed_noise == 0.02
    quiet = forecast.make(law, made.N, made.D, made.C, seed_noise=SeedNoise(1e-5, 2))
    assert quiet.intervals == made.intervals and quiet.seed_noise == 1e-5
    assert forecast.make(law, made.N, made.D, made.C, seed_noise=SeedNoise(0.0, 0)).seed_noise is None
    assert made.extrapolation == pytest.approx(4.0, rel=0.01)


def test_what_was_written_is_read_back(made, tmp_path):
    path = tmp_path / "sweep" / "forecast.json"
    assert forecast.write(made, path, tmp_path / "holdout") == made == forecast.read(path)


def test_tampering_is_detected(made, tmp_path):
    path = tmp_path / "forecast.json"
    forecast.write(made, path, tmp_path / "holdout")
    content = json.loads(path.read_text())
    content["loss"] += 1e-6
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="was changed after it was written"):
        forecast.read(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="is no forecast"):
        forecast.read(path)


@pytest.mark.parametrize("started", ["config.json", "result.json"])
def test_a_forecast_cannot_follow_or_change_after_its_holdout(made, tmp_path, started):
    path, holdout = tmp_path / "forecast.json", tmp_path / "holdout"
    forecast.write(made, path, holdout)
    holdout.mkdir()
    (holdout / started).write_text("{}")
    with pytest.raises(UserError, match=r"has started, so the forecast can't be changed"):
        forecast.write(dataclasses.replace(made, D=made.D * 2), path, holdout)
    assert forecast.read(path) == made
    path.unlink()
    with pytest.raises(UserError, match=r"has started, so the forecast can't be written"):
        forecast.write(made, path, holdout)


def test_the_same_forecast_keeps_its_first_time_stamp(made, tmp_path):
    path, holdout = tmp_path / "forecast.json", tmp_path / "holdout"
    forecast.write(made, path, holdout)
    holdout.mkdir()
    (holdout / "result.json").write_text("{}")
    later = dataclasses.replace(made, written_utc="2100-01-01T00:00:00+00:00")
    assert forecast.write(later, path, holdout).written_utc == made.written_utc


def test_a_check_states_error_and_coverage_and_knows_other_points(table, made):
    low, high = made.intervals[0.9]
    inside = forecast.check(made, (low + high) / 2, table[table["role"] == "grid"])
    assert inside.covered == {0.9: True, 0.95: True}
    outside = forecast.check(made, made.intervals[0.95][1] * 1.01)
    assert outside.covered == {0.9: False, 0.95: False}
    assert outside.error == pytest.approx(outside.measured - made.loss)
    assert made.loss * np.exp(outside.in_noise * made.noise) == pytest.approx(outside.measured)
    changed = table[table["role"] == "grid"].assign(loss=lambda t: t["loss"] * 1.0001)
    with pytest.raises(UserError, match="aren't those of the forecast"):
        forecast.check(made, 2.0, changed)
    with pytest.raises(UserError, match="loss is nan"):
        forecast.check(made, np.nan)


def test_the_hash_of_the_points_knows_neither_their_order_nor_diverged_runs(table):
    grid = table[table["role"] == "grid"]
    diverged = grid.iloc[:1].assign(status="diverged", loss=np.nan, seed=1)
    shuffled = pd.concat([grid.sample(frac=1, random_state=0), diverged])
    assert forecast.hash_points(shuffled) == forecast.hash_points(grid)
    assert forecast.hash_points(grid.iloc[1:]) != forecast.hash_points(grid)


def test_a_fit_without_refits_or_residuals_makes_no_forecast(table):
    with pytest.raises(UserError, match="0 refits and 18 runs"):
        forecast.make(fitted(table, bootstrap=0), 1e6, 1e8)
    with pytest.raises(UserError, match="refits and 5 runs"):
        forecast.make(fitted(table.iloc[:18:4].assign(role="grid")), 1e6, 1e8)


def test_a_law_through_the_minima_forecasts_the_frontier_and_passes_its_back_test(table):
    grid = table[table["role"] == "grid"]
    minima = fit_isoflop(grid, bootstrap=200)
    budget = 4 * grid["C"].max()
    N = sweep.true_optimum(budget)
    made = forecast.make(minima, N, budget / (6 * N), budget)
    # Three budgets tell no asymptote, and a power law without one comes out a little low.
    assert 0.97 < made.loss / sweep.loss(N, budget / (6 * N)) < 1.0
    assert made.intervals[0.95][0] < made.loss < made.intervals[0.95][1]
    assert forecast.backtest(lambda points: fit_isoflop(points, bootstrap=0), grid) < 0.02


def test_four_budgets_tell_the_minimas_asymptote_so_that_a_forecast_far_off_is_right():
    minima, budget = fit_isoflop(known_laws.sweep(), bootstrap=0), 30e22
    N, (E, A, alpha, B, beta) = known_laws.optimum(known_laws.TRUTH, budget), known_laws.TRUTH.values()
    loss = E + A / N**alpha + B / (budget / 6 / N) ** beta
    assert minima.optimum(budget).loss.value == pytest.approx(loss, rel=1e-3)
    few = fit_isoflop(known_laws.sweep(), bootstrap=0, where="C > 5e19")
    assert few.optimum(budget).loss.value < 0.95 * loss


def test_the_back_test_sees_the_smaller_budgets_only_and_a_wrong_law_fails_it(table):
    grid = table[table["role"] == "grid"]
    seen = []

    def right(points):
        seen.append(points["budget_flops"].max())
        return fitted(points, bootstrap=0)

    good = forecast.backtest(right, grid)
    assert seen == [sorted(grid["budget_flops"].unique())[-2]]
    assert good < 0.01
    assert forecast.backtest(lambda points: fitted(points, bootstrap=0, fixed={"E": 2.9}), grid) > 5 * good

    def impossible(points):
        raise UserError("no fit")

    assert forecast.backtest(impossible, grid) == np.inf


def test_the_rollout_forecasts_every_budget_from_the_third_on_by_the_smaller_ones():
    table = sweep.runs()
    grid = table[table["role"] == "grid"]
    rolled = forecast.rollout(lambda points: fitted(points), grid)
    budgets = np.sort(grid["budget_flops"].unique())
    assert [one.fitted_flops for one in rolled] == pytest.approx(list(budgets[1:-1]), rel=0.05)
    last = rolled[-1]
    assert last.measured in set(grid[grid["budget_flops"] == budgets[-1]]["loss"])
    assert abs(last.error) < 0.02 and last.low < last.loss < last.high
    assert forecast.backtest(lambda points: fitted(points), grid) == pytest.approx(abs(last.error))
    assert "inside its 90% interval" in str(last) or "OUTSIDE its 90% interval" in str(last)


def test_the_over_training_forecast_is_told_with_the_noise_between_its_seeds():
    experiment, _ = experiment_file.load_experiment(str(EXPERIMENTS / "overtraining.py"))
    base, rows = experiment.get_config("smoke"), []
    cells = {(cell["width"], cell["D"]): cell for cell in experiment.cells(base, "grid")}
    for run in experiment.sweep(base):
        cell = cells[run.model.width, run.tokens]
        row = {
            "role": run.cell.role,
            "status": "done",
            "N_matmul": cell["N"],
            "D": cell["D"],
            "name": run.name,
        }
        row |= {"flops_6nd_matmul": cell["flops"], "budget_flops": run.cell.budget_flops, "seed": run.seed}
        row |= {"model.width": run.model.width, "model.layers": 1, "optimizer.learning_rate": 0.01}
        rows.append(row | {"loss": (1.7 + 40 / cell["N"] ** 0.3 + 200 / cell["D"] ** 0.3) * 1.01**run.seed})
    (held,) = experiment.holdout(base)
    made = experiment.forecast(base, pd.DataFrame(rows), held)
    assert made.seed_noise == pytest.approx(np.log(1.01) / np.sqrt(2))
    assert made.points == len(cells), "only the grid is fitted"


def test_a_back_test_is_judged_by_the_run_at_the_optimum_and_not_by_the_luckiest():
    grid = sweep.runs(noise=0.0).query("role == 'grid'").copy()
    last = grid["budget_flops"] == grid["budget_flops"].max()
    nearest = np.log(grid.loc[last, "N"] / sweep.true_optimum(grid.loc[last, "C"])).abs().idxmin()
    lucky = next(label for label in grid.index[last] if label != nearest)
    grid.loc[lucky, "loss"] = 0.9 * grid.loc[last, "loss"].min()
    (rolled,) = forecast.rollout(lambda points: fitted(points, bootstrap=0), grid)
    assert rolled.measured == grid.at[nearest, "loss"] and abs(rolled.error) < 1e-4
