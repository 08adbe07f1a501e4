"""IsoFLOP grids: budgets are met, limits are kept, and what is left out is said."""

import numpy as np
import pandas as pd
import pytest

from llm_jax.config import UserError
from llm_jax.scaling import grids


def ladder(tokens_per_step=2048):
    """Twelve models, 16 to 512 wide, N from about 50 thousand to 50 million."""
    width = np.array([16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 512])
    layers = np.maximum(2, width // 32)
    sizes = 12 * layers * width**2 + 1024 * width
    return pd.DataFrame(
        dict(
            width=width,
            layers=layers,
            N=sizes,
            flops_per_token=6.0 * sizes + 12 * layers * width * 128,
            tokens_per_step=tokens_per_step,
        )
    )


BUDGETS = (1e13, 4e13, 1.6e14)


def plan(**changes):
    candidates = ladder()
    arguments = dict(budgets=BUDGETS, optimum=grids.ratio_optimum(candidates))
    return grids.isoflop(candidates, **(arguments | changes))


def test_every_cell_spends_its_budget_to_within_half_a_step():
    cells = plan().cells
    assert (cells["D"] == cells["steps"] * cells["tokens_per_step"]).all()
    np.testing.assert_allclose(cells["flops"], cells["D"] * cells["flops_per_token"])
    np.testing.assert_allclose(cells["deviation"], cells["flops"] / cells["budget_flops"] - 1)
    assert (np.abs(cells["deviation"]) <= 0.5 / cells["steps"] + 1e-12).all()


def test_the_sizes_surround_the_prior_optimum_at_every_budget():
    grid = plan(sizes=5, limits=grids.Limits(minimum_steps=1))
    prior = grids.ratio_optimum(ladder())
    for budget, cells in grid.cells.groupby("budget_flops"):
        assert len(cells) == cells["N"].nunique() == 5
        assert cells["N"].min() < prior(budget) < cells["N"].max()


def test_the_ratio_prior_has_the_ratio_it_names():
    candidates = ladder()
    size = grids.ratio_optimum(candidates, 30.0)(5e13)
    cost = np.interp(np.log(size), np.log(candidates["N"]), np.log(candidates["flops_per_token"]))
    assert 5e13 / np.exp(cost) / size == pytest.approx(30.0, rel=1e-9)


def test_no_cell_sees_more_than_one_epoch_and_what_is_left_out_is_said():
    limits = grids.Limits(available_tokens=20_000_000)
    grid = plan(limits=limits, span=8.0)
    assert grid.cells["D"].max() <= 20_000_000
    assert any("more than one epoch of 20,000,000" in note for note in grid.notes)


def test_a_budget_that_leaves_fewer_than_five_sizes_is_refused_with_the_reason():
    with pytest.raises(UserError, match=r"4 of 12 .* needs 5 \(8 would see more than one epoch of 2,000,000"):
        plan(limits=grids.Limits(available_tokens=2_000_000, minimum_steps=1))
    with pytest.raises(UserError, match=r"would see fewer than 5,000 steps"):
        plan(limits=grids.Limits(minimum_steps=5000))


def test_a_prior_outside_the_sizes_trained_is_said():
    grid = plan(optimum=lambda budget: 1e9, limits=grids.Limits(minimum_steps=1))
    assert sum("lies outside the sizes trained" in note for note in grid.notes) == len(BUDGETS)


def test_the_holdout_is_the_allowed_size_nearest_the_forecast_optimum():
    candidates = ladder()
    sizes = candidates["N"].to_numpy()
    free = grids.holdout(candidates, 1.6e15, lambda budget: sizes[6] * 1.1)
    assert free.cells["N"].tolist() == [sizes[6]] and free.cells["role"].tolist() == ["holdout"]
    tokens = int(free.cells["D"].iloc[0]) - 1
    limited = grids.holdout(
        candidates, 1.6e15, lambda budget: sizes[6] * 1.1, grids.Limits(available_tokens=tokens)
    )
    assert limited.cells["N"].tolist() == [sizes[7]]
    assert "left out" in limited.notes[0]
    with pytest.raises(UserError, match="no candidate can be the hold-out"):
        grids.holdout(candidates, 1.6e15, lambda budget: 1e6, grids.Limits(available_tokens=1000))


def test_the_price_is_the_sum_of_what_the_cells_cost():
    grid = plan() + grids.holdout(ladder(), 6.4e14, grids.ratio_optimum(ladder()))
    assert grid.flops == pytest.approx((grid.cells["D"] * grid.cells["flops_per_token"]).sum())
    assert grid.seconds(1e11) == pytest.approx(grid.flops / 1e11)
    assert grid.cells["name"].is_unique
    with pytest.raises(UserError, match="positive speed"):
        grid.seconds(0.0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda table: table.drop(columns="flops_per_token"), "no column 'flops_per_token'"),
        (lambda table: table.assign(N=-table["N"]), "values in 'N' that are not positive"),
        (lambda table: pd.concat([table, table.iloc[:1]]), "two candidates have N="),
    ],
)
def test_a_malformed_table_of_candidates_is_refused(spoil, message):
    with pytest.raises(UserError, match=message):
        grids.isoflop(spoil(ladder()), BUDGETS, lambda budget: 1e6)


@pytest.mark.parametrize("budgets", [(), (1e13, 1e13), (1e13, 1.02e13), (-1e13, 1e13)])
def test_budgets_must_be_distinct_and_positive(budgets):
    with pytest.raises(UserError, match=r"positive budgets, each at least 5\.1% above"):
        plan(budgets=budgets)
