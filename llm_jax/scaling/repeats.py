"""What repeated tokens are worth, read off the runs themselves, beside Muennighoff's law (laws.py)."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from llm_jax.config import UserError
from llm_jax.scaling.tables import SeedNoise, between_seeds


class Repeats(NamedTuple):
    """One model on U unique tokens. losses: the mean over seeds at each number of epochs [nats/token].

    best: the epochs of the lowest loss. helped: up to how many epochs every doubling was better by more
    than chance (1: even the second epoch was not). worth: how many unique tokens would have given each loss,
    in epochs of U; NaN beyond what fresh runs reach.
    """

    N: float
    U: float
    epochs: np.ndarray
    losses: np.ndarray
    best: float
    helped: float
    worth: np.ndarray


def seed_noise(runs: pd.DataFrame) -> SeedNoise:
    """Of runs of one (N, D, U); UserError where none was repeated."""
    noise = between_seeds(np.log(runs["loss"].astype(float)), [runs[name] for name in ("N", "D", "U")])
    if noise.freedom < 1:
        raise UserError(
            "no run was repeated with another seed: there is nothing to tell a gain from chance by"
        )
    return noise


def repeats(runs: pd.DataFrame, level: float = 0.9) -> list[Repeats]:
    """Every (N, U) of a table with the columns N, D, U, loss and seed; fresh runs have U = D.

    A gain counts if it exceeds what seeds alone would show with probability (1 - level) / 2.
    """
    noise, freedom = seed_noise(runs)
    bound = float(stdtrit(freedom, (1 + level) / 2))  # Student's t; scipy.stats takes long to import
    fresh = runs[runs["U"] == runs["D"]]
    found = []
    for (N, U), cell in runs.groupby(["N", "U"]):
        table = np.log(cell["loss"].astype(float)).groupby(cell["D"]).agg(["mean", "count"])
        if len(table) < 2:
            continue
        epochs, means, counts = (
            table.index.to_numpy(float) / U,
            table["mean"].to_numpy(),
            table["count"].to_numpy(),
        )
        error = noise * np.sqrt(1 / counts[1:] + 1 / counts[:-1])
        gained = means[:-1] - means[1:] > bound * error
        alone = fresh[fresh["N"] == N].groupby("D")["loss"].mean()
        found.append(
            Repeats(
                float(N),
                float(U),
                epochs,
                np.exp(means),
                best=float(epochs[means.argmin()]),
                helped=float(epochs[np.argmin([*gained, False])]) if gained[0] else 1.0,
                worth=_worth(alone, np.exp(means)) / U,
            )
        )
    return found


def _worth(fresh: pd.Series, losses: np.ndarray) -> np.ndarray:
    """The D at which fresh runs (losses by D) have each of `losses`, linear in ln D and ln loss."""
    D, reached = np.log(fresh.index.to_numpy(float)), np.minimum.accumulate(np.log(fresh.to_numpy(float)))
    if len(D) < 2:
        return np.full(len(losses), np.nan)
    wanted = np.log(losses)
    found = np.interp(-wanted, -reached, D, left=np.nan, right=np.nan)
    return np.exp(found)


def helpful(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs up to the lowest mean loss of their (N, U): the law can't say that loss rises again."""
    means = runs.groupby(["N", "U", "D"])["loss"].mean()
    best = means.groupby(["N", "U"]).idxmin().map(lambda key: key[2])
    limit = [best[(N, U)] for N, U in zip(runs["N"], runs["U"], strict=True)]
    return runs[runs["D"].to_numpy() <= np.array(limit)]
