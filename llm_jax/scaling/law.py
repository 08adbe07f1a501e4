"""What a scaling law is: a formula, its parameters with their transforms, and the optimum it implies.

A law is one small class. `log_loss(theta, x)` is its formula in natural logarithms, for many fits at once.
Derivatives come from `with_jacobian`: the default takes complex steps, exact to rounding for any formula of
smooth numpy functions; `SumOfPowers` has its own.

Shapes: S fits at once, P parameters, n points. `theta` [S, P] holds what the solver moves: ln of a
coefficient (`Parameter.log`), an exponent itself. `values` are the natural parameters {name: [S]}.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from llm_jax.config import UserError

Inputs = Mapping[str, np.ndarray]  # {"N": [n], "D": [n]}: natural logarithms of what the law depends on
Optimum = tuple[np.ndarray, np.ndarray]  # N and D, each [S]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter: the solver moves ln(value) where `log`, and starts from every value of `grid`."""

    name: str
    grid: tuple[float, ...]
    log: bool = False
    lower: float = -np.inf
    upper: float = np.inf

    def inner(self, value: float) -> float:
        """What the solver sees of a natural value; a coefficient of 0 becomes -inf, a term that is absent."""
        with np.errstate(divide="ignore"):
            return float(np.log(value)) if self.log else float(value)

    def natural(self, inner: np.ndarray) -> np.ndarray:
        """The value itself, from what the solver moved."""
        return np.exp(inner) if self.log else inner


class Law:
    """Root of all laws; a subclass with a `name` can be asked for by it."""

    name: ClassVar[str] = ""
    formula: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]]
    output: ClassVar[str] = "loss"
    parameters: ClassVar[tuple[Parameter, ...]]
    ties: ClassVar[Mapping[str, str]] = {}  # parameter -> the one it always equals
    members: ClassVar[dict[str, type["Law"]]] = {}

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name:
            Law.members[cls.name] = cls

    @property
    def places(self) -> dict[str, int]:
        """The column of theta that a parameter stands in."""
        return {parameter.name: index for index, parameter in enumerate(self.parameters)}

    def log_loss(self, theta: np.ndarray, x: Inputs) -> np.ndarray:
        """ln of the loss [S, n] at the inputs x (each [n], logarithms)."""
        raise NotImplementedError

    def with_jacobian(self, theta: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
        """ln of the loss [S, n] and its derivatives [S, P, n], by complex steps."""
        step = 1e-30
        columns = []
        for index in range(theta.shape[-1]):
            moved = theta.astype(complex)
            moved[..., index] += 1j * step
            columns.append(self.log_loss(moved, x).imag / step)
        return self.log_loss(theta, x), np.stack(columns, axis=-2)

    def inputs_of(self, given: Mapping[str, Any], flops_per_nd: float) -> dict[str, np.ndarray]:
        """The law's inputs as arrays [n], from those given; UserError where they don't determine them."""
        arrays = np.broadcast_arrays(*(np.atleast_1d(np.asarray(value, float)) for value in given.values()))
        values = dict(zip(given, arrays, strict=True))
        if "C" not in values and {"N", "D"} <= set(values) and not {"C", "M"}.isdisjoint(self.inputs):
            values |= {"C": flops_per_nd * values["N"] * values["D"], "M": values["D"] / values["N"]}
        used = {name: value for name, value in values.items() if name in self.inputs}
        spare = set(given) - set(self.inputs) - {"N", "D"}
        if set(used) != set(self.inputs) or spare:
            raise UserError(
                f"{self.formula} is predicted at {', '.join(self.inputs)}; got {', '.join(given)}"
            )
        return used

    def refuse_beside(self, given: Mapping[str, Any]) -> None:
        """Raises UserError for what stands beside a budget, or a loss to reach, and the law doesn't know."""
        if unknown := set(given) - (set(self.inputs) - {"N", "D", "C"}):
            raise UserError(f"{self.formula} has its best N and D at C; it knows no {min(unknown)} beside")

    def derived(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Numbers that follow from the parameters and are reported beside them."""
        return {}

    def optimum(
        self, theta: np.ndarray, C: float, flops_per_nd: float = 6.0, given: Mapping[str, float] | None = None
    ) -> Optimum:
        """N and D [S] of lowest loss at C = flops_per_nd * N * D FLOPs, by golden section over ln N.

        given: what else the law depends on, as numbers. Raises UserError for a law of other things than N
        and D.
        """
        loss, total = self.of_size_and_data(theta, given), np.log(C / flops_per_nd)
        log_n = lowest(lambda log_n: loss(log_n, total - log_n), np.full(len(theta), total))
        return np.exp(log_n), np.exp(total - log_n)

    def of_size_and_data(
        self, theta: np.ndarray, given: Mapping[str, float] | None = None
    ) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """ln of the loss [S] as a function of ln N and ln D [S]; UserError where it depends on other things
        than they and what is `given`.
        """
        others = {name: np.full((1, 1), np.log(value)) for name, value in (given or {}).items()}
        missing = set(self.inputs) - {"N", "D"} - set(others)
        if not {"N", "D"} <= set(self.inputs) or missing:
            needs = f"; give {', '.join(sorted(missing))} too" if {"N", "D"} <= set(self.inputs) else ""
            raise UserError(f"{self.formula} has no N and D to choose{needs}")
        return lambda N, D: self.log_loss(theta, others | {"N": N[:, None], "D": D[:, None]})[:, 0]


class SumOfPowers(Law):
    """Sums of terms coefficient * x^-exponent * ...: ln of the loss is a log-sum-exp of affine terms.

    terms: (coefficient, ((input, exponent), ...)) each; "-exponent" is the exponent with its sign turned.
    """

    terms: ClassVar[tuple[tuple[str, tuple[tuple[str, str], ...]], ...]]

    def log_loss(self, theta: np.ndarray, x: Inputs) -> np.ndarray:
        return logsumexp(self.logs(theta, x))

    def with_jacobian(self, theta: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
        """A term's share of the loss is its derivative by ln coefficient; times -ln x, by the exponent."""
        logs = self.logs(theta, x)
        log_loss, place = logsumexp(logs), self.places
        jacobian = np.zeros((*theta.shape, log_loss.shape[-1]))
        for (coefficient, powers), term in zip(self.terms, logs, strict=True):
            share = np.exp(term - log_loss)
            jacobian[..., place[coefficient], :] += share
            for variable, name in powers:
                sign, exponent = _signed(name)
                jacobian[..., place[exponent], :] -= sign * share * x[variable]
        return log_loss, jacobian

    def logs(self, theta: np.ndarray, x: Inputs) -> list[np.ndarray]:
        """ln of every term [S, n]."""
        column = {name: theta[..., index, None] for name, index in self.places.items()}
        zero = np.zeros_like(x[self.inputs[0]])
        out = []
        for coefficient, powers in self.terms:
            term = column[coefficient] + zero
            for variable, name in powers:
                sign, exponent = _signed(name)
                term = term - sign * column[exponent] * x[variable]
            out.append(term)
        return out


def lowest(value: Callable[[np.ndarray], np.ndarray], high: np.ndarray) -> np.ndarray:
    """Where `value` [S] of something in 0 to `high` [S] is lowest, by golden section."""
    low, ratio = np.zeros_like(high), (np.sqrt(5) - 1) / 2
    for _ in range(80):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        smaller = value(left) < value(right)
        low, high = np.where(smaller, low, left), np.where(smaller, right, high)
    return (low + high) / 2


def _signed(exponent: str) -> tuple[int, str]:
    return (-1, exponent[1:]) if exponent.startswith("-") else (1, exponent)


def logsumexp(logs: list[np.ndarray]) -> np.ndarray:
    """ln of the sum of exp of the terms, without overflow; for complex steps too."""
    top = np.maximum.reduce([term.real for term in logs])
    with np.errstate(invalid="ignore"):
        return top + np.log(sum(np.exp(term - top) for term in logs))


def asymptote(name: str) -> Parameter:
    """The irreducible loss; at its lower bound, 6e-6, the points show none."""
    return Parameter(name, tuple(np.arange(-1.0, 1.1, 0.5)), log=True, lower=-12.0)


def coefficient(name: str) -> Parameter:
    """A coefficient, started from exp(0), exp(5) ... exp(25)."""
    return Parameter(name, tuple(np.arange(0.0, 26, 5)), log=True, lower=-100.0, upper=300.0)


def exponent(name: str, grid: tuple[float, ...] = tuple(np.arange(0.0, 2.1, 0.5))) -> Parameter:
    """An exponent, started from 0, 0.5 ... 2."""
    return Parameter(name, grid, lower=1e-4, upper=4.0)
