"""Sweeps under known laws, and laws with few starts, for the tests of fits."""

import dataclasses

import numpy as np
import pandas as pd

from llm_jax.scaling.laws import Chinchilla, Law

TRUTH = dict(E=1.8172, A=482.01, alpha=0.3478, B=2085.43, beta=0.3658)


def sweep(
    truth: dict[str, float] = TRUTH,
    budgets: tuple[float, ...] = (1e18, 1e19, 1e20, 1e21, 1e22),
    sizes: int = 7,
    noise: float = 0.0,
    seed: int = 0,
    span: float = 4.0,
    off: float = 1.0,
) -> pd.DataFrame:
    """An isoFLOP sweep under a Chinchilla law, sizes around `off` times each optimum, log-normal noise."""
    E, A, alpha, B, beta = (truth[name] for name in ("E", "A", "alpha", "B", "beta"))
    C = np.repeat(budgets, sizes)
    N = off * optimum(truth, C) * np.tile(np.geomspace(1 / span, span, sizes), len(budgets))
    D = C / 6 / N
    scatter = np.random.default_rng(seed).normal(size=len(N))
    return pd.DataFrame(dict(N=N, D=D, C=C, loss=(E + A / N**alpha + B / D**beta) * np.exp(noise * scatter)))


def optimum(truth: dict[str, float], C: np.ndarray) -> np.ndarray:
    """N of lowest loss at C = 6 N D (Hoffmann et al. 2022, eq. 4)."""
    A, alpha, B, beta = (truth[name] for name in ("A", "alpha", "B", "beta"))
    return (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (C / 6) ** (beta / (alpha + beta))


def few_starts(law: type[Law] = Chinchilla) -> Law:
    """The same law with a handful of starts, for tests that are not about the grid."""
    grids = dict(E=(0.0,), A=(5.0, 10.0), alpha=(0.5,), B=(5.0, 10.0), beta=(0.5,), a=(0.2,))

    class Few(law):
        name = ""
        parameters = tuple(dataclasses.replace(p, grid=grids[p.name]) for p in law.parameters)

    return Few()
