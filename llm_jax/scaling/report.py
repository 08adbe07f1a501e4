"""The report of a sweep in N and D: what its page (page.py) shows, and the same as text.

result = report.Report(title, runs, law, isoflop, outcomes, rates)
print(report.summary(result))
path = report.write(folder, result)
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from llm_jax import files, records
from llm_jax.scaling import figures, page, sensitivity, style
from llm_jax.scaling.curves import METHODS, UNFITTED, Curve, curve_of
from llm_jax.scaling.forecast import Outcome, fitted_flops, miss
from llm_jax.scaling.isoflop import IsoflopFit
from llm_jax.scaling.page import Answer, Drawing, Fitted, Page, Table, Tile
from llm_jax.scaling.powers import FORMULAS
from llm_jax.scaling.rates import RateCheck
from llm_jax.scaling.results import Estimate, Fit
from llm_jax.scaling.trunks import savings

GREEK = {"alpha": "α", "beta": "β"}


@dataclasses.dataclass(frozen=True)
class Report:
    """All that a report tells.

    runs: every run of the sweep, those that no fit used too, with the columns name, role, status, N, D, C,
    loss and whatever else result.json has. isoflop: None where no budget had a minimum (say why in
    `warnings`). rates: checks of the learning rate. backtests: lines on how the laws fared on budgets that
    they were not fitted to. conventions, notes: lines of the plan. curves: a table a
    run of C and loss as it trained (`training_curves`).
    """

    title: str
    runs: pd.DataFrame
    law: Fit
    isoflop: IsoflopFit | None = None
    outcomes: Sequence[Outcome] = ()
    rates: Sequence[RateCheck] = ()
    backtests: Sequence[str] = ()
    question: str = ""
    conventions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    curves: Sequence[pd.DataFrame] = ()

    @property
    def fits(self) -> list[Fit | IsoflopFit]:
        return [self.law, *([self.isoflop] if self.isoflop else [])]

    @functools.cached_property
    def hangs_on(self) -> dict[str, Any]:
        """What the law hangs on, and each budget predicted by the others (sensitivity.py)."""
        return sensitivity.facts(self.law)

    @property
    def rate_doubts(self) -> list[str]:
        """What the rate checks object to; the exponents are marked with it."""
        return [str(check) for check in self.rates if check.doubtful]

    @property
    def too_small(self) -> str:
        return too_small(self.law)

    @property
    def misses(self) -> list[str]:
        """The fits that fail at a hold-out."""
        checked = [(made, check.measured) for made, check in self.outcomes if check]
        found = (miss(fit, made, measured) for fit in self.fits for made, measured in checked)
        return [text for text in found if text]

    @property
    def all_warnings(self) -> list[str]:
        """The caller's, failures at the hold-out, the rate checks', then the fits', each once."""
        fitted = (f"Approach {fit.approach}: {text}" for fit in self.fits for text in fit.warnings)
        doubts = (f"{text}. The exponents are marked †." for text in self.rate_doubts)
        return list(dict.fromkeys([*self.warnings, *self.misses, *doubts, *fitted]))


def too_small(law: Fit) -> str:
    """Why a law's points are too few to judge it by, in a sentence; empty where they aren't.

    Points that were not planned by budgets have none to count.
    """
    points, needed = law.points.frame, 3 * law.free
    budgets = (points["budget_flops"].nunique() if "budget_flops" in points else 0) or 3
    if len(points) >= needed and budgets >= 3:
        return ""
    at = f" at {budgets} budget{'s' * (budgets != 1)}" if budgets < 3 else ""
    return (
        f"This sweep is too small to judge the law by: {len(points)} runs{at} for {law.free} parameters, "
        f"where {needed} at 3 budgets are the least. It shows that everything runs; its numbers mean little."
    )


def write(folder: str | pathlib.Path, report: Report) -> pathlib.Path:
    """Writes report.html and a PNG of every figure to `folder`; returns the page's path."""
    excluded = excluded_table(report)
    return page.write(
        folder,
        Page(
            title=report.title,
            question=report.question,
            caution=report.too_small,
            tiles=list(tiles(report)),
            answers=list(map(verdict, report.outcomes)),
            warnings=report.all_warnings,
            figures=list(drawings(report)),
            fits=[fitted(fit, "†" if report.rate_doubts else "") for fit in report.fits],
            tables=[*tables(report), *([("Left out of the fits", excluded)] if excluded else [])],
            conventions=conventions(report),
            notes=[*report.backtests, *report.notes],
        ),
    )


def summary(report: Report) -> str:
    """The report as text for a terminal: runs, fits, forecasts against measured, checks, warnings."""
    parts = [
        report.title,
        *([report.too_small] if report.too_small else []),
        str(runs_table(report, TERMINAL)),
    ]
    parts += [fit.table() for fit in report.fits]
    parts += ["\n".join(verdict(outcome)[:2]) for outcome in report.outcomes]
    parts += ["\n".join(report.backtests)] if report.backtests else []
    parts += ["\n".join(map(str, report.rates))] if report.rates else []
    warnings = [f"WARNING: {text}" for text in (*report.warnings, *report.misses)]
    parts += ["\n".join(warnings)] if warnings else []
    return "\n\n".join(parts)


def facts(report: Report) -> dict[str, Any]:
    """The report's numbers as JSON values, for result.json."""
    return {
        "law": report.law.to_json() | report.hangs_on,
        "isoflop": report.isoflop.to_json() if report.isoflop else None,
        "forecasts": [outcome.to_json() for outcome in report.outcomes],
        "rates": [str(check) for check in report.rates],
        "warnings": report.all_warnings,
    }


def training_curves(folder: str | pathlib.Path, runs: pd.DataFrame) -> list[pd.DataFrame]:
    """C and training loss of every run of `runs` (columns run, steps, C) as its records in `folder` tell.

    The loss is the mean over a tenth of the run, as one batch says little.
    """
    out = []
    places = [files.path(folder, run) for run in runs["run"]]
    for run, rows in zip(runs.itertuples(), files.each(records.metrics, places, folder), strict=True):
        if "loss" not in rows:
            continue
        rows = rows.dropna(subset="loss")
        window = max(1, len(rows) // 10)
        smooth = rows["loss"].rolling(window).mean()
        every = max(1, len(rows) // 200)
        curve = pd.DataFrame({"C": run.C * rows["step"] / run.steps, "loss": smooth}).dropna()
        out.append(curve.iloc[::every])
    return out


def verdict(outcome: Outcome) -> Answer:
    """How a forecast fared, in a line, and what it said when it was written, in another."""
    made, check = outcome
    beyond = f"{made.extrapolation:.2g}x the largest fitted budget"
    if check:
        off = f"{check.relative_error:+.2%}, {check.in_noise:+.1f} of the noise of one run"
        if check.in_seed_noise is not None:
            off += f", {check.in_seed_noise:+.1f} of that between seeds"
        measured = f"measured {check.measured:.4f}, forecast {made.loss:.4f} ({off})"
        headline = f"Hold-out at {beyond}: {measured}, {coverage(outcome)}."
    else:
        headline = f"Hold-out at {beyond}: forecast {made.loss:.4f}, {coverage(outcome)}."
    ranges = ", ".join(
        f"{q:.0%} [{low:.4f}, {high:.4f}]" for q, (low, high) in sorted(made.intervals.items())
    )
    written = made.written_utc.replace("T", " ").replace("+00:00", " UTC")
    at = f"C {style.flops(made.C)}, N {style.short(made.N)}, D {style.short(made.D)}"
    return Answer(
        headline,
        f"Forecast of {written} at {at}: {made.loss:.4f} nats/token, {ranges}; {made.method}.",
        check is None or any(check.covered.values()),
    )


def coverage(outcome: Outcome) -> str:
    """Which of the forecast's intervals holds the measured loss."""
    if outcome.check is None:
        return "not measured yet"
    levels = sorted(outcome.check.covered.items())
    inside = [f"inside the {level:.0%} interval" for level, covered in levels if covered]
    outside = [f"OUTSIDE the {level:.0%} interval" for level, covered in levels if not covered]
    return ", ".join(outside + inside[:1]) if inside else "OUTSIDE every interval"


# ---- the parts of the page ----


def drawings(report: Report) -> Iterator[Drawing]:
    """Every figure."""
    law, isoflop, outcomes = report.law, report.isoflop, report.outcomes
    reach = max((made.C for made, _ in outcomes), default=0.0)
    curves, terms = isoflop_curves(report)
    if curves:
        yield Drawing(
            "isoflop",
            "Every budget's runs by size; the curve's minimum is the best size there.",
            figures.isoflop_curves(curves, terms, isoflop.open_ends if isoflop else ""),
        )
    yield Drawing(
        "frontier",
        "Every run's loss by its compute, and the best that the law allows"
        + ("; below, the forecast and what was measured." if outcomes else "."),
        figures.frontier(law, outcomes, report.curves),
    )
    yield Drawing(
        "optima",
        "How the best size and the best number of tokens grow with compute.",
        figures.optima(isoflop, law, reach=reach),
    )
    yield Drawing(
        "residuals",
        "What the law leaves unexplained; points should scatter without a trend.",
        figures.residuals(law, outcomes),
    )


def isoflop_curves(report: Report) -> tuple[Sequence[Curve], Mapping[str, Any]]:
    """The curves of Approach 2 and their conventions; where it was refused, the curves that it refused."""
    if report.isoflop:
        return report.isoflop.curves, report.isoflop.conventions
    points = report.law.points.frame.assign(C=fitted_flops(report.law))
    budgets = points.groupby("budget_flops") if "budget_flops" in points else ()
    terms = {**UNFITTED, **{name: report.law.conventions[name] for name in ("N", "flops_per_nd", "where")}}
    return [curve_of(group, "parabola", 5) for _, group in budgets if group["N"].nunique() >= 3], terms


def tiles(report: Report) -> Iterator[Tile]:
    """The numbers to see first."""
    mark = "†" if report.rate_doubts else ""
    for fit in reversed(report.fits):
        if "a" in fit.parameters:
            a = fit.parameters["a"]
            label = f"N_opt ∝ C^a, Approach {fit.approach}"
            yield Tile(f"{a.value:.3f}{mark}", label, _interval(a, fit.level))
    if "E" in report.law.parameters:
        E = report.law.parameters["E"]
        yield Tile(f"{E.value:.3f}", "irreducible loss E [nats/token]", _interval(E, report.law.level))
    for made, check in report.outcomes:
        label = f"hold-out at {made.extrapolation:.2g}x, against its forecast"
        value = f"{check.relative_error:+.2%}" if check else f"{made.loss:.3f}"
        yield Tile(value, label, coverage(Outcome(made, check)))


def fitted(fit: Fit | IsoflopFit, mark: str = "") -> Fitted:
    """A fit's parameters with their intervals; `mark` stands at its exponents."""
    rows = []
    for name, estimate in fit.parameters.items():
        shown = GREEK.get(name, name) + (mark if name in ("a", "b", "alpha", "beta") else "")
        rows.append([shown, *(_digits(part) for part in estimate)])
    table = Table(["", "value", f"{fit.level:.0%} low", "high", "std. error"], rows)
    if fit.approach == 2:
        return Fitted(f"Approach 2: {FORMULAS}", table, f"{METHODS[fit.conventions['method']]}.")
    rms = np.sqrt(np.mean(fit.residuals**2))
    derived = set(fit.parameters) - {parameter.name for parameter in fit.law.parameters}
    optima = "; N_opt ∝ C^a, D_opt ∝ C^b" if {"a", "b"} <= derived else ""
    note = f"{len(fit.residuals)} runs, residuals {rms:.2%} rms{optima}."
    return Fitted(f"Approach 3: {figures.pretty(fit.law.formula)}", table, note)


def tables(report: Report) -> Iterator[tuple[str, Table]]:
    """The other tables of the page: minima, rate checks, sensitivity, runs."""
    if report.isoflop:
        header = ["C", "runs", "N_opt", "low", "high", "D_opt", "loss", ""]
        rows = []
        for curve, best in zip(report.isoflop.curves, report.isoflop.optima, strict=True):
            sizes = [style.short(part) for part in (*best["N"][:3], curve.D)]
            cells = [style.flops(curve.C), str(len(curve.sizes)), *sizes, _digits(curve.loss), curve.refused]
            rows.append(cells)
        yield "Minima of the isoFLOP curves", Table(header, rows, (0, 7))
    if report.rates:
        multiples = sorted({m for check in report.rates for m in check.losses})
        at = [f"{m:g}x the rate" for m in multiples]
        header = ["N", "D", *at, "seed spread", "s.e. of a difference", ""]
        rows = [
            [
                style.short(c.N),
                style.short(c.D),
                *(_digits(np.mean(c.losses[m])) for m in multiples),
                f"{c.spread:.4f}",
                f"{c.error:.4f}",
                c.verdict,
            ]
            for c in report.rates
        ]
        yield "Learning-rate checks", Table(header, rows, (0, len(header) - 1))
    changed = report.hangs_on["sensitivity"]
    rows = [[c["change"], str(c["runs"]), *(f"{v:.4g}" for v in c["values"].values())] for c in changed]
    told = sensitivity.left_out(report.hangs_on)
    title = f"What the law hangs on{f' ({told})' * bool(told)}"
    yield title, Table(["", "runs", *changed[0]["values"]], rows)
    yield f"All {len(report.runs)} runs", runs_table(report)


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "name": ("run", str),
    "loss": ("loss", lambda v: f"{v:.4f}"),
    "residual": ("vs law", lambda v: f"{v:+.2%}"),
    "N": ("N", style.short),
    "D": ("D", style.short),
    "ratio": ("D/N", lambda v: f"{v:.3g}"),
    "C": ("C", style.flops),
    "loss_standard_error": ("loss s.e.", lambda v: f"{v:.4f}"),
    "bits_per_byte": ("bits/byte", lambda v: f"{v:.4f}"),
    "width": ("width", lambda v: f"{v:.0f}"),
    "layers": ("layers", lambda v: f"{v:.0f}"),
    "learning_rate": ("rate", lambda v: f"{v:.2e}"),
    "seed": ("seed", lambda v: f"{v:.0f}"),
    "steps": ("steps", lambda v: f"{v:,.0f}"),
    "tokens_per_second": ("tokens/s", lambda v: f"{v:,.0f}"),
    "wall_seconds": ("seconds", lambda v: f"{v:,.0f}"),
    "role": ("role", str),
    "status": ("status", str),
}
CONFIG_FIELDS = ("model.width", "model.layers", "optimizer.learning_rate")
TERMINAL = (
    "name",
    "status",
    "N",
    "D",
    "ratio",
    "loss",
    "residual",
    "learning_rate",
    "tokens_per_second",
    "wall_seconds",
)


def runs_table(report: Report, columns: Sequence[str] = tuple(COLUMNS)) -> Table:
    """The runs, in the columns that the table has; what a run doesn't know is empty.

    A config's field goes by its last name: the column model.width is `width` here.
    """
    short = {name: name.rpartition(".")[2] for name in CONFIG_FIELDS}
    runs = report.runs.rename(columns={k: v for k, v in short.items() if v not in report.runs})
    rank = runs["role"].map({"grid": 0, "holdout": 2}).fillna(1)
    budget = runs["budget_flops"] if "budget_flops" in runs else runs["C"]
    runs = runs.assign(ratio=runs["D"] / runs["N"], rank=rank, budget=budget)
    runs = runs.sort_values(["rank", "budget", "N", "name"])
    law = report.law.predict(N=runs["N"].astype(float), D=runs["D"].astype(float)).value
    runs["residual"] = runs["loss"].astype(float) / law - 1
    shown = [name for name in columns if name in runs and runs[name].notna().any()]
    cells = [["" if pd.isna(v) else COLUMNS[name][1](v) for v in runs[name]] for name in shown]
    texts = tuple(index for index, name in enumerate(shown) if name in ("name", "role", "status"))
    return Table([COLUMNS[name][0] for name in shown], [list(row) for row in zip(*cells, strict=True)], texts)


def excluded_table(report: Report) -> Table | None:
    """Runs that the fits left out, with the reason."""
    rows = {(run.run, run.reason) for fit in report.fits for run in fit.points.excluded}
    return Table(["run", "reason"], [list(row) for row in sorted(rows)], (0, 1)) if rows else None


def conventions(report: Report) -> dict[str, str]:
    """The plan's own, then what was fitted how, and on which machine."""
    law = report.law.conventions
    told = dict(report.conventions) | {
        "N counts": str(law["N"]),
        "C": f"{law['flops_per_nd']:g} N D where the law chooses N and D",
        "loss minimised": f"{law['loss']} on {law['on']}, {law['reduction']}",
        "intervals": f"{report.law.level:.0%}, {len(report.law.draws)} bootstrap refits",
    }
    if saved := savings(report.runs):
        told["trunks"] = str(saved)
    for column in ("device", "git_revision"):
        if column in report.runs:
            told[column.replace("_", " ")] = ", ".join(sorted({str(v) for v in report.runs[column].dropna()}))
    return told


def _digits(value: Any) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.5g}"


def _interval(number: Estimate, level: float) -> str:
    return f"{level:.0%}: {number.low:.3f} to {number.high:.3f}" if math.isfinite(number.low) else ""
