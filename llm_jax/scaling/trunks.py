"""What shared trunks (llm_jax/trunks.py) have saved of a sweep's compute, and how they look, from records."""

import dataclasses
import pathlib
from collections.abc import Mapping

import numpy as np
import pandas as pd

from llm_jax import files, records
from llm_jax.scaling.plots import Panel, Series
from llm_jax.scaling.results import Fit
from llm_jax.scaling.style import short


@dataclasses.dataclass(frozen=True)
class Savings:
    """Runs that are done, how many of them started from how many trunks, and two prices [FLOPs].

    unbroken: of every run from its first step to its last. spent: of the steps that were computed; diverged
    runs and steps that were lost to a kill count in neither.
    """

    runs: int
    branches: int
    trunks: int
    unbroken: float
    spent: float

    @property
    def share(self) -> float:
        return 1 - self.spent / self.unbroken

    def __str__(self) -> str:
        trunks = "1 trunk" if self.trunks == 1 else f"{self.trunks} trunks"
        return (
            f"{self.runs} runs, {self.branches} of them branches of {trunks}: {self.spent:.3g} FLOPs spent "
            f"instead of {self.unbroken:.3g}, {self.share:.0%} saved"
        )


def savings(runs: pd.DataFrame) -> Savings | None:
    """From the columns of result.json (trunk, steps_shared, flops_spent ...); None if nothing was shared."""
    if "trunk" not in runs:
        return None
    done = runs[runs["status"] == "done"]
    branches = done[done["steps_shared"] > 0]
    if not len(branches):
        return None
    shared = branches["flops_exact"].fillna(branches["flops_6nd"]) - branches["flops_spent"]
    spent = float(done["flops_spent"].sum())
    trunks = branches["trunk"].nunique()
    return Savings(len(done), len(branches), trunks, spent + float(shared.sum()), spent)


def constant_rate_curves(folder: str | pathlib.Path, runs: pd.DataFrame) -> pd.DataFrame:
    """The training curves of the longest run of each N in `runs`, where its rate is constant: a table of run,
    N, D, C and loss, for Approach 1.

    There, and nowhere in a schedule that ends at its own D, each point is what a shorter run would have
    reached too, but for its decay. Losses are means over a twentieth of the run, as one batch says little.
    """
    curves = []
    for run in runs.sort_values("D").groupby("N").tail(1).itertuples():
        rows = records.metrics(files.path(folder, run.run)).dropna(subset="loss")
        loss = rows["loss"].rolling(max(1, len(rows) // 20)).mean()
        constant = rows["learning_rate"] >= 0.999 * rows["learning_rate"].max()
        whole = constant.rolling(max(1, len(rows) // 20)).min() == 1  # none of the mean's batches in warm-up
        D = rows["step"] * run.D / run.steps
        curve = {"run": run.run, "N": run.N, "D": D, "C": 6.0 * run.N * D, "loss": loss}
        curves.append(pd.DataFrame(curve)[whole])
    return pd.concat(curves, ignore_index=True)


def tree_panels(folder: str | pathlib.Path, runs: pd.DataFrame) -> list[Panel]:
    """Learning rate and training loss of a trunk and what each branch adds to it, over tokens.

    runs: a trunk and its branches (columns run, steps, steps_shared, D). The loss is a mean over a hundredth
    of the longest run, as one batch says little, and begins after a fiftieth, whose fall would hide the rest.
    """
    rates, losses, window = [], [], max(1, int(runs["steps"].max()) // 100)
    for run in runs.sort_values("steps", ascending=False).itertuples():
        rows = records.metrics(files.path(folder, run.run)).dropna(subset="loss")
        tokens = rows["step"] * run.D / run.steps
        smooth = rows["loss"].rolling(window, min_periods=1).mean()
        own = (rows["step"] >= run.steps_shared).to_numpy()
        label = f"D = {short(run.D)}" + (
            f", own steps {run.steps - run.steps_shared:,}" if run.steps_shared else ""
        )
        rates.append(Series(label, tokens[own], rows["learning_rate"][own], mark="-"))
        shown = own & (rows["step"] > 2 * window).to_numpy()
        losses.append(Series(label, tokens[shown], smooth[shown], mark="-"))
    return [
        Panel("training tokens", "learning rate", rates, log=""),
        Panel("training tokens", "training loss [nats/token]", losses, log="y"),
    ]


def law_panels(laws: Mapping[str, Fit]) -> list[Panel]:
    """Loss over D at every size: points and lines of each law, by its name."""
    panels = []
    for name, law in laws.items():
        series = []
        for index, (N, runs) in enumerate(law.points.frame.groupby("N")):
            D = np.geomspace(runs["D"].min(), runs["D"].max(), 50)
            series.append(Series(f"N = {short(N)}", runs["D"], runs["loss"], group=index))
            series.append(Series(None, D, law.predict(N=float(N), D=D).value, mark="-", group=index))
        panels.append(Panel(f"D [tokens], {name}", "held-out loss [nats/token]", series))
    return panels
