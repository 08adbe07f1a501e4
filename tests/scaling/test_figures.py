"""Figures: they state their conventions, mark what was refused, and nothing overlaps or is cut off."""

import dataclasses
import io
import itertools
import re
from typing import ClassVar

import matplotlib
import numpy as np
import pandas as pd
import pytest
import synthetic_sweep as sweep
from matplotlib.colors import to_hex, to_rgb

from llm_jax.scaling import compare, figures, forecast, style
from llm_jax.scaling.fits import fit
from llm_jax.scaling.isoflop import fit_isoflop

COUNTING = "parameters without embeddings"


@pytest.fixture(scope="module")
def story():
    """An isoFLOP fit whose first budget is refused, a law, and a forecast with its check."""
    table = sweep.runs()
    grid, held = table[table["role"] == "grid"].copy(), table[table["role"] == "holdout"].iloc[0]
    law = fit(grid, sweep.FewStarts(), bootstrap=100, counting=COUNTING)
    made = forecast.make(law, held["N"], held["D"], held["C"])
    outcome = forecast.Outcome(made, forecast.check(made, held["loss"]))
    first = grid["budget_flops"] == grid["budget_flops"].min()
    grid.loc[first, "loss"] = np.linspace(2.5, 2.7, first.sum())
    return fit_isoflop(grid, bootstrap=50, counting=COUNTING), law, [outcome]


@pytest.fixture(scope="module")
def two():
    """A comparison of two laws, and a compute multiplier between two recipes."""
    grid = sweep.runs()[:18]

    class Tied(sweep.FewStarts):
        ties: ClassVar = {"beta": "alpha"}

    rows = compare.compare(grid, [sweep.FewStarts(), Tied()], bootstrap=0, counting=COUNTING)
    table = pd.concat([grid.assign(rule="slow"), sweep.runs(seed=1)[:18].assign(rule="fast")])
    table = table.reset_index(drop=True)
    return rows, compare.multiplier(
        table, sweep.FewStarts(), "rule", bootstrap=100, counting=COUNTING, where="D > 1"
    )[0]


@pytest.fixture
def drawn(story, two):
    isoflop, law, outcomes = story
    curve = pd.DataFrame({"C": [1e12, 1e13], "loss": [3.0, 2.6]})
    return {
        "isoflop": figures.isoflop_curves(isoflop.curves, isoflop.conventions),
        "frontier": figures.frontier(law, outcomes, [curve]),
        "optima": figures.optima(isoflop, law, reach=1e15),
        "residuals": figures.residuals(law, outcomes),
        "approach 2 alone": figures.optima(isoflop, None),
        "its residuals": figures.minima_residuals(isoflop),
        "laws compared": figures.comparison(two[0]),
        "multiplier": figures.multiplier(two[1]),
    }


def texts(figure):
    return [text for text in figure.findobj(matplotlib.text.Text) if text.get_text().strip()]


def test_every_figure_states_what_N_counts_in_letters_readable_on_a_phone(drawn):
    for name, figure in drawn.items():
        assert any(COUNTING in text.get_text().replace("\n", " ") for text in texts(figure)), name
        phone = 360 / 72 / figure.get_figwidth()  # a phone's 360 points over the figure's
        assert min(text.get_fontsize() for text in texts(figure)) * phone >= 8.5, name


def test_nothing_overlaps_the_conventions_or_is_cut_off(drawn):
    for name, figure in drawn.items():
        style.png(figure, dpi=72)
        page = figure.bbox.padded(1)
        (note,) = (text for text in figure.texts if COUNTING in text.get_text().replace("\n", " "))
        stacked = [axes.get_tightbbox() for axes in figure.axes]
        stacked += [legend.get_window_extent() for legend in figure.legends]
        stacked += [note.get_window_extent()]
        for box in stacked:
            assert page.containsx(box.x0) and page.containsx(box.x1), name
            assert page.containsy(box.y0) and page.containsy(box.y1), name
        assert all(above.y0 >= below.y1 for above, below in itertools.pairwise(stacked)), name


def test_a_refused_curve_is_dotted_without_a_minimum_and_its_reason_stands_below(story):
    isoflop = story[0]
    assert [bool(curve.refused) for curve in isoflop.curves] == [True, False, False]
    figure = figures.isoflop_curves(isoflop.curves, isoflop.conventions)
    axes = figure.axes[0]
    assert sum(line.get_linestyle() == ":" for line in axes.lines) == 1
    assert sum(line.get_marker() == "+" and len(line.get_xdata()) == 1 for line in axes.lines) == 2
    assert any(
        "Refused at 1e+13 FLOPs: the smallest size" in t.get_text().replace("\n", " ") for t in figure.texts
    )
    assert any(t.get_text().endswith("refused") for t in figure.legends[0].get_texts())


def test_an_interval_without_an_end_is_an_arrow(story):
    isoflop = story[0]
    minima = isoflop.minima.copy()
    minima[:10, 1, :2], minima[:10, 2, :2] = (-np.inf, np.inf), (np.inf, -np.inf)
    opened = dataclasses.replace(isoflop, minima=minima)
    assert [tuple(each) for each in opened.beyond][1:] == [(0.2, 0.0), (0.0, 0.2)]
    figure = figures.optima(opened, None)
    arrows = [
        [line.get_marker() for line in axes.lines if line.get_marker() in "v^" and len(line.get_xdata())]
        for axes in figure.axes
    ]
    assert arrows == [["v", "^"], ["v", "^"]]
    assert any("In 20.0% of the refits" in t.get_text().replace("\n", " ") for t in figure.texts)


def test_the_multiplier_is_told_with_its_recipes(two):
    figure = figures.multiplier(two[1])
    (note,) = (text.get_text().replace("\n", " ") for text in figure.texts)
    number = two[1].parameters["multiplier"]
    assert f"fast reaches with C what slow reaches with {number.value:.3g} C" in note and "D > 1" in note
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [18, 60, 18, 60]


def test_a_budget_has_one_colour_in_all_figures(story):
    isoflop, law, _ = story
    colours = []
    for axes in (
        figures.isoflop_curves(isoflop.curves, isoflop.conventions).axes[0],
        figures.residuals(law).axes[0],
    ):
        lines = zip(*axes.get_legend_handles_labels(), strict=True)
        colours.append([to_hex(line.get_color()) for line, text in lines if "FLOPs" in text])
    assert colours[0] == colours[1] and len(set(colours[0])) == 3


def test_the_forecast_strip_shows_its_intervals_and_the_measured_loss(story):
    _, law, outcomes = story
    made, check = outcomes[0]
    strip = figures.frontier(law, outcomes).axes[1]
    bars = [tuple(bar.get_segments()[0][:, 0]) for bar in strip.collections]
    assert bars == [made.intervals[0.9], made.intervals[0.95]]
    stars = [line.get_xdata()[0] for line in strip.lines if line.get_marker() == "*"]
    assert stars == [check.measured]
    low, high = strip.get_xlim()
    assert low < made.intervals[0.95][0] < made.intervals[0.95][1] < high


def test_residuals_are_those_of_the_fit(story):
    law = story[1]
    axes = figures.residuals(law).axes[0]
    shown = np.concatenate([line.get_ydata() for line in axes.lines if line.get_marker() != "None"])
    np.testing.assert_allclose(np.sort(shown), np.sort(100 * law.residuals))


def test_a_table_without_budgets_is_drawn_too():
    points = sweep.runs()[["N", "D", "loss"]]
    law = fit(points, sweep.FewStarts(), bootstrap=0)
    for figure in (figures.frontier(law), figures.optima(None, law), figures.residuals(law)):
        assert style.png(figure, dpi=50).startswith(b"\x89PNG")


def test_drawing_leaves_matplotlib_as_it_was_and_files_are_reproducible(story):
    before = dict(matplotlib.rcParams)
    first, second = (style.svg(figures.residuals(story[1])) for _ in range(2))
    assert dict(matplotlib.rcParams) == before
    assert first == second and b"<svg" in first
    from PIL import Image

    image = Image.open(io.BytesIO(style.png(figures.residuals(story[1]), dpi=100)))
    assert image.width == pytest.approx(style.WIDTH * 100, abs=1)


def test_on_a_dark_page_every_colour_is_the_dark_looks_and_nothing_else_changes(drawn):
    for figure in drawn.values():
        light = style.svg(figure)
        dark = style.dark(light)
        colours = re.compile(rb": #[0-9a-f]{6}")
        assert colours.split(light) == colours.split(dark)
        pairs = dict(zip(colours.findall(light), colours.findall(dark), strict=True))
        assert pairs[b": #ffffff"] == b": " + style.DARK.paper.encode()
        kept = {colour for colour, other in pairs.items() if colour == other}
        assert kept <= {b": #cccccc"}  # the legend's border
        budgets = [to_hex(colour).encode() for colour in style.LOOK.colours(3)]
        expected = [to_hex(colour).encode() for colour in style.DARK.colours(3)]
        for colour, other in zip(budgets, expected, strict=True):
            found = pairs.get(b": " + colour, b": " + other)
            apart = np.subtract(to_rgb(found[2:].decode()), to_rgb(other.decode()))
            assert np.abs(apart).max() < 0.02


@pytest.mark.parametrize(
    ("value", "text"),
    [(30_267, "30.3k"), (1.5e6, "1.5M"), (999_999_999.9, "1G"), (15e12, "15T"), (7, "7"), (0.5, "0.5")],
)
def test_counts_are_short(value, text):
    assert style.short(value) == text


def test_flops_are_powers_of_ten():
    assert [style.power(value) for value in (1e13, 9.96e12, 3e9)] == [
        "$10^{13}$",
        "$10^{13}$",
        r"$3{\times}10^{9}$",
    ]
    assert style.flops(9e13) == "9.00e13"
