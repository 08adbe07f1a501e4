"""Two questions across fits: which law suits the points, and how much compute one recipe saves over
another.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from llm_jax.config import UserError
from llm_jax.scaling import laws, sensitivity
from llm_jax.scaling.fits import fit_law
from llm_jax.scaling.law import Inputs, Law, Optimum, Parameter
from llm_jax.scaling.results import Fit

COLUMN = "recipe"


class Compared(NamedTuple):
    """A law beside others: free parameters, rms of its residuals, AICc, and what it misses of left-out
    budgets.

    AICc (Hurvich and Tsai 1989) takes residuals of ln loss as normal; lower is better. largest, others: rms
    of ln loss on the largest budget, and on each budget in turn, predicted without it.
    """

    law: str
    parameters: int
    rms: float
    aicc: float
    largest: float
    others: float


def compare(points: pd.DataFrame, names: Sequence[str], **options: Any) -> list[Compared]:
    """Every law of `names` fitted to the same table, best held-out first; UserError unless there are two."""
    if len(names) < 2:
        raise UserError("--compare takes two laws or more, as in --compare=chinchilla,kaplan")
    if len(outputs := {laws.law(name).output for name in names}) > 1:
        both = " and of ".join(sorted(outputs))
        raise UserError(f"--compare: laws of {both} can't be held against each other")
    fits = [fit_law(points, name, **(options | {"bootstrap": 0})) for name in names]
    return sorted((_judged(fit) for fit in fits), key=lambda row: row.largest)


def _judged(fit: Fit) -> Compared:
    n, k = len(fit.residuals), fit.free + 1  # the noise is a parameter too
    square = float((fit.residuals**2).mean())
    aicc = n * np.log(max(square, 1e-300)) + 2 * k + (2 * k * (k + 1) / (n - k - 1) if n > k + 1 else np.inf)
    tests = sensitivity.held_out(fit)
    each = float(np.sqrt(np.mean([test.rms**2 for test in tests]))) if tests else np.inf
    largest = tests[-1].rms if tests else np.inf
    return Compared(fit.law.name or type(fit.law).__name__, fit.free, square**0.5, float(aicc), largest, each)


def compared_table(rows: Sequence[Compared]) -> str:
    """The comparison as text."""
    lines = [
        f"{'law':20} {'free':>5} {'residuals':>10} {'AICc':>10} {'largest':>10} {'each':>10}  (held out, rms)"
    ]
    for row in rows:
        numbers = f"{row.rms:10.3%} {row.aicc:10.1f} {row.largest:10.3%} {row.others:10.3%}"
        lines.append(f"  {row.law:18} {row.parameters:5d} {numbers}")
    return "\n".join(lines)


def paired(base: Law) -> Law:
    """`base` for two recipes: coefficients of their own, asymptote and exponents shared.

    x["recipe"] is 0 or 1. A ratio multiplies every coefficient of the second recipe. On the compute frontier
    the loss is E + K C^-c, with K of each recipe's coefficients, so that the second reaches with C what the
    first does with (K_1/K_2)^(1/c) C, whatever C is: the compute multiplier.
    """
    if isinstance(base, laws.Chinchilla) and len(base.parameters) == 5:
        coefficients = ("A", "B")
    elif isinstance(base, laws.PowerLaw):
        coefficients = ("A",)
    else:
        raise UserError(
            f"a compute multiplier needs chinchilla, chinchilla-tied or power; not {base.formula}"
        )
    ratios = tuple(
        Parameter(f"{name}2/{name}", (0.0,), log=True, lower=-20.0, upper=20.0) for name in coefficients
    )

    class Paired(Law):
        formula = (
            f"{base.formula}, coefficients times {', '.join(r.name for r in ratios)} for the second recipe"
        )
        inputs = (*base.inputs, COLUMN)
        parameters = (*base.parameters, *ratios)
        ties = base.ties

        def log_loss(self, theta: np.ndarray, x: Inputs) -> np.ndarray:
            first, second = self._split(theta)
            return np.where(x[COLUMN] > 0, base.log_loss(second, x), base.log_loss(first, x))

        def with_jacobian(self, theta: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
            parts = [base.with_jacobian(half, x) for half in self._split(theta)]
            value, jacobian = (np.where(x[COLUMN] > 0, b, a) for a, b in zip(*parts, strict=True))
            own = [jacobian[:, [base.places[name]]] * (x[COLUMN] > 0) for name in coefficients]
            return value, np.concatenate([jacobian, *own], axis=1)

        def derived(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            if "B" not in values:
                return {"multiplier": values["A2/A"] ** (-1 / values["a"])}
            alpha, beta = values["alpha"], values["beta"]
            # K is proportional to (A^beta B^alpha)^(1/(alpha+beta)), and c = alpha beta / (alpha+beta).
            saved = values["A2/A"] ** (-1 / alpha) * values["B2/B"] ** (-1 / beta)
            return base.derived(values) | {"multiplier": saved}

        def optimum(
            self,
            theta: np.ndarray,
            C: float,
            flops_per_nd: float = 6.0,
            given: Mapping[str, float] | None = None,
        ) -> Optimum:
            second = bool((given or {}).get(COLUMN, 1.0) != 1.0)
            return base.optimum(self._split(theta)[second], C, flops_per_nd)

        def _split(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            first = theta[..., : len(base.parameters)]
            second = first.copy()
            for index, name in enumerate(coefficients):
                second[..., base.places[name]] += theta[..., len(base.parameters) + index]
            return first, second

    return Paired()


def multiplier(points: pd.DataFrame, law: str | Law, column: str, **options: Any) -> tuple[Fit, str]:
    """The fit to both recipes of `column`, whose parameter "multiplier" is the compute saved, and what it
    means.

    Raises UserError unless the column names two recipes.
    """
    if column not in points:
        raise UserError(f"--multiplier: no column {column!r}")
    recipes = list(dict.fromkeys(points[column]))
    if len(recipes) != 2:
        raise UserError(f"--multiplier: the column {column!r} names {len(recipes)} recipes, two are compared")
    # ln of the column is what the law sees: 0 for the first, 1 for the second.
    coded = points.assign(**{COLUMN: np.where(points[column] == recipes[1], np.e, 1.0)})
    fit = fit_law(coded, paired(laws.law(law)), **options)
    number = fit.parameters["multiplier"]
    text = (
        f"{column}={recipes[1]} reaches with C what {column}={recipes[0]} reaches with {number.value:.4g} C "
        f"({fit.level:.0%} interval {number.low:.4g} to {number.high:.4g})"
    )
    return fit, text
