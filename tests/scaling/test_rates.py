"""The check of the learning rate: what counts as better, and what can't be judged."""

import numpy as np
import pandas as pd
import pytest

from llm_jax.config import UserError
from llm_jax.scaling.rates import check_rates, tune, tuned


def table(losses, seeds=(0, 1), N=1000, status="done"):
    """A run for every multiple and seed; losses: {multiple: (a seed's loss, ...)}."""
    return pd.DataFrame(
        {"N": N, "D": 1e6, "loss": loss, "seed": seed, "status": status, "learning_rate": 0.01 * multiple}
        for multiple, values in losses.items()
        for seed, loss in zip(seeds, values, strict=True)
    )


def check(runs):
    (found,) = check_rates(runs, [0.01] * len(runs))
    return found


def test_a_rate_is_confirmed_where_its_neighbours_are_worse_by_more_than_chance():
    found = check(table({0.5: (2.1, 2.12), 1.0: (2.0, 2.02), 2.0: (2.08, 2.06)}))
    assert not found.better and not found.alike
    assert str(found).startswith("rate confirmed at N=1,000")
    assert str(found).endswith("standard error of a difference 0.0141 (3 degrees of freedom)")


def test_a_neighbour_within_chance_neither_beats_the_rule_nor_confirms_it():
    spread = 0.02 / np.sqrt(2)  # two seeds 0.02 apart, at every multiple
    within = check(table({0.5: (2.1, 2.12), 1.0: (2.0, 2.02), 2.0: (1.97, 1.99)}))
    assert within.spread == within.error == pytest.approx(spread)
    assert spread < 0.03 < within.bound == pytest.approx(2.353 * spread, rel=1e-3)  # Student's t, 3 d.f.
    assert not within.better and within.alike == {2.0: pytest.approx(0.03)}
    assert str(within).startswith("rate not told apart from 2x at")
    beyond = check(table({0.5: (2.1, 2.12), 1.0: (2.0, 2.02), 2.0: (1.95, 1.97)}))
    assert beyond.better == {2.0: pytest.approx(0.05)}
    assert str(beyond).startswith("rate not optimal at")
    assert beyond.relative_spread == pytest.approx(spread / 2.01)


def test_rates_that_are_alike_are_called_better_as_often_as_chance_has_it():
    noise = np.random.default_rng(0).normal(2.0, 0.01, (400, 3, 2))
    checks = [check(table(dict(zip((0.5, 1.0, 2.0), losses, strict=True)))) for losses in noise]
    called = np.mean([[multiple in found.better for multiple in (0.5, 2.0)] for found in checks])
    assert 0.03 < called < 0.07 and np.mean([found.verdict == "rate confirmed" for found in checks]) < 0.02


def test_a_rate_that_diverges_is_no_better_and_does_not_blur_the_spread():
    runs = table({0.5: (2.1, 2.12), 1.0: (2.0, 2.02), 2.0: (1.0, 1.0)})
    runs.loc[runs["learning_rate"] == 0.02, "status"] = "diverged"
    assert not check(runs).better
    assert check(runs).spread == pytest.approx(0.02 / np.sqrt(2))


def test_a_rule_whose_own_runs_diverged_is_not_confirmed():
    runs = table({0.5: (2.1, 2.12), 1.0: (2.0, 2.02), 2.0: (2.2, 2.2)})
    runs.loc[(runs["learning_rate"] == 0.01) & (runs["seed"] == 1), "status"] = "diverged"
    found = check(runs)
    assert found.doubtful
    assert str(found).startswith("rate not optimal at N=1,000 (runs at the rule's own rate diverged)")


def test_every_model_with_all_multiples_is_checked_and_others_are_not():
    full = {0.5: (2.1, 2.1), 1.0: (2.0, 2.0), 2.0: (2.2, 2.2)}
    runs = pd.concat([table(full, N=1000), table(full, N=9000), table({1.0: (2.0, 2.0)}, N=5000)])
    assert [found.N for found in check_rates(runs, [0.01] * len(runs))] == [1000, 9000]


def test_one_seed_or_a_missing_multiple_can_not_be_judged():
    one_seed = table({0.5: (2.1,), 1.0: (2.0,), 2.0: (2.2,)}, seeds=(0,))
    one_sided = table({0.5: (2.1, 2.1), 1.0: (2.0, 2.0)})
    for runs in (one_seed, one_sided):
        with pytest.raises(UserError, match="two seeds"):
            check_rates(runs, [0.01] * len(runs))


def test_the_best_rate_is_the_vertex_of_a_parabola_in_its_logarithm():
    rates = np.array([0.04, 0.01, 0.02, 0.08])
    found = tuned(rates, 2 + 0.1 * np.log(rates / 0.03) ** 2)
    assert (found.rate, found.value, found.edge) == (pytest.approx(0.03), pytest.approx(2), "")


def test_a_best_rate_at_the_edge_is_called_so_and_a_cliff_beside_it_is_none():
    assert tuned([1, 2, 4], [1.0, 2.0, 3.0]).edge == "the smallest rate is the best"
    assert tuned([1, 2, 4], [3.0, 2.0, 1.0]).edge == "the largest rate is the best"
    assert tuned([1, 2, 4], [3.0, 2.0, np.nan]) == (pytest.approx(2), 2.0, "")
    assert "no rate" in tuned([1, 2, 4], [np.inf] * 3).edge


def test_each_cell_counts_at_its_best_rate_and_one_at_the_edge_or_with_a_failed_seed_does_not():
    rates = 0.01 * 2.0 ** np.arange(4)
    bowl = lambda rate, best: 2 + 0.3 * np.log(rate / best) ** 2  # noqa: E731
    rows = [("inside", rate, seed, bowl(rate, 0.025) + seed) for rate in rates for seed in (0, 1)]
    rows += [("edge", rate, 0, bowl(rate, 0.5)) for rate in rates]
    rows += [("failed", rate, seed, np.nan if seed else 2.0) for rate in rates for seed in (0, 1)]
    found = tune(pd.DataFrame(rows, columns=["cell", "rate", "seed", "value"]), "cell")
    assert found.points["cell"].tolist() == ["inside"] * 2
    assert found.points["value"].tolist() == pytest.approx([2, 3])
    assert found.points["rate"].tolist() == pytest.approx([0.025] * 2)
    assert found.refused == {
        "edge": "the largest rate is the best",
        "failed": "at no rate did a run get there",
    }
