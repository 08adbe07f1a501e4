"""Fits a scaling law to any table of runs.

    python -m llm_jax.scaling.fit --points=points.csv --law=chinchilla --predict=C=1e21 --out=fits/mine

Prints parameters with intervals, predictions, what was left out and what to be wary of; with --out writes
fit.json. The library behind it is llm_jax.scaling.fits.
"""

import json
import pathlib
from collections.abc import Mapping

from absl import flags

from llm_jax.config import UserError, run_main
from llm_jax.scaling.fits import fit
from llm_jax.scaling.laws import Law
from llm_jax.scaling.results import Estimate, Fit, plain, row
from llm_jax.scaling.tables import read_points


def define_flags() -> None:
    """The command's flags; in a function, so that importing this module claims no names."""
    flags.DEFINE_string("points", None, "table with columns N, D, loss (.csv, .parquet, .json, .jsonl)")
    flags.DEFINE_string("law", "chinchilla", f"one of {', '.join(Law.members)}")
    flags.DEFINE_string("loss", "huber:1e-3", "huber:DELTA, lad or l2, of ln of the loss")
    flags.DEFINE_float("delta", None, "short for --loss=huber:DELTA")
    flags.DEFINE_integer("bootstrap", 1000, "refits to runs drawn with replacement", lower_bound=0)
    flags.DEFINE_float("level", 0.9, "what share of the refits an interval holds", 0.01, 0.999)
    flags.DEFINE_integer("seed", 0, "of the bootstrap")
    flags.DEFINE_string("columns", "", "names of your columns, as in N=params,D=tokens,loss=final_loss")
    flags.DEFINE_string("where", None, "which rows to fit, as in 'D > 20*N and width < 512'")
    flags.DEFINE_string("fix", "", "parameters that are given, as in E=1.69")
    flags.DEFINE_multi_string("predict", [], "loss at N=1e9,D=2e10 or optimum at C=1e21; may be repeated")
    flags.DEFINE_string("counting", "as given in the table", "what N counts; kept with the result")
    flags.DEFINE_float("flops_per_nd", 6.0, "C / (N D), for the optimum at a budget", 1e-9)
    flags.DEFINE_string("out", None, "folder for fit.json")


def main() -> None:
    """Reads the flags, fits, prints, writes."""
    f = flags.FLAGS
    if f.points is None:
        raise UserError("--points is missing, for example --points=points.csv (columns N, D, loss)")
    questions = [_pairs(text, "predict") for text in f.predict]
    result = fit(
        read_points(f.points),
        f.law,
        loss=f.loss if f.delta is None else f"huber:{f.delta}",
        fixed={name: _number(text, "fix") for name, text in _pairs(f.fix, "fix").items()},
        bootstrap=f.bootstrap,
        level=f.level,
        seed=f.seed,
        columns=_pairs(f.columns, "columns"),
        where=f.where,
        counting=f.counting,
        flops_per_nd=f.flops_per_nd,
    )
    answers = [
        answer(result, {name: _number(text, "predict") for name, text in question.items()})
        for question in questions
    ]
    print(result.table())
    for asked, numbers in answers:
        print(f"\nat {asked}")
        print("\n".join(row(name, number) for name, number in numbers.items()))
    if f.out:
        folder = pathlib.Path(f.out)
        folder.mkdir(parents=True, exist_ok=True)
        predictions = [
            {"at": asked, **{k: e._asdict() for k, e in numbers.items()}} for asked, numbers in answers
        ]
        text = json.dumps(result.to_json() | {"predictions": plain(predictions)}, indent=1)
        (folder / "fit.json").write_text(text + "\n")
        print(f"\nwritten: {folder / 'fit.json'}")


def answer(result: Fit, question: Mapping[str, float]) -> tuple[str, dict[str, Estimate]]:
    """The optimum at a budget C, or the loss at the inputs of the law."""
    asked = ", ".join(f"{name}={value:g}" for name, value in question.items())
    if set(question) == {"C"} and "C" not in result.law.inputs:
        return asked, result.optimum(question["C"])._asdict()
    return asked, {"loss": result.predict(**question)}


def _pairs(text: str, flag: str) -> dict[str, str]:
    """{"N": "params"} from N=params,D=tokens."""
    pairs = [item.partition("=") for item in text.split(",") if item.strip()]
    for name, equals, value in pairs:
        if not (name.strip() and equals and value.strip()):
            raise UserError(f"--{flag}={text}: write NAME=VALUE, separated by commas")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _number(text: str, flag: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"--{flag}: {text!r} is not a number") from None
    if flag == "predict" and not 0 < value < float("inf"):
        raise UserError(f"--predict: {text} is not a positive number")
    return value


if __name__ == "__main__":
    define_flags()
    run_main(main)
