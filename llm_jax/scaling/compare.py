"""Two questions across fits: which law suits the points, and how much compute one recipe saves over
another.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from llm_jax.config import UserError
from llm_jax.files import with_nulls
from llm_jax.scaling import laws, sensitivity
from llm_jax.scaling.fits import fit_law, refit
from llm_jax.scaling.law import Inputs, Law, Optimum, Parameter
from llm_jax.scaling.objectives import objective
from llm_jax.scaling.results import Estimate, Fit
from llm_jax.scaling.tables import check_points

COLUMN = "second recipe"  # no name that an expression could have, so no column of a user's
CODES = (1.0, np.e)  # ln of them is what the law sees: 0 for the first recipe, 1 for the second


@dataclasses.dataclass(frozen=True)
class Compared:
    """A law's fit beside others: AICc, and what it misses of every budget predicted without it.

    AICc (Hurvich and Tsai 1989) takes residuals of ln loss as normal, so it is of least squares; lower is
    better.
    """

    fit: Fit
    aicc: float
    held_out: tuple[sensitivity.HeldOut, ...]

    @property
    def law(self) -> str:
        return self.fit.law.name or type(self.fit.law).__name__

    @property
    def rms(self) -> float:
        """Of the residuals of ln loss."""
        return float(np.sqrt((self.fit.residuals**2).mean()))

    @property
    def largest(self) -> float:
        """Rms of ln loss on the largest budget, predicted without it (infinite where it can't be)."""
        test = sensitivity.largest(self.fit, self.held_out)
        return test.rms if test else np.inf

    @property
    def others(self) -> float:
        """Rms of ln loss on each budget in turn, predicted without it."""
        return float(np.sqrt(np.mean([test.rms**2 for test in self.held_out]))) if self.held_out else np.inf

    def to_json(self) -> dict[str, Any]:
        """The comparison's numbers, then those of the fit."""
        numbers = {name: getattr(self, name) for name in ("law", "rms", "aicc", "largest", "others")}
        tests = [test._asdict() for test in self.held_out]
        return with_nulls(
            numbers | {"parameters": self.fit.free, "held_out": tests, "fit": self.fit.to_json()}
        )


def compare(points: pd.DataFrame, names: Sequence[str], **options: Any) -> list[Compared]:
    """Every law of `names` fitted to the same table, best held-out first; UserError unless there are two."""
    if len(set(names)) < 2:
        raise UserError("--compare takes two laws or more, as in --compare=chinchilla,kaplan")
    if len(outputs := {laws.law(name).output for name in names}) > 1:
        both = " and of ".join(sorted(outputs))
        raise UserError(f"--compare: laws of {both} can't be held against each other")
    fits = [fit_law(points, name, **options) for name in dict.fromkeys(names)]
    return sorted(map(_judged, fits), key=lambda row: row.largest)


def _judged(fit: Fit) -> Compared:
    n, k = len(fit.residuals), fit.free + 1  # the noise is a parameter too
    normal = dataclasses.replace(fit.problem, objective=objective("l2"))
    theta = normal.theta(refit(fit, normal, fit.data))
    residuals = fit.data.y[0] - fit.law.log_loss(theta, fit.problem.x)[0]
    square = float((fit.points.weights * residuals**2).mean())
    aicc = n * np.log(max(square, 1e-300)) + 2 * k + (2 * k * (k + 1) / (n - k - 1) if n > k + 1 else np.inf)
    return Compared(fit, float(aicc), tuple(sensitivity.held_out(fit)))


def compared_table(rows: Sequence[Compared]) -> str:
    """The comparison as text."""
    lines = [
        f"{'law':20} {'free':>5} {'residuals':>10} {'AICc':>10} {'largest':>10} {'each':>10}  (held out, rms)"
    ]
    for row in rows:
        numbers = f"{row.rms:10.3%} {row.aicc:10.1f} {row.largest:10.3%} {row.others:10.3%}"
        lines.append(f"  {row.law:18} {row.fit.free:5d} {numbers}")
    warnings = [f"WARNING: {row.law}: {text}" for row in rows for text in row.fit.warnings]
    return "\n".join(lines + warnings)


def paired(base: Law) -> Law:
    """`base` for two recipes: coefficients of their own, asymptote and exponents shared.

    x[COLUMN] is 0 or 1. A ratio multiplies every coefficient of the second recipe. On the compute frontier
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


def best_loss(fit: Fit, C: np.ndarray, second: bool) -> Estimate:
    """The best loss at each C [n] by the law of the first or the second recipe of a `multiplier` fit."""
    recipe = CODES[second]
    if "C" in fit.law.inputs:
        return fit.predict(C=C, **{COLUMN: np.full_like(C, recipe)})
    best = [fit.optimum(budget, **{COLUMN: recipe}).loss for budget in C]
    return Estimate(*map(np.array, zip(*best, strict=True)))


def multiplier(points: pd.DataFrame, law: str | Law, column: str, **options: Any) -> tuple[Fit, str]:
    """The fit to both recipes of `column`, whose parameter "multiplier" is the compute saved, and what it
    means.

    Raises UserError unless the column names two recipes.
    """
    if column not in points:
        raise UserError(f"--multiplier: no column {column!r}")
    base, (codes, names) = laws.law(law), pd.factorize(points[column])
    numbers = points.assign(**{COLUMN: np.where(codes < 0, np.nan, codes + 1.0)})
    table = {
        name: options[name] for name in ("columns", "where", "weights", "flops_per_nd") if name in options
    }
    checked = check_points(numbers, (*base.inputs, COLUMN, base.output), **table)
    kept = checked.frame[COLUMN].unique()
    recipes = [str(names[int(code) - 1]) for code in kept]
    if len(recipes) != 2:
        raise UserError(
            f"--multiplier: the column {column!r} names {len(recipes)} recipes, two are compared: "
            f"{', '.join(recipes[:5])}; choose by --where"
        )
    coded = numbers.assign(**{COLUMN: np.where(numbers[COLUMN] == kept[1], *CODES[::-1])})
    fit = fit_law(coded, paired(base), **options)
    fit = dataclasses.replace(fit, conventions={**fit.conventions, "recipes": {column: recipes}})
    number = fit.parameters["multiplier"]
    spent = "C" if {"N", "D"} <= set(base.inputs) else base.inputs[0]
    text = (
        f"{column}={recipes[1]} reaches with {spent} what {column}={recipes[0]} reaches with "
        f"{number.value:.4g} {spent} ({fit.level:.0%} interval {number.low:.4g} to {number.high:.4g})"
    )
    return fit, text
