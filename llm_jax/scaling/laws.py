"""Scaling laws: a formula, its parameters with their transforms, and the optimum it implies.

A law is one small class. `log_loss(theta, x)` is its formula in natural logarithms, for many fits at once.
Derivatives come from `with_jacobian`: the default takes complex steps, exact to rounding for any formula of
smooth numpy functions; `SumOfPowers` has its own.

Shapes: S fits at once, P parameters, n points. `theta` [S, P] holds what the solver moves: ln of a
coefficient (`Parameter.log`), an exponent itself. `values` are the natural parameters {name: [S]}.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from llm_jax.config import UserError, nearest

Inputs = Mapping[str, np.ndarray]  # {"N": [n], "D": [n]}: natural logarithms of what the law depends on


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
    parameters: ClassVar[tuple[Parameter, ...]]
    ties: ClassVar[Mapping[str, str]] = {}  # parameter -> the one it always equals
    members: ClassVar[dict[str, type["Law"]]] = {}

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name:
            Law.members[cls.name] = cls

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

    def derived(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Numbers that follow from the parameters and are reported beside them."""
        return {}

    def optimum(
        self, theta: np.ndarray, C: float, flops_per_nd: float = 6.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """N and D [S] of lowest loss at C = flops_per_nd * N * D FLOPs, by golden section over ln N."""
        if set(self.inputs) != {"N", "D"}:
            raise UserError(
                f"the law {self.name!r} depends on {', '.join(self.inputs)}: it has no N and D to choose"
            )
        total = np.log(C / flops_per_nd)
        ratio = (np.sqrt(5) - 1) / 2
        low, high = np.zeros(theta.shape[0]), np.full(theta.shape[0], total)

        def loss(log_n: np.ndarray) -> np.ndarray:
            return self.log_loss(theta, {"N": log_n[:, None], "D": total - log_n[:, None]})[:, 0]

        for _ in range(100):
            left, right = high - ratio * (high - low), low + ratio * (high - low)
            smaller = loss(left) < loss(right)
            low, high = np.where(smaller, low, left), np.where(smaller, right, high)
        log_n = (low + high) / 2
        return np.exp(log_n), np.exp(total - log_n)


class SumOfPowers(Law):
    """Sums of terms coefficient * x^-exponent * ...: ln of the loss is a log-sum-exp of affine terms."""

    terms: ClassVar[
        tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    ]  # (coefficient, ((input, exponent), ...))

    def log_loss(self, theta: np.ndarray, x: Inputs) -> np.ndarray:
        return self._logsumexp(theta, x)[0]

    def with_jacobian(self, theta: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
        """A term's share of the loss is its derivative by ln coefficient; times -ln x, by the exponent."""
        log_loss, shares = self._logsumexp(theta, x)
        place = {parameter.name: index for index, parameter in enumerate(self.parameters)}
        jacobian = np.zeros((*theta.shape, log_loss.shape[-1]))
        for (coefficient, powers), share in zip(self.terms, shares, strict=True):
            jacobian[..., place[coefficient], :] += share
            for variable, exponent in powers:
                jacobian[..., place[exponent], :] -= share * x[variable]
        return log_loss, jacobian

    def _logsumexp(self, theta: np.ndarray, x: Inputs) -> tuple[np.ndarray, list[np.ndarray]]:
        column = {parameter.name: theta[..., i, None] for i, parameter in enumerate(self.parameters)}
        zero = np.zeros_like(x[self.inputs[0]])
        logs = []
        for coefficient, powers in self.terms:
            term = column[coefficient] + zero
            for variable, exponent in powers:
                term = term - column[exponent] * x[variable]
            logs.append(term)
        top = np.maximum.reduce(logs)
        shares = [np.exp(term - top) for term in logs]
        total = sum(shares)
        return top + np.log(total), [share / total for share in shares]


def asymptote(name: str) -> Parameter:
    """The irreducible loss; at its lower bound, 6e-6, the points show none."""
    return Parameter(name, tuple(np.arange(-1.0, 1.1, 0.5)), log=True, lower=-12.0)


def coefficient(name: str) -> Parameter:
    """A coefficient, started from exp(0), exp(5) ... exp(25)."""
    return Parameter(name, tuple(np.arange(0.0, 26, 5)), log=True, lower=-100.0, upper=300.0)


def exponent(name: str, grid: tuple[float, ...] = tuple(np.arange(0.0, 2.1, 0.5))) -> Parameter:
    """An exponent, started from 0, 0.5 ... 2."""
    return Parameter(name, grid, lower=1e-4, upper=4.0)


class Chinchilla(SumOfPowers):
    """Hoffmann et al. 2022, eq. 2 and section D.2 (the grid of 4,500 starts is theirs)."""

    name = "chinchilla"
    formula = "L = E + A/N^alpha + B/D^beta"
    inputs = ("N", "D")
    parameters = (asymptote("E"), coefficient("A"), exponent("alpha"), coefficient("B"), exponent("beta"))
    terms = (("E", ()), ("A", (("N", "alpha"),)), ("B", (("D", "beta"),)))

    def derived(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """a and b of N_opt ~ C^a, D_opt ~ C^b."""
        alpha, beta = values["alpha"], values["beta"]
        return {"a": beta / (alpha + beta), "b": alpha / (alpha + beta)}

    def optimum(
        self, theta: np.ndarray, C: float, flops_per_nd: float = 6.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Hoffmann et al. eq. 4: N_opt = G (C/6)^a with G = (alpha A / (beta B))^(1/(alpha+beta))."""
        _, log_a, alpha, log_b, beta = theta.T
        log_g = (np.log(alpha / beta) + log_a - log_b) / (alpha + beta)
        total = np.log(C / flops_per_nd)
        log_n = np.clip(log_g + beta / (alpha + beta) * total, 0.0, total)  # N and D are at least 1
        return np.exp(log_n), C / flops_per_nd / np.exp(log_n)


class TiedChinchilla(Chinchilla):
    """One exponent for N and D, so that N_opt and D_opt grow alike."""

    name = "chinchilla-tied"
    formula = "L = E + A/N^alpha + B/D^alpha"
    ties: ClassVar[Mapping[str, str]] = {"beta": "alpha"}


class PowerLaw(SumOfPowers):
    """Loss on the compute frontier; fix E=0 for a pure power, E=value for a known entropy."""

    name = "power"
    formula = "L = E + A/C^a"
    inputs = ("C",)
    parameters = (
        asymptote("E"),
        coefficient("A"),
        exponent("a", tuple(np.arange(0.0, 1.01, 0.05))),
    )
    terms = (("E", ()), ("A", (("C", "a"),)))


def law(name: str | Law) -> Law:
    """The law of that name; raises UserError with the nearest name."""
    if isinstance(name, Law):
        return name
    if name not in Law.members:
        raise UserError(f"no law {name!r}; {nearest(name, Law.members)}")
    return Law.members[name]()
