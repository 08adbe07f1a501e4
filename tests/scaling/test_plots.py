"""Figures of any table: what shares a group shares a look, and both axes scale as asked."""

import numpy as np

from llm_jax.scaling import plots
from llm_jax.scaling.plots import Panel, Series


def test_points_and_the_line_through_them_share_a_colour_and_axes_scale_as_asked():
    x = np.geomspace(1, 1e4, 9)
    points = Series("measured", x, x**0.5, 0.8 * x**0.5, 1.3 * x**0.5, group=1)
    fit, other = Series("fit", x, x**0.5, mark="-", group=1), Series("other", x, 2 * x**0.5, mark="--")
    panels = [
        Panel("batch [tokens]", "steps", [points, fit, other]),
        Panel("share", "loss", [Series(None, x, 2 + 1 / x, mark="-")], log="", level=2.0),
    ]
    upper, lower = plots.draw("Steps", panels, "A note.").axes
    colours = {line.get_linestyle(): tuple(np.ravel(line.get_color())) for line in upper.lines}
    assert colours["-"] == colours["None"] != colours["--"]
    assert upper.get_xscale() == upper.get_yscale() == "log"
    assert lower.get_xscale() == lower.get_yscale() == "linear"
