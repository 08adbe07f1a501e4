"""How figures look: narrow pages, tick labels, one legend and the conventions below, a look for dark pages.

Figures are drawn narrow, so that text stays readable on a phone. Colours are told apart by colour-blind
readers (viridis for budgets, Okabe and Ito's for the rest), and shapes differ wherever colours do. They are
drawn in LOOK's colours; `dark` puts those of DARK in their places.
matplotlib is imported on the first drawing; nothing here touches pyplot or a display.
"""

import dataclasses
import functools
import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.8  # inches: 345 points, about a phone's width
MARKERS = "osD^v<>hp8"


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of one LOOK. budgets: the stretch of viridis that shows on `paper`."""

    paper: str
    ink: str
    faint: str
    law: str
    forecast: str
    budgets: tuple[float, float]

    def colours(self, count: int) -> list[Any]:
        """A colour for each of `count` budgets, in order."""
        from matplotlib import colormaps

        return list(colormaps["viridis"](np.linspace(*self.budgets, max(count, 2))[:count]))


LOOK = Theme("#ffffff", "#1d2530", "#c9ced6", "#d55e00", "#0072b2", (0.0, 0.85))
DARK = Theme("#14181f", "#e4e8ee", "#3a424e", "#ff9143", "#56b4e9", (0.28, 1.0))


def styled(draw: Callable[..., "Figure"]) -> Callable[..., "Figure"]:
    """Draws with the settings of LOOK and no others."""

    @functools.wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> "Figure":
        import matplotlib

        # A refit without an optimum has infinities; what they spoil is an interval that isn't drawn.
        with matplotlib.rc_context(), np.errstate(divide="ignore", invalid="ignore"):
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_settings())
            return draw(*args, **kwargs)

    return drawn


def blank(title: str, height: float, rows: Sequence[float] = (1,)) -> tuple["Figure", list["Axes"]]:
    """An empty figure of `height` inches with panels of the given relative heights under each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.06)
    panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0]
    panels[0].set_title(title, loc="left", fontsize=12, fontweight="bold", pad=8)
    return figure, list(panels)


def finished(figure: "Figure", note: str) -> "Figure":
    """The conventions at the bottom, and above them one legend of all panels (each label once)."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        if axes.get_legend() is None:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                entries.setdefault(label, handle)
    longest = max((len(re.sub(r"[$^{}]|\\times", "", label)) for label in entries), default=0)
    columns = 2 if longest > 16 else 3
    lines = textwrap.wrap(note, 72)
    height = figure.get_figheight()
    foot = (0.17 * len(lines) + 0.08) / height
    room = foot + (0.2 * math.ceil(len(entries) / columns) + 0.1) / height
    figure.get_layout_engine().set(rect=(0, room, 1, 1 - room))
    figure.text(0.02, 0.06 / height, "\n".join(lines), fontsize=8.5, alpha=0.8, linespacing=1.25)
    if entries:
        place = dict(loc="lower left", bbox_to_anchor=(0, foot), borderaxespad=0.3)
        figure.legend(entries.values(), entries.keys(), ncols=columns, columnspacing=1.2, **place)
    return figure


def png(figure: "Figure", dpi: int = 200) -> bytes:
    """The figure as a PNG file."""
    return _saved(figure, format="png", dpi=dpi)


def svg(figure: "Figure") -> bytes:
    """The figure as an SVG file, letters as outlines; the same bytes for the same figure."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "llm_jax", "svg.fonttype": "path"}):
        return _saved(figure, format="svg", metadata={"Date": None})


def dark(svg: bytes) -> bytes:
    """A figure's SVG for a dark page: each colour of LOOK becomes DARK's."""
    return re.sub(rb"(?<=: )#[0-9a-f]{6}", lambda found: _counterparts().get(found[0], found[0]), svg)


@functools.cache
def _counterparts() -> dict[bytes, bytes]:
    from matplotlib.colors import to_hex

    steps = 1000  # of the stretch of budgets' colours, finer than viridis
    pairs = zip(LOOK.colours(steps), DARK.colours(steps), strict=True)
    found = {to_hex(light): to_hex(other) for light, other in pairs}
    for name in ("paper", "ink", "faint", "law", "forecast"):
        found[getattr(LOOK, name)] = getattr(DARK, name)
    return {light.encode(): other.encode() for light, other in found.items()}


def band(
    axes: "Axes", x: np.ndarray, estimates: Sequence[Any], colour: str, label: str, line: str = "-"
) -> None:
    """A line with its interval; a line alone where nothing was resampled."""
    axes.plot(x, [e.value for e in estimates], line, color=colour, linewidth=1.6, label=label, zorder=2)
    low, high = ([getattr(e, side) for e in estimates] for side in ("low", "high"))
    if np.isfinite(low).all():
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0, zorder=1)


def with_bars(axes: "Axes", x: Any, y: Any, low: Any, high: Any, marker: str, **shape: Any) -> None:
    """Points with their intervals, none where NaN; one open to 0 or infinity ends in an arrow."""
    x, y, low, high = (np.asarray(part, float) for part in (x, y, low, high))
    below, above = (low == 0) & (y > 0), np.isposinf(high)
    low, high = np.where(below, y / 2, low), np.where(above, 2 * y, high)
    ends = np.nan_to_num(np.maximum([y - low, high - y], 0))
    axes.errorbar(x, y, ends if ends.any() else None, fmt=marker, linestyle="none", **shape)
    for opened, end, arrow in ((below, low, "v"), (above, high, "^")):
        axes.plot(x[opened], end[opened], arrow, color=shape["color"], markersize=5)


def short(value: float) -> str:
    """A count of parameters or tokens in a few letters: 30.3k, 1.5M; nothing for NaN."""
    if not math.isfinite(value):
        return "∞" if value > 0 else ""
    value = float(f"{value:.3g}")
    units = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (0.0, ""))
    size, unit = next(pair for pair in units if value >= pair[0])
    return f"{value / (size or 1.0):.3g}{unit}"


def flops(value: float) -> str:
    """A number of FLOPs in a few letters: 9.00e13."""
    return f"{value:.2e}".replace("e+", "e")


def power(value: float) -> str:
    """A number of FLOPs for a figure: ten to the 13th."""
    mantissa, exponent = f"{value:.1e}".split("e")
    ten = f"10^{{{int(exponent)}}}"
    return f"${ten}$" if float(mantissa) == 1 else f"${float(mantissa):g}{{\\times}}{ten}$"


def log_axis(axis: Any, text: Callable[[float], str] = short) -> None:
    """Log scale, labelled by `text` at one to four round numbers of each decade, as the range has room."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

    (axis.axes.set_xscale if axis is axis.axes.xaxis else axis.axes.set_yscale)("log")
    low, high = axis.get_view_interval()
    decades = np.log10(high / low)
    rounds = (1, 2, 3, 5) if decades < 1.3 else (1, 3) if decades < 2.6 else (1,)
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    ticks = np.outer(powers, rounds).ravel()
    axis.set_major_locator(FixedLocator(ticks[(ticks >= low) & (ticks <= high)]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_locator(LogLocator(subs="all", numticks=99))
    axis.set_minor_formatter(NullFormatter())
    axis.set_view_interval(low, high, ignore=True)


def loss_axis(axes: "Axes") -> None:
    """Log scale for losses: they span less than a decade, so its ticks are round numbers."""
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, MaxNLocator, NullLocator

    low, high = axes.get_ylim()
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator(MaxNLocator(6).tick_values(low, high)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%.4g"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(low, high)


def padded(*values: Any, share: float = 0.06) -> tuple[float, float]:
    """Limits that hold all values and a little room."""
    every = np.concatenate([np.ravel(np.asarray(part, float)) for part in values])
    room = share * np.ptp(every)
    return every.min() - room, every.max() + room


def _saved(figure: "Figure", **options: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, **options)
    return file.getvalue()


def _settings() -> dict[str, Any]:
    paper = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    ink = ("text.color", "xtick.color", "ytick.color", "axes.edgecolor", "axes.labelcolor")
    return (
        dict.fromkeys(paper, LOOK.paper)
        | dict.fromkeys(ink, LOOK.ink)
        | {
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": LOOK.faint,
            "grid.linewidth": 0.5,
            "grid.alpha": 0.6,
            "font.size": 10.0,
            "axes.labelsize": 10.0,
            "xtick.labelsize": 9.5,
            "ytick.labelsize": 9.5,
            "legend.fontsize": 9.0,
            "legend.frameon": False,
            "mathtext.default": "regular",
        }
    )
