"""Plans: what they contain, what they refuse, what they cost, and that the proposed design is the better
one.
"""

import time

import numpy as np
import pandas as pd
import pytest
from known_laws import TRUTH, few_starts
from test_grids import BUDGETS, ladder

from llm_jax.config import UserError
from llm_jax.kernels import devices
from llm_jax.scaling import grids, plan
from llm_jax.scaling.fits import fit_law

LAW = few_starts()
THETA = np.array([p.inner(TRUTH[p.name]) for p in LAW.parameters])
TARGET = plan.Target(N=5e8, D=1e10)


def test_a_ladder_has_every_size_at_every_multiple_of_its_optimum():
    cells = plan.ladder(ladder(), (0.5, 1, 4), grids.Limits(minimum_steps=1)).cells
    assert len(cells) == 36 and cells["name"].is_unique
    ratio = (cells["D"] / cells["N"]).to_numpy().reshape(12, 3)
    assert ratio == pytest.approx(np.tile([10, 20, 80], (12, 1)), rel=0.01)
    with pytest.raises(UserError, match="needs positive ones"):
        plan.ladder(ladder(), ())


def test_cells_beyond_the_limits_are_left_out_and_named_unless_repeating_is_asked_for():
    limits = grids.Limits(available_tokens=10_000_000, minimum_steps=200)
    grid = plan.ladder(ladder(), (1, 4), limits)
    assert grid.cells["D"].max() <= 10_000_000 and grid.cells["steps"].min() >= 200
    assert any("more than one epoch of 10,000,000" in note for note in grid.notes)
    repeated = plan.ladder(ladder(), (1, 4), grids.Limits(10_000_000, 200, repeat=True))
    assert len(repeated.cells) > len(grid.cells) and repeated.cells["D"].max() > 10_000_000
    with pytest.raises(UserError, match="no cell keeps within the limits"):
        plan.ladder(ladder(), (1,), grids.Limits(available_tokens=1000))


def test_a_token_sweep_stays_at_one_size_and_seeds_repeat_cells():
    grid = plan.token_sweep(ladder(), 1.1e6, (1e7, 1e8, 1e9))
    assert grid.cells["N"].nunique() == 1 and list(grid.cells["D"]) == pytest.approx(
        [1e7, 1e8, 1e9], rel=1e-3
    )
    seeded = plan.with_seeds(grid, 3)
    assert len(seeded.cells) == 9 and seeded.cells["name"].is_unique
    assert seeded.flops == pytest.approx(3 * grid.flops)
    assert len(plan.with_seeds(grid, 2, every=0.3).cells) == 4


def test_the_price_is_flops_hours_and_money():
    grid = grids.isoflop(ladder(), BUDGETS, grids.ratio_optimum(ladder()))
    own = plan.price(grid, "mine", plan.Rate(peak=1e12, money_per_hour=3.6, utilisation=0.5, currency="EUR"))
    assert own.flops == grid.flops and own.device_hours == pytest.approx(grid.flops / 5e11 / 3600)
    assert own.money == pytest.approx(3.6 * own.device_hours) and "EUR" in str(own)
    assert plan.price(grid, "H100").device_hours < plan.price(grid, "A100").device_hours
    with pytest.raises(UserError, match="did you mean 'H100'"):
        plan.price(grid, "H10")
    peaks = {row.bfloat16 for row in devices.DEVICES}
    assert all(rate.peak in peaks for rate in plan.RATES.values())


def designs():
    """Many sizes; the proposal and isoFLOP grids of the same cost."""
    candidates = pd.DataFrame({"N": np.geomspace(1e6, 1e9, 30).astype(int)})
    candidates = candidates.assign(flops_per_token=6.0 * candidates["N"], tokens_per_step=4096)
    proposed = plan.propose(candidates, 1e19, LAW, THETA, TARGET, grids.Limits(minimum_steps=10))
    others = []
    for top in (3e17, 6e17, 9e17):
        budgets = np.array([top / 27, top / 9, top / 3, top])
        limits = grids.Limits(minimum_steps=10)
        others.append(grids.isoflop(candidates, budgets, grids.ratio_optimum(candidates), limits, sizes=7))
    return proposed, others


def test_the_proposed_design_forecasts_better_than_grids_of_its_cost():
    proposed, others = designs()
    assert proposed.flops <= 1e19 and proposed.cells["name"].is_unique
    error = plan.forecast_error(proposed.cells, LAW, THETA, TARGET, 0.01)
    for grid in others:
        alone = plan.forecast_error(grid.cells, LAW, THETA, TARGET, 0.01)
        # Scaled to one price: repeating a design k times divides its variance by k.
        assert error < alone * np.sqrt(grid.flops / 1e19)


def test_the_predicted_error_is_the_spread_of_forecasts_fitted_to_noisy_runs():
    cells = designs()[1][1].cells
    x = {name: np.log(cells[name].to_numpy(float)) for name in "ND"}
    exact = np.exp(LAW.log_loss(THETA[None], x)[0])
    forecasts = []
    for seed in range(60):
        noise = np.exp(0.002 * np.random.default_rng(seed).normal(size=len(cells)))
        fitted = fit_law(cells.assign(loss=exact * noise)[["N", "D", "loss"]], LAW, loss="l2", bootstrap=0)
        forecasts.append(np.log(fitted.predict(N=TARGET.N, D=TARGET.D).value))
    predicted = plan.forecast_error(cells, LAW, THETA, TARGET, 0.002)
    assert np.std(forecasts) == pytest.approx(predicted, rel=0.3)  # three standard errors of 60 draws


def test_a_budget_too_small_for_the_law_is_refused():
    with pytest.raises(UserError, match="parameters to determine"):
        plan.propose(ladder(), 1e6, LAW, THETA, TARGET)


def test_ten_thousand_points_are_planned_in_two_seconds():
    candidates = pd.DataFrame({"N": np.geomspace(1e6, 1e10, 300).astype(int)})
    candidates = candidates.assign(flops_per_token=6.0 * candidates["N"], tokens_per_step=2048)
    start = time.process_time()
    budgets = np.geomspace(1e17, 1e21, 100)
    grid = grids.isoflop(candidates, budgets, grids.ratio_optimum(candidates), sizes=100, span=8.0)
    plan.price(grid, "H100")
    assert len(grid.cells) == 10_000 and time.process_time() - start < 2
    candidates = candidates.iloc[::3].assign(tokens_per_step=4096)
    start = time.process_time()
    limits = grids.Limits(minimum_steps=10)
    wide = tuple(np.geomspace(1, 400, 100))
    assert plan.propose(candidates, 1e19, LAW, THETA, TARGET, limits, ratios=wide).flops <= 1e19
    assert time.process_time() - start < 2
