"""Data mixing laws: the loss on each source as a function of the mixture that was trained on.

Ye et al. 2024 (arXiv:2403.16952): L_i = c_i + k_i exp(sum_j t_ij r_j) of the shares r. With two sources,
whose shares add up to 1, that is c + k exp(t r) in the source's own share r.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from llm_jax.config import UserError
from llm_jax.scaling import fits
from llm_jax.scaling.law import Inputs, Law, Parameter, asymptote, logsumexp
from llm_jax.scaling.results import Estimate, Fit, estimate
from llm_jax.scaling.tables import Points, SeedNoise, between_seeds


class Mixing(Law):
    """Ye et al. 2024 with two sources; r is the source's own share of the mixture."""

    name = "mixing"
    formula = "L = c + k exp(t r)"
    inputs = ("r",)
    parameters = (
        asymptote("c"),
        Parameter("k", (-4.0, -2.0, -1.0, 0.0, 1.0), log=True, lower=-20.0, upper=5.0),
        Parameter("t", (-20.0, -8.0, -4.0, -2.0, -1.0, -0.5, 0.5), lower=-200.0, upper=10.0),
    )

    def log_loss(self, theta: np.ndarray, x: Inputs) -> np.ndarray:
        log_c, log_k, t = (theta[..., index, None] for index in range(3))
        falling = log_k + t * np.exp(x["r"])
        return logsumexp([log_c + 0 * falling, falling])


# The law, and what it is held against: a power of the share, to which a rare source is worth more.
FORMS = {"exponential": (Mixing(), "r"), "power": ("power", "C")}


@dataclasses.dataclass(frozen=True)
class MixtureFit:
    """A law of each source's loss; tokens: of its held-out documents, by which the whole loss is a mean.

    For `forecast.make`, `at(shares)` is the fit of the whole loss at one mixture.
    """

    fits: Mapping[str, Fit]
    tokens: Mapping[str, float]
    points: pd.DataFrame
    form: str

    def logs(self, name: str, share: Any) -> tuple[np.ndarray, np.ndarray]:
        """ln of a source's loss at its shares [n], and its draws [S, n]."""
        return self.fits[name].logs({FORMS[self.form][1]: np.log(np.atleast_1d(share))})

    def predict(self, name: str, share: Any) -> Estimate:
        """A source's loss at its share or shares, with the law's interval."""
        return self.fits[name].predict(**{FORMS[self.form][1]: share})

    def one_run(self, name: str, share: float) -> Estimate:
        """What one more run is expected to measure: the law's interval and a run's noise around it."""
        return self.fits[name].one_run(**{FORMS[self.form][1]: share})

    def whole(self, shares: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """The loss on all held-out tokens at mixtures [n], and its draws [S, n]."""
        total, parts = (
            sum(self.tokens.values()),
            [(name, *self.logs(name, shares[name])) for name in self.fits],
        )
        count = min(len(draws) for *_, draws in parts)
        best = sum(self.tokens[name] / total * np.exp(log) for name, log, _ in parts)
        return best, sum(self.tokens[name] / total * np.exp(draws[:count]) for name, _, draws in parts)

    @property
    def seed_noise(self) -> SeedNoise:
        """Of the whole loss, of runs on one mixture."""
        return between_seeds(
            np.log(self.points["loss"].astype(float)), [self.points[f"share/{name}"] for name in self.fits]
        )

    def at(self, shares: Mapping[str, float]) -> "Mixed":
        return Mixed(self, dict(shares))

    def best_share(self, name: str) -> Estimate:
        """The share of `name` (of two sources) of lowest mean loss of both sources, within those trained.

        Raises UserError where that is the smallest or the largest share trained.
        """
        other = next(each for each in self.fits if each != name)
        trained = self.points[f"share/{name}"]
        shares = np.linspace(trained.min(), trained.max(), 400)
        (one, ones), (two, twos) = self.logs(name, shares), self.logs(other, 1 - shares)
        count = min(len(ones), len(twos))
        best = (np.exp(one) + np.exp(two)).argmin()
        if best in (0, len(shares) - 1):
            raise UserError(f"the best share of {name} lies at the edge of those trained, {shares[best]:.2f}")
        drawn = shares[(np.exp(ones[:count]) + np.exp(twos[:count])).argmin(1)]
        return estimate(float(shares[best]), drawn, self.fits[name].level)


@dataclasses.dataclass(frozen=True)
class Mixed:
    """The whole held-out loss of a run on one mixture, as `forecast.make` asks for it."""

    fit: MixtureFit
    shares: Mapping[str, float]
    approach: ClassVar[int] = 3  # of the laws that it is made of

    def extrapolate(self, N: float, D: float, C: float) -> tuple[float, np.ndarray]:
        best, draws = self.fit.whole(self.shares)
        return float(np.log(best[0])), np.log(draws[:, 0])

    @property
    def draws(self) -> np.ndarray:
        return self.fit.whole(self.shares)[1]

    @property
    def residuals(self) -> np.ndarray:
        """ln measured - ln fitted of the whole loss of every fitted run."""
        points = self.fit.points
        fitted, _ = self.fit.whole({name: points[f"share/{name}"] for name in self.fit.fits})
        return np.log(points["loss"].to_numpy(float)) - np.log(fitted)

    @property
    def freedom(self) -> int:
        return min(fit.freedom for fit in self.fit.fits.values())

    @property
    def noise(self) -> float:
        return float(np.sqrt(np.sum(self.residuals**2) / self.freedom))

    @property
    def formula(self) -> str:
        mixture = ", ".join(f"{name} {share:.3g}" for name, share in self.shares.items())
        return f"mean over held-out tokens of {next(iter(self.fit.fits.values())).formula} at {mixture}"

    @property
    def parameters(self) -> dict[str, Estimate]:
        """The parameters of every source's law, and what it says of the source at this mixture."""
        return {
            f"{name} {parameter}": number
            for name, fit in self.fit.fits.items()
            for parameter, number in (
                fit.parameters | {"loss": self.fit.one_run(name, self.shares[name])}
            ).items()
        }

    @property
    def points(self) -> Points:
        return dataclasses.replace(next(iter(self.fit.fits.values())).points, frame=self.fit.points)

    @property
    def conventions(self) -> Mapping[str, Any]:
        return next(iter(self.fit.fits.values())).conventions


def fit_mixture(
    runs: pd.DataFrame, sources: Sequence[str], form: str = "exponential", **options: Any
) -> MixtureFit:
    """A law for each of two sources.

    runs: a row a run with loss, and share/NAME, loss/NAME and held_out_tokens/NAME of every source; N, D and
    C for the forecast. options: of `fits.fit_law`. Raises UserError for other than two sources.
    """
    if len(sources) != 2:
        raise UserError(f"a mixing law in a source's own share takes two sources, not {len(sources)}")
    law, variable = FORMS[form]
    done = runs[runs["status"] == "done"] if "status" in runs else runs
    found = {}
    for name in sources:
        own = pd.DataFrame({variable: done[f"share/{name}"], "loss": done[f"loss/{name}"]})
        own["seed"] = done.get("seed", 0)
        found[name] = fits.fit_law(own, law, loss="l2", **options)
    tokens = {name: float(done[f"held_out_tokens/{name}"].iloc[0]) for name in sources}
    return MixtureFit(found, tokens, done, form)


def left_out(runs: pd.DataFrame, sources: Sequence[str], form: str) -> dict[str, float]:
    """By source, the rms of ln loss on each mixture in turn, predicted from the others."""
    share = f"share/{sources[0]}"
    squares: dict[str, list[float]] = {name: [] for name in sources}
    for value in runs[share].unique():
        rest, gone = runs[runs[share] != value], runs[runs[share] == value]
        fitted = fit_mixture(rest, sources, form, bootstrap=0)
        for name in sources:
            best, _ = fitted.logs(name, gone[f"share/{name}"])
            squares[name] += list((np.log(gone[f"loss/{name}"].to_numpy(float)) - best) ** 2)
    return {name: float(np.sqrt(np.mean(values))) for name, values in squares.items()}
