"""The sweep whose forecast is tightest for a budget, and its price.

    python -m llm_jax.scaling.propose --budget=1e20 --target=N=7e10,D=1.4e12 --fit=fits/mine --out=plan.csv
    python -m llm_jax.scaling.propose --budget=1e20 --target=N=7e10,D=1.4e12 --law=chinchilla \\
        --values=E=1.69,A=406.4,B=410.7,alpha=0.34,beta=0.28 --sizes=1e7:3e9:20 --device=H100

The law that is expected says which runs tell most of the target (plan.propose); it is that of an earlier fit
(the folder of its fit.json) or one with values of your own. Compute is 6 N D.
"""

import json
from collections.abc import Mapping

import numpy as np
import pandas as pd
from absl import flags

from llm_jax import files
from llm_jax.command_line import run_main
from llm_jax.config import UserError
from llm_jax.scaling import laws, plan
from llm_jax.scaling.grids import Grid, Limits
from llm_jax.scaling.law import Law
from llm_jax.scaling.reading import numbers
from llm_jax.scaling.style import flops, short


def expected(name: str, values: Mapping[str, float]) -> tuple[Law, np.ndarray]:
    """The law and its parameters as the solver sees them [P]; raises UserError unless all are given."""
    law = laws.law(name)
    missing = [p.name for p in law.parameters if p.name not in values]
    if missing:
        raise UserError(f"--values lacks {', '.join(missing)} of {law.formula}")
    with np.errstate(invalid="ignore"):
        theta = np.array([parameter.inner(values[parameter.name]) for parameter in law.parameters])
    if not np.isfinite(theta).all():
        raise UserError("--values: each is a number, and coefficients are positive")
    return law, theta


def fitted(folder: str) -> tuple[Law, np.ndarray, float]:
    """The law, its parameters and the noise of a run, of the fit.json in `folder`."""
    place = files.path(folder)
    place = place / "fit.json" if place.is_dir() else place
    try:
        content = json.loads(place.read_text())
        values = {name: number["value"] for name, number in content["parameters"].items()}
        law, theta = expected(content["law"]["name"], values)
        return law, theta, float(content["noise"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"--fit={folder}: no fit.json of a law there, with its parameters and noise"
        ) from None


def sizes(text: str) -> np.ndarray:
    """Parameters of the candidates: LOW:HIGH:COUNT, evenly in logarithms, or N,N,..."""
    try:
        low, *rest = map(float, text.split(":"))
        found = np.geomspace(low, rest[0], min(int(rest[1]), 10_001)) if rest else np.array([low])
    except (ValueError, IndexError):
        try:
            found = np.array([float(item) for item in text.split(",")])
        except ValueError:
            found = np.array([])
    if len(found) > 10_000:
        raise UserError(f"--sizes={text}: 10,000 sizes are the most")
    if not len(found) or not (np.isfinite(found) & (found >= 1)).all():
        raise UserError(f"--sizes={text}: write LOW:HIGH:COUNT, such as 1e7:3e9:20, or N,N,N")
    return np.unique(found.round().astype(np.int64))


def table(grid: Grid) -> str:
    """The runs as text, by size."""
    lines = [f"{'N':>10} {'D':>10} {'D/N':>8} {'steps':>10} {'FLOPs':>10}"]
    for cell in grid.cells.sort_values(["N", "D"]).itertuples():
        row = f"{short(cell.N):>10} {short(cell.D):>10} {cell.D / cell.N:8.3g} {cell.steps:10,d}"
        lines.append(f"{row} {flops(cell.flops):>10}")
    return "\n".join(lines)


def main() -> None:
    f = flags.FLAGS
    if bool(f.fit) == bool(f.values):
        raise UserError("one of --fit=FOLDER and --values=NAME=NUMBER,... says what law is expected")
    if f.fit and (given := [name for name in ("law", "noise") if f[name].present]):
        raise UserError(f"--{given[0]} belongs to --values; with --fit it is that of the fit")
    if not 0 < f.noise < 1:
        raise UserError(f"--noise={f.noise:g}: the standard deviation of ln loss, such as 0.005")
    if f.out and files.path(f.out).is_dir():
        raise UserError(f"--out={f.out} is a folder; the plan is a file, such as plan.csv")
    if not (f.budget and np.isfinite(f.budget) and f.budget > 0):
        raise UserError("--budget is missing: the FLOPs of the whole plan, such as 1e20")
    aim = numbers(f.target or "", "target")
    if set(aim) != {"N", "D"} or min(aim.values()) <= 0:
        raise UserError("--target says what is forecast, such as N=7e10,D=1.4e12")
    if f.fit:
        law, theta, noise = fitted(f.fit)
    else:
        values, noise = numbers(f.values, "values"), f.noise
        law, theta = expected(f.law, values)
        if unknown := set(values) - set(law.places):
            raise UserError(f"--values: {law.formula} has no parameter {min(unknown)!r}")
    candidates = pd.DataFrame({"N": sizes(f.sizes)})
    candidates = candidates.assign(flops_per_token=6.0 * candidates["N"], tokens_per_step=f.tokens_per_step)
    limits = Limits(f.available_tokens, f.minimum_steps)
    target = plan.Target(**aim)
    grid = plan.propose(candidates, f.budget, law, theta, target, limits, f.largest_share)
    error = plan.forecast_error(grid.cells, law, theta, target, noise)
    price = plan.price(grid, f.device)
    print(f"{table(grid)}\n\n{len(grid.cells)} runs, {price}")
    at = f"N={short(target.N)}, D={short(target.D)}"
    print(f"forecast at {at}: 90% within {1.645 * error:.2%} of its loss, a run scattering by {noise:.2%}")
    if f.out:
        files.path(f.out).write_text(grid.cells.to_csv(index=False))
        print(f"plan: {f.out}")


def define_flags() -> None:
    flags.DEFINE_float("budget", None, "FLOPs of all runs together")
    flags.DEFINE_string("target", None, "the run to be forecast, as N=7e10,D=1.4e12")
    flags.DEFINE_string("fit", None, "the folder of an earlier fit, whose law is expected")
    flags.DEFINE_string("law", "chinchilla", "the law that is expected, with --values")
    flags.DEFINE_string("values", None, "its parameters, as E=1.69,A=406.4,B=410.7,alpha=0.34,beta=0.28")
    flags.DEFINE_float("noise", 0.005, "standard deviation of ln loss of one run, with --values")
    flags.DEFINE_string("sizes", "1e7:3e9:20", "N of the models that may be trained: LOW:HIGH:COUNT or N,N,N")
    flags.DEFINE_integer("tokens_per_step", 1 << 19, "tokens of one step", lower_bound=1)
    flags.DEFINE_integer("minimum_steps", 100, "the least steps of a run", lower_bound=1)
    flags.DEFINE_integer("available_tokens", None, "tokens of one epoch; no run sees more", lower_bound=1)
    flags.DEFINE_float("largest_share", 0.1, "the most that one run may take of the budget", 0.0, 1.0)
    flags.DEFINE_string("device", "H100", f"priced on one of {', '.join(plan.RATES)}")
    flags.DEFINE_string("out", None, "a .csv file for the plan")


if __name__ == "__main__":
    define_flags()
    run_main(main)
