"""Fits a scaling law to any table of runs.

    python -m llm_jax.scaling.fit --points=points.csv --law=chinchilla --predict=C=1e21 --out=fits/mine
    python -m llm_jax.scaling.fit --points=points.csv --approach=2
    python -m llm_jax.scaling.fit --points=points.csv --predict=loss=2.1 --inference_tokens=1e13
    python -m llm_jax.scaling.fit --points=points.csv --compare=chinchilla,kaplan
    python -m llm_jax.scaling.fit --points=points.csv --multiplier=optimizer

Prints parameters with intervals, predictions, what the fit hangs on, what was left out and what to be wary
of; with --out writes fit.json and figures. The library behind it is llm_jax.scaling.fits.
"""

import contextlib
import functools
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from absl import flags

from llm_jax import files
from llm_jax.command_line import run_main
from llm_jax.config import UserError
from llm_jax.files import with_nulls, write_atomically
from llm_jax.scaling import compare, laws, sensitivity
from llm_jax.scaling.curves import METHODS
from llm_jax.scaling.envelope import EnvelopeFit
from llm_jax.scaling.fits import AnyFit, fit
from llm_jax.scaling.isoflop import IsoflopFit
from llm_jax.scaling.law import Law
from llm_jax.scaling.questions import Answer, answer, answers, check
from llm_jax.scaling.reading import numbers, pairs, read_points
from llm_jax.scaling.results import Fit, row, written

LAWS = ("3", "vp")


def define_flags() -> None:
    """The command's flags; in a function, so that importing this module claims no names."""
    flags.DEFINE_string("points", None, "table with columns N, D, loss (.csv, .parquet, .json, .jsonl)")
    flags.DEFINE_enum(
        "approach", "3", ["1", "2", "3", "vp"],
        "3: a law of the loss; vp: by variable projection; 2: isoFLOP minima; 1: training-curve envelope",
    )  # fmt: skip
    flags.DEFINE_string("law", "chinchilla", f"one of {', '.join(Law.members)}, or FILE.py:Name")
    flags.DEFINE_string(
        "loss", "huber:1e-3", "what is minimised: huber:DELTA, lad, l2, asymmetric:SHARE[:DELTA]"
    )
    flags.DEFINE_string("on", "log", "residuals of ln L (log) or of L (raw)")
    flags.DEFINE_float("delta", None, "short for --loss=huber:DELTA")
    flags.DEFINE_string("weights", None, "weight of a run, a column or an expression such as '1/std**2'")
    flags.DEFINE_string("fix", "", "parameters that are given, as in E=1.69")
    flags.DEFINE_string("tie", None, "parameters that equal another, as in beta=alpha")
    flags.DEFINE_string("bounds", "", "ranges of parameters, as in E=0.5:3,alpha=0:1")
    flags.DEFINE_float("flops_per_nd", 6.0, "C / (N D)", 1e-9)
    flags.DEFINE_string("method", "local", f"Approach 2: one of {', '.join(METHODS)}")
    flags.DEFINE_integer("window", 5, "Approach 2: sizes that a local parabola passes")
    flags.DEFINE_integer(
        "bootstrap", 1000, "refits that the intervals come from, at least 100; 0: no intervals"
    )
    flags.DEFINE_float("level", 0.9, "what share of the refits an interval holds", 0.01, 0.999)
    flags.DEFINE_integer("seed", 0, "of the bootstrap", lower_bound=0)
    flags.DEFINE_string("columns", "", "names of your columns, as in N=params,D=tokens,loss=final_loss")
    flags.DEFINE_string("where", None, "which rows to fit, as in 'D > 20*N and `final loss` < 3'")
    flags.DEFINE_string("counting", "as given in the table", "what N counts; kept with the result")
    flags.DEFINE_multi_string(
        "predict", [], "loss at N=1e9,D=2e10, optimum at C=1e21, cheapest run to loss=2.1; may be repeated"
    )
    flags.DEFINE_float(
        "inference_tokens", 0.0, "what the run of --predict=loss=... serves after it is trained", 0.0
    )
    flags.DEFINE_list("compare", [], "laws to compare on this table, as in chinchilla,kaplan")
    flags.DEFINE_string(
        "multiplier", None, "column that names two recipes: how much compute the second saves"
    )
    flags.DEFINE_string("out", None, "folder for fit.json and figures")


# What is asked of a fit whatever the approach; the other flags belong to some approaches only.
COMMON = ("where", "counting", "flops_per_nd")
BELONGS = {
    **dict.fromkeys(("law", "loss", "on", "delta", "fix", "tie", "bounds"), LAWS),
    **dict.fromkeys(("compare", "multiplier"), LAWS),
    "weights": ("2", *LAWS),
    "method": ("2",),
    "window": ("2",),
}


def main() -> None:
    """Reads the flags, fits, prints, writes."""
    f = flags.FLAGS
    if not f.points:
        raise UserError("--points is missing, for example --points=points.csv (columns N, D, loss)")
    if f.out:
        check_folder(files.path(f.out))
    questions = [numbers(text, "predict") for text in f.predict]
    if f.bootstrap < 0 or 0 < f.bootstrap < 100:
        raise UserError(f"--bootstrap={f.bootstrap}: intervals take 100 refits or more; 0 is without")
    for name in ("inference_tokens", "flops_per_nd", "level", "delta"):
        if not abs(f[name].value or 0.0) <= 1e30:  # absl lets NaN pass every bound
            raise UserError(f"--{name}={f[name].value:g} is no number that a fit could use")
    if f.inference_tokens and not any("loss" in question for question in questions):
        raise UserError("--inference_tokens needs the loss to reach: --predict=loss=2.1")
    options = _options()
    names = f.compare or ([options["law"]] if "law" in options else [])
    for question in questions:
        for law in map(laws.law, names) if names else [None]:
            check(question, law, f.approach, f.flops_per_nd)
    points = read_points(f.points)
    if f.compare:
        rows = compare.compare(points, f.compare, **{k: v for k, v in options.items() if k != "law"})
        asked = [(row, question) for row in rows for question in questions]
        found = [(row, answer(row.fit, question, f.inference_tokens)) for row, question in asked]
        text = compare.compared_table(rows)
        told = [Answer(f"{a.asked} by {row.law}", a.numbers) for row, a in found]
        content = {"schema": 1, "compared": [row.to_json() for row in rows]}
        _show(text, told, content, lambda figures: {"compared": figures.comparison(rows)})
        return
    if f.multiplier:
        result, text = compare.multiplier(points, options.pop("law"), f.multiplier, **options)
    else:
        result, text = fit(points, **({"approach": f.approach} | options)), ""
    told, refused = [], []
    for question in questions:
        try:
            told += answers(result, question, f.inference_tokens)
        except UserError as error:  # told last: the fit itself stands
            refused.append(error)
    hangs_on = sensitivity.facts(result) if not isinstance(result, EnvelopeFit) else {}
    content = result.to_json() | hangs_on
    if f.multiplier:
        number = result.parameters["multiplier"]._asdict()
        content |= {"multiplier": number | {"column": f.multiplier, "text": text}}
    parts = [result.table(), text, sensitivity.table(hangs_on) if hangs_on else ""]
    _show("\n\n".join(filter(None, parts)), told, content, lambda figures: drawings(figures, result))
    if f.out and not isinstance(result, Fit):  # a table for --law=power, n-opt or d-opt
        write_atomically(files.path(f.out) / "optima.csv", result.frontier.to_csv(index=False))
        print(f"written: {files.path(f.out) / 'optima.csv'}")
    if refused:
        raise refused[0]


def drawings(figures: ModuleType, result: AnyFit) -> dict[str, Any]:
    """Every figure of a fit, by the name of its file."""
    if isinstance(result, IsoflopFit):
        curves = figures.isoflop_curves(result.curves, result.conventions, result.open_ends)
        optima, residuals = figures.optima(result, None), figures.minima_residuals(result)
        return {"isoflop": curves, "optima": optima, "residuals": residuals}
    if isinstance(result, EnvelopeFit):
        return {"envelope": figures.envelope(result)}
    drawn = {"residuals": figures.residuals(result)}
    if "recipes" in result.conventions:
        drawn |= {"multiplier": figures.multiplier(result)}
    elif len(result.law.inputs) == 1:
        drawn |= {"curve": figures.curve(result)}
    elif set(result.law.inputs) == {"N", "D"}:
        drawn |= {"frontier": figures.frontier(result), "optima": figures.optima(None, result)}
    return drawn


def _show(
    text: str,
    answers: Sequence[Answer],
    content: Mapping[str, Any],
    draw: Callable[[ModuleType], Mapping[str, Any]],
) -> None:
    """Prints what was found, and with --out writes fit.json and the figures as PNGs."""
    parts = [text]
    for asked, found, doubt in answers:
        lines = [f"at {asked}", *(row(name, number) for name, number in found.items())]
        parts.append("\n".join([*lines, f"WARNING: {doubt}"] if doubt else lines))
    told = "\n\n".join(parts)
    if not flags.FLAGS.out:
        print(told)
        return
    from llm_jax.scaling import figures, style  # matplotlib, only where files are asked for

    predictions = [
        {"at": asked} | {k: e._asdict() for k, e in found.items()} | ({"doubt": doubt} if doubt else {})
        for asked, found, doubt in answers
    ]
    folder = files.path(flags.FLAGS.out)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "fit.json"]
    write_atomically(paths[0], written(with_nulls(dict(content) | {"predictions": predictions})) + "\n")
    for name, figure in draw(figures).items():
        paths.append(folder / f"{name}.png")
        paths[-1].write_bytes(style.png(figure))
    print(f"{told}\n\nwritten: {', '.join(map(str, paths))}")  # last: who reads may leave


def check_folder(folder: pathlib.Path) -> None:
    """Raises UserError where `folder` can't be made or written to; what it made to see is taken away."""
    whole = folder.absolute()
    made = [place for place in (whole, *whole.parents) if not (files.in_bucket(whole) or place.exists())]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.check_writable(folder)
    except OSError as error:
        raise UserError(f"--out={folder} can't be a folder to write in: {error.strerror}") from None
    finally:
        for place in made:
            with contextlib.suppress(OSError):
                place.rmdir()


def _options() -> dict[str, Any]:
    """What the flags ask of the fit; UserError for a flag of another approach."""
    f = flags.FLAGS
    for name, approaches in BELONGS.items():
        if f[name].present and f.approach not in approaches:
            kinds = " and ".join(approaches)
            raise UserError(f"--{name} belongs to Approach {kinds}, this is --approach={f.approach}")
    if f.approach == "vp" and (f["loss"].present or f["on"].present or f["delta"].present):
        raise UserError("--approach=vp is least squares of L itself; --loss and --on belong to --approach=3")
    options = {name: f[name].value for name in COMMON} | {"columns": pairs(f.columns, "columns")}
    if f.compare and (f.multiplier or f["law"].present):
        other = "multiplier" if f.multiplier else "law"
        raise UserError(f"--compare fits the laws that it names; --{other} belongs to another question")
    if f.approach == "1":
        return options  # and says why it has no intervals
    options |= {name: f[name].value for name in ("bootstrap", "level", "seed", "weights")}
    if f.approach == "2":
        return options | {"method": f.method, "window": f.window}
    return options | {
        "approach": f.approach,
        "say": functools.partial(print, file=sys.stderr, flush=True),
        "law": f.law,
        "loss": f.loss if f.delta is None else f"huber:{f.delta}",
        "on": f.on,
        "fixed": numbers(f.fix, "fix"),
        "tied": None if f.tie is None else pairs(f.tie, "tie"),
        "bounds": _ranges(f.bounds),
    }


def _ranges(text: str) -> dict[str, tuple[float, float]]:
    """{"E": (0.5, 3.0)} from E=0.5:3."""
    ranges = {}
    for name, value in pairs(text, "bounds").items():
        low, _, high = value.partition(":")
        try:
            ranges[name] = float(low), float(high)
        except ValueError:
            raise UserError(f"--bounds={text}: {value!r} is no range such as 0.5:3") from None
    return ranges


if __name__ == "__main__":
    define_flags()
    run_main(main)
