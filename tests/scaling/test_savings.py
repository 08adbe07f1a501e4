"""What trunks save, from a table of runs."""

import json

import numpy as np
import pytest
import synthetic_sweep as sweep

from llm_jax.scaling import plots
from llm_jax.scaling.fits import fit
from llm_jax.scaling.trunks import constant_rate_curves, savings, tree_panels


@pytest.fixture(scope="module")
def runs():
    return sweep.trunk_runs()


def test_savings_are_the_steps_that_were_not_computed(runs):
    # Three sizes, each with runs of 1, 2 and 4 units, in both ways; a branch's own part is a fifth of it.
    unit = 6 * 512 * 400 * (10_000 + 30_000 + 90_000)
    saved = savings(runs)
    assert (saved.runs, saved.branches, saved.trunks) == (18, 6, 3)
    assert saved.unbroken == pytest.approx(14 * unit)
    assert saved.spent == pytest.approx((7 + 4.6) * unit)
    assert str(saved).endswith("17% saved")


def test_runs_that_are_not_done_count_in_neither_price(runs):
    one = savings(runs[runs["role"] == "wsd"])
    diverged = runs[runs["role"] == "wsd"].iloc[-1:].assign(status="diverged", identity="d")
    assert savings(runs[runs["role"] == "wsd"].merge(diverged, how="outer")) == one


def test_nothing_is_claimed_where_nothing_was_shared(runs):
    assert savings(runs[runs["role"] == "cosine"]) is None
    assert savings(runs.drop(columns=["trunk"])) is None


def test_a_tree_shows_of_each_branch_its_own_steps_only(runs, tmp_path):
    tree = runs[(runs["role"] == "wsd") & (runs["N"] == 10_000)]
    sweep.write_records(tmp_path, tree)
    rates, losses = tree_panels(tmp_path, tree.assign(run=tree["name"]))
    begins = [float(np.min(series.x)) / 512 for series in rates.series]
    assert begins == pytest.approx([1, 640, 320], abs=50) and begins[1] >= 640 and begins[2] >= 320
    # The fall of the first fiftieth would hide the rest.
    hidden = [
        rate.x[~np.isin(rate.x, loss.x)] for rate, loss in zip(rates.series, losses.series, strict=True)
    ]
    assert [len(x) for x in hidden] == [1, 0, 0] and hidden[0].max() / 512 < 1600 / 50
    plots.draw("tree", [rates, losses])


def test_the_envelope_of_constant_rate_trunks_has_the_laws_exponent(tmp_path):
    sizes = [int(3000 * 1.6**k) for k in range(9)]
    table = sweep.trunk_runs(noise=0.0, steps=(20_000, 40_000), sizes=sizes)
    trunks = table[table["role"] == "wsd"]
    sweep.write_records(tmp_path, trunks[trunks["trunk"].isna()])
    for path in tmp_path.rglob("metrics/*.jsonl"):  # a decay, whose losses are no trunk's
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[-1] |= {"learning_rate": 0.001, "loss": 0.5}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = constant_rate_curves(tmp_path, trunks.assign(run=trunks["name"]))
    assert curves.groupby("N").size().eq(19).all() and curves["loss"].min() > sweep.TRUTH["E"]
    found = fit(curves, approach=1).parameters["a"].value
    exact = sweep.TRUTH["beta"] / (sweep.TRUTH["alpha"] + sweep.TRUTH["beta"])
    assert found == pytest.approx(exact, abs=0.05)
