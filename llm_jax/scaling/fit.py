"""Fits a scaling law to any table of runs.

    python -m llm_jax.scaling.fit --points=points.csv --law=chinchilla --predict=C=1e21 --out=fits/mine

Prints parameters with intervals, predictions, what was left out and what to be wary of; with --out writes
fit.json and figures. The library behind it is llm_jax.scaling.fits.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping

from absl import flags

from llm_jax.config import UserError, run_main
from llm_jax.records import write_atomically
from llm_jax.scaling.curves import METHODS
from llm_jax.scaling.fits import fit
from llm_jax.scaling.isoflop import IsoflopFit
from llm_jax.scaling.laws import Law
from llm_jax.scaling.reading import read_points
from llm_jax.scaling.results import Estimate, Fit, plain, row


def define_flags() -> None:
    """The command's flags; in a function, so that importing this module claims no names."""
    flags.DEFINE_string("points", None, "table with columns N, D, loss (.csv, .parquet, .json, .jsonl)")
    flags.DEFINE_integer("approach", 3, "3: a law of the loss; 2: minima of isoFLOP curves (needs C too)")
    flags.DEFINE_string("law", "chinchilla", f"Approach 3: one of {', '.join(Law.members)}")
    flags.DEFINE_string("loss", "huber:1e-3", "Approach 3: huber:DELTA, lad or l2, of ln of the loss")
    flags.DEFINE_float("delta", None, "short for --loss=huber:DELTA")
    flags.DEFINE_string("fix", "", "Approach 3: parameters that are given, as in E=1.69")
    flags.DEFINE_float("flops_per_nd", 6.0, "Approach 3: C / (N D), for the optimum at a budget", 1e-9)
    flags.DEFINE_string("method", "parabola", f"Approach 2: one of {', '.join(METHODS)}")
    flags.DEFINE_integer("window", 5, "Approach 2: sizes that a local parabola passes")
    flags.DEFINE_integer("bootstrap", 1000, "refits that the intervals come from", lower_bound=0)
    flags.DEFINE_float("level", 0.9, "what share of the refits an interval holds", 0.01, 0.999)
    flags.DEFINE_integer("seed", 0, "of the bootstrap")
    flags.DEFINE_string("columns", "", "names of your columns, as in N=params,D=tokens,loss=final_loss")
    flags.DEFINE_string("where", None, "which rows to fit, as in 'D > 20*N and width < 512'")
    flags.DEFINE_string("counting", "as given in the table", "what N counts; kept with the result")
    flags.DEFINE_multi_string("predict", [], "loss at N=1e9,D=2e10 or optimum at C=1e21; may be repeated")
    flags.DEFINE_string("out", None, "folder for fit.json and figures")


APPROACH_FLAGS = {3: ("law", "loss", "delta", "fix", "flops_per_nd"), 2: ("method", "window")}


def main() -> None:
    """Reads the flags, fits, prints, writes."""
    f = flags.FLAGS
    if f.points is None:
        raise UserError("--points is missing, for example --points=points.csv (columns N, D, loss)")
    if f.out:
        check_folder(pathlib.Path(f.out))
    questions = [_numbers(text, "predict") for text in f.predict]
    options = {name: f[name].value for name in ("bootstrap", "level", "seed", "where", "counting")}
    options["columns"] = _pairs(f.columns, "columns")
    for name in APPROACH_FLAGS.get(5 - f.approach, ()):
        if f[name].present:
            raise UserError(f"--{name} belongs to Approach {5 - f.approach}, this is --approach={f.approach}")
    if f.approach == 2:
        options |= {"method": f.method, "window": f.window}
    else:
        loss = f.loss if f.delta is None else f"huber:{f.delta}"
        options |= {
            "law": f.law,
            "loss": loss,
            "fixed": _numbers(f.fix, "fix"),
            "flops_per_nd": f.flops_per_nd,
        }
    result = fit(read_points(f.points), approach=f.approach, **options)
    answers = [answer(result, question) for question in questions]
    print(result.table())
    for asked, numbers in answers:
        print(f"\nat {asked}")
        print("\n".join(row(name, number) for name, number in numbers.items()))
    if f.out:
        print(f"\nwritten: {', '.join(map(str, write(pathlib.Path(f.out), result, answers)))}")


def write(
    folder: pathlib.Path, result: Fit | IsoflopFit, answers: list[tuple[str, dict[str, Estimate]]]
) -> list[pathlib.Path]:
    """fit.json and the figures as PNGs in `folder`; returns their paths."""
    from llm_jax.scaling import figures, style  # matplotlib, only where files are asked for

    if isinstance(result, IsoflopFit):
        method, counting = result.conventions["method"], result.conventions["N"]
        drawn = {"isoflop": figures.isoflop_curves(result.curves, counting, method)}
    elif set(result.law.inputs) == {"N", "D"}:
        drawn = {
            "frontier": figures.frontier(result),
            "optima": figures.optima(None, result),
            "residuals": figures.residuals(result),
        }
    else:
        drawn = {}
    predictions = [{"at": asked} | {k: e._asdict() for k, e in found.items()} for asked, found in answers]
    content = result.to_json() | {"predictions": plain(predictions)}
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "fit.json"]
    write_atomically(paths[0], json.dumps(content, indent=1) + "\n")
    for name, figure in drawn.items():
        paths.append(folder / f"{name}.png")
        paths[-1].write_bytes(style.png(figure))
    return paths


def check_folder(folder: pathlib.Path) -> None:
    """Raises UserError where `folder` can't be made or written to; makes nothing yet."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"--out={folder} can't be a folder: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--out={folder}: nothing can be written in {there}")


def answer(result: Fit | IsoflopFit, question: Mapping[str, float]) -> tuple[str, dict[str, Estimate]]:
    """The optimum at a budget C, or the loss at the inputs of the law."""
    asked = ", ".join(f"{name}={value:g}" for name, value in question.items())
    if isinstance(result, IsoflopFit):
        if set(question) != {"C"}:
            raise UserError("Approach 2 has no law of the loss: ask for an optimum, --predict=C=1e21")
    elif set(question) != {"C"} or "C" in result.law.inputs:
        return asked, {"loss": result.predict(**question)}
    return asked, {name: e for name, e in result.optimum(question["C"])._asdict().items() if e}


def _pairs(text: str, flag: str) -> dict[str, str]:
    """{"N": "params"} from N=params,D=tokens."""
    pairs = [item.partition("=") for item in text.split(",") if item.strip()]
    for name, equals, value in pairs:
        if not (name.strip() and equals and value.strip()):
            raise UserError(f"--{flag}={text}: write NAME=VALUE, separated by commas")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _numbers(text: str, flag: str) -> dict[str, float]:
    """{"N": 1e9} from N=1e9; predictions are asked at positive numbers."""
    numbers = {}
    for name, value in _pairs(text, flag).items():
        try:
            numbers[name] = float(value)
        except ValueError:
            numbers[name] = math.nan
        if not math.isfinite(numbers[name]) or (flag == "predict" and numbers[name] <= 0):
            raise UserError(f"--{flag}={text}: {value!r} is not a {'positive ' * (flag == 'predict')}number")
    return numbers


if __name__ == "__main__":
    define_flags()
    run_main(main)
