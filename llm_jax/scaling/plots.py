"""A figure of any table: series of points with intervals and lines, in panels under each other.

    fitted = Series("fit", x, y, low, high, mark="-")
    panel = Panel("batch [tokens]", "steps", [measured, fitted])
    figure = plots.draw("Steps to a loss", [panel], note)

What has a form of its own (isoFLOP curves, forecasts) is drawn by figures.py.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_jax.scaling.style import (
    LOOK,
    MARKERS,
    blank,
    finished,
    log_axis,
    loss_axis,
    power,
    short,
    styled,
    with_bars,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Series:
    """Points (mark "o": a marker of the series' own) or a line (mark "-", "--", ":"), with an interval.

    group: series of one group share a colour, as points and the line through them do.
    """

    label: str | None
    x: Any
    y: Any
    low: Any = None
    high: Any = None
    mark: str = "o"
    group: Any = None


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes; log: which of "x", "y" or "xy" is logarithmic. level: a horizontal line."""

    x: str
    y: str
    series: Sequence[Series]
    log: str = "xy"
    level: float | None = None


@styled
def draw(title: str, panels: Sequence[Panel], note: str = "") -> "Figure":
    """The panels under each other, one legend for all."""
    figure, every = blank(title, 1.6 + 2.6 * len(panels), [1] * len(panels))
    groups = [s.group if s.group is not None else ("own", i) for p in panels for i, s in enumerate(p.series)]
    place = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    colours = LOOK.colours(len(place))
    for axes, panel in zip(every, panels, strict=True):
        for index, series in enumerate(panel.series):
            number = place[series.group if series.group is not None else ("own", index)]
            _series(axes, series, colours[number], MARKERS[number % len(MARKERS)])
        if panel.level is not None:
            axes.axhline(panel.level, color=LOOK.ink, linewidth=0.8)
        for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
            low, high = axis.get_view_interval()
            if name == "y" and name in panel.log and high < 4 * low:
                loss_axis(axes)
            elif name in panel.log:
                log_axis(axis, power if high > 1e9 else short if high >= 1000 else "{:g}".format)
            elif high >= 1000:
                axis.set_major_formatter(lambda value, _: short(value) if value >= 0 else "")
        axes.set(xlabel=panel.x, ylabel=panel.y)
    return finished(figure, note)


def _series(axes: Any, series: Series, colour: Any, marker: str) -> None:
    x, y = np.asarray(series.x, float), np.asarray(series.y, float)
    low, high = (y if end is None else np.asarray(end, float) for end in (series.low, series.high))
    if series.mark != "o":
        axes.plot(x, y, series.mark, color=colour, linewidth=1.4, label=series.label)
        if series.low is not None:
            ends = np.nan_to_num(np.maximum([y - low, high - y], 0))
            axes.fill_between(x, y - ends[0], y + ends[1], color=colour, alpha=0.18, linewidth=0)
        return
    shape = dict(color=colour, markersize=5.5, mec=LOOK.paper, mew=0.5, capsize=3, zorder=3)
    with_bars(axes, x, y, low, high, marker, label=series.label, **shape)
