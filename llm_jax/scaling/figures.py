"""The report's figures: each function takes fits and forecasts and returns a matplotlib Figure.

The conventions behind the numbers (what N counts, the loss that was minimised) stand below each; `style.png`
and `style.svg` turn a figure into a file.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from llm_jax.scaling.compare import CODES, Compared, best_loss
from llm_jax.scaling.compare import COLUMN as RECIPE
from llm_jax.scaling.curves import METHODS, Curve
from llm_jax.scaling.envelope import EnvelopeFit
from llm_jax.scaling.forecast import Outcome, fitted_flops
from llm_jax.scaling.isoflop import IsoflopFit
from llm_jax.scaling.plots import Panel, Series, draw
from llm_jax.scaling.results import Estimate, Fit
from llm_jax.scaling.style import (
    LOOK,
    MARKERS,
    band,
    blank,
    finished,
    log_axis,
    loss_axis,
    padded,
    power,
    short,
    styled,
    with_bars,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZES, TOKENS, COMPUTE = "N, parameters", "D, training tokens", "C, training compute [FLOPs]"
LOSS = "held-out loss [nats/token]"
LABELS = {
    "N": SIZES,
    "D": TOKENS,
    "C": COMPUTE,
    "U": "U, unique tokens",
    "M": "M, tokens a parameter",
    "loss": "loss [nats/token]",
    "error": "error of the task",
}
TITLES = {"N": "size", "D": "data", "C": "compute", "U": "unique data", "M": "tokens a parameter"}


@styled
def isoflop_curves(curves: Sequence[Curve], terms: Mapping[str, Any], note: str = "") -> "Figure":
    """Loss against size at each budget, the curve through it and its minimum.

    terms: an Approach 2's conventions; of others, with the method of the curves. note: what else to say.

    Hollow points are runs the curve leaves out; a curve that was refused is dotted, and the note says why.
    """
    figure, (axes,) = blank("IsoFLOP curves", 4.6)
    curves = sorted(curves, key=lambda curve: curve.C)
    colours = LOOK.colours(len(curves))
    for curve, colour, marker in zip(curves, colours, _cycled(len(curves)), strict=True):
        shape = dict(color=colour, markersize=5, linestyle="none", zorder=3)
        label = f"{power(curve.C)} FLOPs" + (", refused" if curve.refused else "")
        axes.plot(curve.sizes[curve.used], curve.losses[curve.used], marker, label=label, **shape)
        axes.plot(curve.sizes[~curve.used], curve.losses[~curve.used], marker, mfc=LOOK.paper, **shape)
        if curve.refused:
            order = np.argsort(curve.sizes)
            axes.plot(curve.sizes[order], curve.losses[order], ":", color=colour, linewidth=1.2)
            continue
        sizes = np.geomspace(curve.sizes.min(), curve.sizes.max(), 200)
        axes.plot(sizes, curve.predict(sizes), color=colour, linewidth=1.4)
        axes.plot(curve.N, curve.loss, "+", color=LOOK.law, markersize=12, mew=2, zorder=4)
    axes.plot([], [], "+", color=LOOK.law, markersize=10, mew=2, label="minimum")
    log_axis(axes.xaxis)
    loss_axis(axes)
    axes.set(xlabel=SIZES, ylabel=LOSS)
    reasons = dict.fromkeys(curve.refused for curve in curves if curve.refused)
    at = {reason: ", ".join(f"{c.C:.2g}" for c in curves if c.refused == reason) for reason in reasons}
    refused = [f"Refused at {budgets} FLOPs: {reason}." for reason, budgets in at.items()]
    hollow = "Hollow points are left out." if not all(curve.used.all() for curve in curves) else ""
    return finished(figure, " ".join(filter(None, [of_optima(terms), hollow, *refused, note])))


@styled
def frontier(fit: Fit, outcomes: Sequence[Outcome] = (), curves: Sequence[pd.DataFrame] = ()) -> "Figure":
    """Loss against compute: every run, and the law's frontier with its interval up to the hold-outs.

    curves: a table for each run with its C and training loss as it went on. Below, every forecast has a
    strip of its own: in the whole range of losses it could not be told from what was measured.
    """
    figure, panels = blank("Loss against compute", 3.9 + len(outcomes), (6, *(1 for _ in outcomes)))
    axes, points = panels[0], fit.points.frame.assign(C=fitted_flops(fit))
    for index, curve in enumerate(curves):
        label = "training loss" if index == 0 else None
        axes.plot(curve["C"], curve["loss"], color=LOOK.faint, linewidth=0.8, zorder=1, label=label)
    _runs(axes, points, "C", points["loss"])
    forecasts = [outcome.forecast for outcome in outcomes]
    budgets = np.geomspace(points["C"].min(), max([points["C"].max(), *(f.C for f in forecasts)]), 60)
    best = [fit.optimum(budget).loss for budget in budgets]
    band(axes, budgets, best, LOOK.law, f"law at its best N, D ({fit.level:.0%})")
    for strip, (made, check) in zip(panels[1:], outcomes, strict=True):
        axes.plot(made.C, made.loss, "D", color=LOOK.forecast, markersize=7, mfc="none", zorder=5)
        if check:
            axes.plot(made.C, check.measured, "*", color=LOOK.ink, markersize=9, zorder=4)
        _strip(strip, Outcome(made, check))
    axes.set_xlim(*np.exp(padded(np.log(budgets))))
    held = [check.measured for _, check in outcomes if check]
    axes.set_ylim(*padded(points["loss"], [f.loss for f in forecasts], held, [e.value for e in best]))
    log_axis(axes.xaxis, power)
    loss_axis(axes)
    axes.set(xlabel=COMPUTE, ylabel=LOSS)
    return finished(figure, conventions(fit))


@styled
def optima(isoflop: IsoflopFit | None, fit: Fit | None, *, reach: float = 0.0) -> "Figure":
    """The best N and D against compute by one approach or both, with intervals; up to `reach` FLOPs if
    larger.
    """
    figure, panels = blank("Compute-optimal size and data", 5.6, (1, 1))
    flops = fitted_flops(fit or isoflop)
    budgets = np.geomspace(flops.min(), max(flops.max(), reach), 60)
    found = (
        [o for o, c in zip(isoflop.optima, isoflop.curves, strict=True) if not c.refused] if isoflop else []
    )
    for axes, name, exponent, label in zip(panels, "ND", "ab", (SIZES, TOKENS), strict=True):
        shown = []
        for each, colour, line in ((isoflop, LOOK.forecast, "-"), (fit, LOOK.law, "--")):
            if each is None or exponent not in each.parameters:
                continue
            value, low, high, _ = each.parameters[exponent]
            text = f"Approach {each.approach}: {name} ∝ C$^{{{value:.2f}}}$"
            if np.isfinite(low):
                text += f"  [{low:.2f}, {high:.2f}]"
            best = [getattr(each.optimum(budget), name) for budget in budgets]
            band(axes, budgets, best, colour, text, line)
            shown += [estimate.value for estimate in best]
        if found:
            at = [curve.C for curve in isoflop.accepted]
            best = [optimum[name] for optimum in found]
            value, low, high = ([getattr(each, part) for each in best] for part in ("value", "low", "high"))
            with_bars(axes, at, value, low, high, "o", color=LOOK.forecast, capsize=3, markersize=5)
            shown += value
        # By the lines alone: an interval may span many decades. The legend has the upper third to itself.
        low, high = np.log(min(shown)), np.log(max(shown))
        span = max(high - low, np.log(4))
        axes.set_ylim(np.exp(low - 0.15 * span), np.exp(high + 0.45 * span))
        log_axis(axes.xaxis, power)
        log_axis(axes.yaxis)
        axes.set(ylabel=label)
        axes.legend(loc="upper left", handlelength=2.4)
    panels[-1].set_xlabel(COMPUTE)
    notes = [conventions(fit)] if fit else []
    notes += [of_optima(isoflop.conventions), isoflop.open_ends] if isoflop else []
    level = (fit or isoflop).level
    return finished(
        figure, " ".join(filter(None, [*notes, f"Bands and bars: {level:.0%} bootstrap intervals."]))
    )


@styled
def curve(fit: Fit) -> "Figure":
    """Runs and law against the one thing that the law depends on, with the law's interval."""
    (name,), output = fit.law.inputs, fit.law.output
    title = f"{TITLES.get(output, output)} against {TITLES.get(name, name)}"
    figure, (axes,) = blank(title[0].upper() + title[1:], 4.0)
    frame = fit.points.frame
    _runs(axes, frame, name, frame[output].to_numpy(float))
    low, high = frame[name].min(), frame[name].max()
    x = np.geomspace(low, high, 200) if high > 10 * low else np.linspace(low, high, 200)
    law = fit.predict(**{name: x})
    band(axes, x, [Estimate(*each) for each in zip(*law, strict=True)], LOOK.law, f"law ({fit.level:.0%})")
    if high > 10 * low:
        log_axis(axes.xaxis, power if name == "C" else short)
    values = frame[output]
    if output != "error" and values.max() > 10 * values.min():
        log_axis(axes.yaxis)
    elif output == "loss":
        loss_axis(axes)
    axes.set(xlabel=LABELS.get(name, name), ylabel=LABELS.get(output, output))
    return finished(figure, conventions(fit))


@styled
def envelope(fit: EnvelopeFit) -> "Figure":
    """Training curves and the lowest of them at each compute; below, the size that is lowest there."""
    figure, (top, bottom) = blank("Envelope of training curves", 6.2, (3, 2))
    for index, (_, run) in enumerate(fit.points.frame.groupby(fit.points.clusters)):
        label = "training curves" if index == 0 else None
        top.plot(run["C"], run["loss"], color=LOOK.faint, linewidth=0.9, label=label)
    frontier = fit.frontier
    top.plot(frontier["C"], frontier["loss"], ".", color=LOOK.forecast, markersize=3, label="envelope")
    bottom.plot(frontier["C"], frontier["N"], ".", color=LOOK.forecast, markersize=3)
    budgets = np.geomspace(frontier["C"].min(), frontier["C"].max(), 40)
    text = f"N ∝ C$^{{{fit.parameters['a'].value:.2f}}}$"
    band(bottom, budgets, [fit.optimum(budget).N for budget in budgets], LOOK.law, text)
    for axes, label in ((top, LOSS), (bottom, SIZES)):
        log_axis(axes.xaxis, power)
        axes.set(ylabel=label)
    loss_axis(top)
    log_axis(bottom.yaxis)
    bottom.set_xlabel(COMPUTE)
    return finished(figure, of_optima(fit.conventions))


@styled
def residuals(fit: Fit, outcomes: Sequence[Outcome] = ()) -> "Figure":
    """What the law leaves unexplained, against each of its inputs: a trend means that the law is wrong."""
    names = [name for name in fit.law.inputs if name != RECIPE]
    figure, panels = blank("Residuals of the law", 1.1 + 1.9 * len(names), (1,) * len(names))
    left, spread = 100 * fit.residuals, 100 * np.sqrt(np.mean(fit.residuals**2))
    for axes, column in zip(panels, names, strict=True):
        axes.axhline(0.0, color=LOOK.ink, linewidth=0.8)
        _runs(axes, fit.points.frame, column, left)
        axes.axhspan(-spread, spread, color=LOOK.law, alpha=0.15, linewidth=0, label=f"rms {spread:.2g}%")
        for made, check in outcomes:
            place = {"N": made.N, "D": made.D, "C": made.C, "M": made.D / made.N}.get(column)
            if check and place:
                error = 100 * (np.log(check.measured) - fit.extrapolate(made.N, made.D, made.C)[0])
                axes.plot(place, error, "*", color=LOOK.ink, markersize=11, label="hold-out")
        log_axis(axes.xaxis, power if column == "C" else short)
        bound = 1.15 * max(np.abs(axes.get_ylim()))
        axes.set(xlabel=LABELS.get(column, column), ylabel="residual [%]", ylim=(-bound, bound))
    return finished(figure, conventions(fit) + " Residual: ln measured − ln fitted.")


@styled
def minima_residuals(fit: IsoflopFit) -> "Figure":
    """What Approach 2 leaves unexplained: runs beside their curves, and minima beside their power laws."""
    figure, (top, *lines) = blank("Residuals of Approach 2", 6.8, (1, 1, 1))
    curves = sorted(fit.accepted, key=lambda curve: curve.C)
    colours = LOOK.colours(len(curves))
    for curve, colour, marker in zip(curves, colours, _cycled(len(curves)), strict=True):
        left = 100 * np.log(curve.losses / curve.predict(curve.sizes))[curve.used]
        shape = dict(color=colour, linestyle="none", markersize=5)
        top.plot(curve.sizes[curve.used], left, marker, label=f"{power(curve.C)} FLOPs", **shape)
        for axes, name in zip(lines, ("N", "loss"), strict=True):
            law = getattr(fit.optimum(curve.C), name).value
            axes.plot(curve.C, 100 * np.log(getattr(curve, name) / law), marker, **shape)
    top.set(xlabel=SIZES, ylabel="loss beside\nits curve [%]")
    for axes, name in zip(lines, ("N_opt", "loss"), strict=True):
        axes.set(xlabel=COMPUTE, ylabel=f"{name} beside\nits power law [%]")
    for axes, text in zip((top, *lines), (short, power, power), strict=True):
        axes.axhline(0.0, color=LOOK.ink, linewidth=0.8)
        log_axis(axes.xaxis, text)
        bound = 1.15 * max(np.abs(axes.get_ylim()))
        axes.set_ylim(-bound, bound)
    return finished(figure, f"{of_optima(fit.conventions)} Residual: ln found − ln fitted.")


@styled
def comparison(rows: Sequence[Compared]) -> "Figure":
    """What each law misses of every budget that it was fitted without."""
    series = [
        Series(
            row.law,
            [test.C for test in row.held_out],
            [100 * test.rms for test in row.held_out],
            group=row.law,
        )
        for row in rows
    ]
    lines = [dataclasses.replace(each, label=None, mark=":") for each in series]
    last = "missed of a budget left out, rms [%]"
    note = " ".join(f"{row.law}: {conventions(row.fit)} AICc {row.aicc:.1f}." for row in rows)
    return draw("Laws compared", [Panel(COMPUTE, last, [*series, *lines])], note)


@styled
def multiplier(fit: Fit) -> "Figure":
    """The runs of two recipes, and the frontier of each by the law that shares E and exponents."""
    figure, (axes,) = blank("Compute multiplier", 4.6)
    points = fit.points.frame.assign(C=fitted_flops(fit))
    budgets = np.geomspace(points["C"].min(), points["C"].max(), 60)
    ((column, names),) = fit.conventions["recipes"].items()
    rows = zip(names, CODES, (LOOK.forecast, LOOK.law), "os", strict=True)
    for name, value, colour, marker in rows:
        mine = points[points[RECIPE] == value]
        axes.plot(mine["C"], mine["loss"], marker, color=colour, markersize=4, label=f"{column}={name}")
        best = zip(*best_loss(fit, budgets, value == CODES[1]), strict=True)
        band(axes, budgets, list(map(Estimate._make, best)), colour, f"its frontier ({fit.level:.0%})")
    log_axis(axes.xaxis, power)
    loss_axis(axes)
    axes.set(xlabel=COMPUTE, ylabel=LABELS["loss"])
    value, low, high, _ = fit.parameters["multiplier"]
    interval = f" ({fit.level:.0%} interval {low:.3g} to {high:.3g})" if np.isfinite(low) else ""
    told = f"{names[1]} reaches with C what {names[0]} reaches with {value:.3g} C{interval}."
    return finished(figure, f"{told} {conventions(fit)}")


def of_optima(terms: Mapping[str, Any]) -> str:
    """What the numbers of Approach 1 or 2 mean, in a line or two."""
    method = METHODS.get(terms.get("method"), "lowest of all training curves")
    window = f" (at most {2 * (terms['window'] // 2) + 1})" if terms.get("window") else ""
    kept = f" Runs where {terms['where']}." if terms["where"] else ""
    how = f"{method}{window}, {terms['on']}; {terms['reduction']}"
    compute = f"C = {terms['flops_per_nd']:g} N D where not given."
    return f"N: {terms['N']}. {how[0].upper()}{how[1:]}; {compute}{kept}"


def conventions(fit: Fit) -> str:
    """What a figure's numbers mean, in a line or two."""
    terms, inputs = fit.conventions, set(fit.law.inputs)
    on = terms["on"].replace("the loss", {"loss": "the loss"}.get(fit.law.output, fit.law.output))
    law = f"{pretty(fit.law.formula)}, {terms['loss']} on {on}, {terms['reduction']}"
    best = f"; best N and D at C = {terms['flops_per_nd']:g} N D" if {"N", "D"} <= inputs else ""
    counting = f"N: {terms['N']}. " if inputs & {"N", "C", "M"} else ""
    kept = f" Runs where {terms['where']}." if terms["where"] else ""
    return f"{counting}{law}{best}.{kept}"


def pretty(formula: str) -> str:
    """A law's formula with Greek letters and simple exponents raised, as plain text."""
    for written, raised in (("alpha", "ᵅ"), ("beta", "ᵝ"), ("a", "ᵃ")):
        formula = re.sub(rf"\^{written}\b", raised, formula)
    for name, letter in (("alpha", "α"), ("beta", "β"), ("gamma", "γ"), ("eta", "η")):
        formula = re.sub(rf"(?<![A-Za-z]){name}(?![A-Za-z])", letter, formula)
    return formula


def _cycled(count: int) -> list[str]:
    return [MARKERS[index % len(MARKERS)] for index in range(count)]


def _runs(axes: "Axes", points: pd.DataFrame, column: str, y: np.ndarray) -> None:
    """The fitted runs, a colour and a shape for each budget where the table tells budgets."""
    if "budget_flops" not in points or points["budget_flops"].isna().all():
        size = 5 if len(points) < 100 else 3
        axes.plot(points[column], y, "o", color=LOOK.colours(1)[0], markersize=size, label="runs", zorder=2)
        return
    budgets = np.unique(points["budget_flops"])
    for budget, colour, marker in zip(
        budgets, LOOK.colours(len(budgets)), _cycled(len(budgets)), strict=True
    ):
        mine = (points["budget_flops"] == budget).to_numpy()
        shape = dict(color=colour, markersize=5.5, mec=LOOK.paper, mew=0.5, zorder=3)
        axes.plot(points[column][mine], y[mine], marker, label=f"{power(budget)} FLOPs", **shape)


def _strip(axes: "Axes", outcome: Outcome) -> None:
    """Forecast and hold-out on a line of their own: a bar for each level, the widest thinnest."""
    made, check = outcome
    levels = sorted(made.intervals)
    for level, width in zip(levels, (7.0, 3.0, 1.5), strict=False):
        axes.hlines(0, *made.intervals[level], color=LOOK.forecast, linewidth=width, alpha=0.55)
    label = f"forecast ({' and '.join(f'{level:.0%}' for level in levels)})"
    shape = dict(color=LOOK.forecast, markersize=8, mfc=LOOK.paper, linestyle="none")
    axes.plot(made.loss, 0, "D", label=label, **shape)
    if check:
        axes.plot(check.measured, 0, "*", color=LOOK.ink, markersize=11, label="hold-out, measured", zorder=5)
    title = f"{power(made.C)} FLOPs, {made.extrapolation:.2g}× the largest fitted budget"
    axes.set_title(title, loc="left", fontsize=9.5)
    shown = padded(made.intervals[levels[-1]], [check.measured] if check else [], share=0.2)
    axes.set(yticks=[], xlim=shown, xlabel="loss [nats/token]")
    axes.spines["left"].set_visible(False)
