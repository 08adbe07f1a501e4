"""What counting N without embeddings does to the exponent (Pearce and Song 2024, arXiv:2406.12907).

If loss follows all parameters, L = E + A/N_total^alpha + B/D^beta, and embeddings add omega N^power to the N
others (power 1/3 where depth goes with width, 1/2 at a fixed depth), then the best N at C = 6 N D doesn't
grow as C^(beta/(alpha+beta)): not even as a power of C, except far from where both kinds are equally many.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from llm_jax.scaling import fits
from llm_jax.scaling.powers import power_law
from llm_jax.scaling.results import Estimate, Fit, gap

# Their fit to Chinchilla's models, N_total = N + 47491 N^(1/3), whose vocabulary is 32,000.
OMEGA_PER_TOKEN = 47491 / 32000


def exponent(fit: Fit, theta: np.ndarray) -> np.ndarray:
    """a of N_opt ~ C^a [S] by laws theta [S, P]."""
    return fit.values(theta)["a"]


def local_exponent(
    N: np.ndarray | float, omega: float, alpha: float, beta: float, power: float = 1 / 3
) -> np.ndarray | float:
    """d ln N_opt / d ln C where N, the best size without embeddings, is optimal: their g, for any `power`.

    Both counts leave embeddings out: C = 6 N D. omega 0 gives Chinchilla's beta / (alpha + beta).
    """
    embeddings = omega * np.asarray(N, float) ** power
    growth = (N + power * embeddings) / (N + embeddings)  # d ln N_total / d ln N
    bend = (N + power**2 * embeddings) / (N + power * embeddings)  # d ln (N dN_total/dN) / d ln N
    return 1 / (1 + ((1 + alpha) * growth - bend) / beta)


@dataclasses.dataclass(frozen=True)
class Recount:
    """The same runs fitted with N counting everything (`total`) and without embeddings (`body`).

    predicted: a of the second if loss follows all parameters with given exponents, whose own a is `given`.
    local: d ln N_opt / d ln C with them in the middle of the sizes, by `local_exponent`.
    """

    total: Fit
    body: Fit
    given: float
    predicted: float
    local: float

    @property
    def shift(self) -> Estimate:
        """How far a moves when embeddings don't count; both fits to each draw of runs give the interval."""
        return gap(self.total, self.body, exponent)

    @property
    def predicted_shift(self) -> float:
        return self.predicted - self.given

    @property
    def agrees(self) -> bool:
        return bool(self.shift.low <= self.predicted_shift <= self.shift.high)


def recount(
    runs: pd.DataFrame, exponents: Mapping[str, float] | None = None, bootstrap: int = 1000
) -> Recount:
    """Both fits (Approach 3) of a table with N_total, N_non_embedding, N_embedding, D and loss.

    exponents: alpha and beta that the prediction takes from elsewhere (another vocabulary's runs); without
    them it takes those of `total`, and then says little: the same runs were fitted twice. The predicting
    law's losses at these runs, without noise, are fitted with N counting the body.
    """

    def law(table: pd.DataFrame, column: str, counting: str, bootstrap: int, **options: Any) -> Fit:
        return fits.fit_law(table, columns={"N": column}, bootstrap=bootstrap, counting=counting, **options)

    all_of_it, rest = ("N_total", "all parameters"), ("N_non_embedding", "parameters without embeddings")
    total = law(runs, *all_of_it, bootstrap)
    predicting = law(runs, *all_of_it, 0, fixed=exponents) if exponents else total
    alpha, beta = (predicting.parameters[name].value for name in ("alpha", "beta"))
    noiseless = predicting.predict(N=runs["N_total"].astype(float), D=runs["D"].astype(float)).value
    sizes = runs["N_non_embedding"].astype(float)
    power, omega = power_law(sizes, runs["N_embedding"])
    return Recount(
        total,
        body=law(runs, *rest, bootstrap),
        given=beta / (alpha + beta),
        predicted=law(runs.assign(loss=noiseless), *rest, 0).parameters["a"].value,
        local=float(local_exponent(np.exp(np.log(sizes).mean()), omega, alpha, beta, power)),
    )
