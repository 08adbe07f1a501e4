"""The laws, one class each, with what they were published as. `law(name)` finds them, and yours in a file."""

import pathlib
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from llm_jax.config import UserError, nearest
from llm_jax.scaling.law import (
    Inputs,
    Law,
    Optimum,
    Parameter,
    SumOfPowers,
    asymptote,
    coefficient,
    exponent,
    logsumexp,
)
from llm_jax.scaling.own import load

_RATES = (0.05, 0.2, 0.5)  # starts of small exponents


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
        self, theta: np.ndarray, C: float, flops_per_nd: float = 6.0, given: Mapping[str, float] | None = None
    ) -> Optimum:
        """Hoffmann et al. eq. 4: N_opt = G (C/6)^a with G = (alpha A / (beta B))^(1/(alpha+beta))."""
        alpha, beta = theta[:, 2], theta[:, 4]
        total = np.log(C / flops_per_nd)
        log_n = np.clip(_log_g(theta) + beta / (alpha + beta) * total, 0.0, total)  # N and D are at least 1
        return np.exp(log_n), C / flops_per_nd / np.exp(log_n)


def _log_g(theta: np.ndarray) -> np.ndarray:
    """ln G [S] of Hoffmann et al. eq. 4 from E, A, alpha, B, beta."""
    log_a, alpha, log_b, beta = (theta[..., index] for index in (1, 2, 3, 4))
    return (np.log(alpha / beta) + log_a - log_b) / (alpha + beta)


class TiedChinchilla(Chinchilla):
    """One exponent for N and D, so that N_opt and D_opt grow alike."""

    name = "chinchilla-tied"
    formula = "L = E + A/N^alpha + B/D^alpha"
    ties: ClassVar[Mapping[str, str]] = {"beta": "alpha"}


class Kaplan(Law):
    """Kaplan et al. 2020, eq. 1.5; without an asymptote. N counts no embeddings there."""

    name = "kaplan"
    formula = "L = ((Nc/N)^(alpha_N/alpha_D) + Dc/D)^alpha_D"
    inputs = ("N", "D")
    parameters = (
        Parameter("Nc", tuple(np.arange(5.0, 46, 10)), log=True, lower=-50.0, upper=300.0),
        Parameter("alpha_N", _RATES, lower=1e-4, upper=4.0),
        Parameter("Dc", tuple(np.arange(5.0, 46, 10)), log=True, lower=-50.0, upper=300.0),
        Parameter("alpha_D", _RATES, lower=1e-4, upper=4.0),
    )

    def log_loss(self, theta: np.ndarray, x: Inputs) -> np.ndarray:
        log_nc, alpha_n, log_dc, alpha_d = (theta[..., i, None] for i in range(4))
        sizes = alpha_n / alpha_d * (log_nc - x["N"])
        return alpha_d * logsumexp([sizes, log_dc - x["D"] + 0 * sizes])

    def derived(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """a and b of N_opt ~ C^a, D_opt ~ C^b: both terms fall alike at the optimum."""
        alpha_n, alpha_d = values["alpha_N"], values["alpha_D"]
        return {"a": alpha_d / (alpha_n + alpha_d), "b": alpha_n / (alpha_n + alpha_d)}


class DataConstrained(Chinchilla):
    """Muennighoff et al. 2023, eq. 5 to 7: tokens repeated, and parameters beyond what U tokens need, fade.

    U is how many tokens are unique. D' = U + U R_D (1 - exp(-(D/U - 1)/R_D)); N' likewise around the N that
    is optimal for U tokens. Theirs: R_D = 15.39, R_N = 5.31, alpha = beta = 0.353.
    """

    name = "data-constrained"
    formula = "L = E + A/N'^alpha + B/D'^beta, D' = U (1 + R_D (1 - exp(-(D/U - 1)/R_D))), N' alike"
    inputs = ("N", "D", "U")
    parameters = (
        Parameter("E", (-0.5, 0.5), log=True, lower=-12.0),
        Parameter("A", (5.0, 10.0), log=True, lower=-100.0, upper=300.0),
        Parameter("alpha", (0.25, 0.5), lower=1e-3, upper=4.0),
        Parameter("B", (5.0, 10.0), log=True, lower=-100.0, upper=300.0),
        Parameter("beta", (0.25, 0.5), lower=1e-3, upper=4.0),
        Parameter("R_D", (1.0, 3.0), log=True, lower=-5.0, upper=10.0),
        Parameter("R_N", (1.0, 3.0), log=True, lower=-5.0, upper=10.0),
    )

    def log_loss(self, theta: np.ndarray, x: Inputs) -> np.ndarray:
        log_e, log_a, alpha, log_b, beta, log_rd, log_rn = (theta[..., i, None] for i in range(7))
        unique = np.minimum(x["U"], x["D"])
        log_g = _log_g(theta)[..., None]
        needed = log_g + beta / alpha * (unique + log_g)  # ln N that is optimal for U tokens
        needed = np.where(needed.real < x["N"], np.where(needed.real > 0, needed, 0), x["N"])
        log_d = _faded(x["D"] + 0 * needed, unique + 0 * needed, log_rd)
        log_n = _faded(x["N"] + 0 * needed, needed, log_rn)
        return logsumexp([log_e + 0 * needed, log_a - alpha * log_n, log_b - beta * log_d])

    with_jacobian = Law.with_jacobian
    optimum = Law.optimum


def _faded(log_all: np.ndarray, log_useful: np.ndarray, log_r: np.ndarray) -> np.ndarray:
    """ln of U (1 + R (1 - exp(-(X/U - 1)/R))); for R -> inf it is ln X."""
    beyond, decay = np.exp(log_all - log_useful) - 1, np.exp(log_r)
    return log_useful + np.log(1 - decay * np.expm1(-beyond / decay))


class Overtraining(SumOfPowers):
    """Gadre et al. 2024, eq. 4: M = D/N tokens a parameter move the loss, the exponent of C stays."""

    name = "overtraining"
    formula = "L = E + (a M^eta + b M^-eta) C^-eta"
    inputs = ("C", "M")
    parameters = (
        asymptote("E"),
        coefficient("a"),
        coefficient("b"),
        exponent("eta", (0.05, 0.1, 0.2, 0.4, 0.8)),
    )
    terms = (
        ("E", ()),
        ("a", (("C", "eta"), ("M", "-eta"))),
        ("b", (("C", "eta"), ("M", "eta"))),
    )

    def derived(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The best number of tokens a parameter."""
        return {"M_opt": (values["b"] / values["a"]) ** (0.5 / values["eta"])}

    def optimum(
        self, theta: np.ndarray, C: float, flops_per_nd: float = 6.0, given: Mapping[str, float] | None = None
    ) -> Optimum:
        """M_opt = (b/a)^(1/(2 eta)) at every budget."""
        _, log_a, log_b, eta = theta.T
        log_m = (log_b - log_a) / (2 * eta)
        total = np.log(C / flops_per_nd)
        log_n = np.clip((total - log_m) / 2, 0.0, total)
        return np.exp(log_n), np.exp(total - log_n)


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


class PowerOfSize(PowerLaw):
    """Loss of models trained to convergence: Kaplan et al. 2020, eq. 1.1, with E=0 and A = Nc^a."""

    name = "power-n"
    formula = "L = E + A/N^a"
    inputs = ("N",)
    terms = (("E", ()), ("A", (("N", "a"),)))


class PowerOfData(PowerLaw):
    """Loss of models that data alone limits: Hestness et al. 2017, eq. 1; Kaplan et al. 2020, eq. 1.2."""

    name = "power-d"
    formula = "L = E + A/D^a"
    inputs = ("D",)
    terms = (("E", ()), ("A", (("D", "a"),)))


class OptimalSize(SumOfPowers):
    """A list of optima: the best N (or batch, or rate, by --columns=N=batch) at every budget."""

    name = "n-opt"
    formula = "N = k C^a"
    inputs = ("C",)
    output = "N"
    parameters = (
        Parameter("k", tuple(np.arange(-30.0, 31, 10)), log=True, lower=-200.0, upper=300.0),
        Parameter("a", (-0.5, 0.0, 0.5, 1.0), lower=-4.0, upper=4.0),
    )
    terms = (("k", (("C", "-a"),)),)


class OptimalData(OptimalSize):
    """The best D at every budget (Llama 3, section 3.2.1: k = 0.299, a = 0.537)."""

    name = "d-opt"
    formula = "D = k C^a"
    output = "D"


class DownstreamExponential(Law):
    """Gadre et al. 2024, eq. 5: a task's error from the loss [nats/token], saturating at eps."""

    name = "downstream-exponential"
    formula = "error = eps - k exp(-gamma loss)"
    inputs = ("loss",)
    output = "error"
    parameters = (
        Parameter("eps", (-1.5, -0.7, -0.2, 0.0), log=True, lower=-7.0, upper=1.0),
        Parameter("k", (-1.0, 0.0, 1.0, 3.0), log=True, lower=-20.0, upper=50.0),
        Parameter("gamma", (0.3, 1.0, 2.0, 4.0), lower=1e-3, upper=50.0),
    )

    def log_loss(self, theta: np.ndarray, x: Inputs) -> np.ndarray:
        log_eps, log_k, gamma = (theta[..., i, None] for i in range(3))
        left = -np.expm1(log_k - log_eps - gamma * np.exp(x["loss"]))
        return log_eps + np.log(np.where(left.real > 1e-9, left, 1e-9))  # a negative error is no error


class DownstreamSigmoid(Law):
    """A task's error from the loss [nats/token], between a floor and a top (Llama 3, section 3.2.1)."""

    name = "downstream-sigmoid"
    formula = "error = floor + rise / (1 + exp(-k (loss - middle)))"
    inputs = ("loss",)
    output = "error"
    parameters = (
        Parameter("floor", (-4.0, -2.0), log=True, lower=-14.0, upper=0.0),
        Parameter("rise", (-1.5, -0.4), log=True, lower=-7.0, upper=1.0),
        Parameter("k", (-1.0, 0.5, 2.0), log=True, lower=-4.0, upper=5.0),
        Parameter("middle", (0.0, 0.5, 0.9, 1.2, 1.6), log=True, lower=-5.0, upper=4.0),
    )

    def log_loss(self, theta: np.ndarray, x: Inputs) -> np.ndarray:
        log_floor, log_rise, log_k, log_middle = (theta[..., i, None] for i in range(4))
        z = np.exp(log_k) * (np.exp(x["loss"]) - np.exp(log_middle))
        return logsumexp([log_floor + 0 * z, log_rise - logsumexp([0 * z, -z])])

    def derived(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The error that loss alone can't exceed."""
        return {"top": values["floor"] + values["rise"]}


def law(name: str | Law) -> Law:
    """The law of that name, or `Name` of FILE.py:Name; raises UserError with the nearest name."""
    if isinstance(name, Law):
        return name
    place, colon, own = name.rpartition(":")
    if colon and place.endswith(".py"):
        return load(pathlib.Path(place), own)
    if name not in Law.members:
        raise UserError(f"no law {name!r}; {nearest(name, Law.members)}; yours is --law=FILE.py:Name")
    return Law.members[name]()
