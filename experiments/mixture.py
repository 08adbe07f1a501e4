"""How does the loss on each source follow from a mixture's shares, and can a mixture be predicted unseen?

One model is trained on the same number of tokens of Python's source and of a Markov chain in several
proportions. The loss on each source is fitted by c + k exp(t r) in its own share r (Ye et al. 2024,
arXiv:2403.16952); what that says of two mixtures is written down before they are trained.

    python -m launch.local --config=experiments/mixture.py:cpu
    python -m launch.local --config=experiments/mixture.py:smoke

Cost: smoke 10 seconds, cpu a minute on 2 CPU cores; gpu and full not run.

Result (cpu, 2026-11-22), negative: the exponential form is too flat at both ends. It misses the whole loss of
an unseen mixture of 27% Python by 1.8% (measured 2.718, forecast 2.630 to 2.714 with 90%), that of 2% by 0.8%
(2.909; 2.838 to 2.932), but the loss on Python there by 3.0%. Mixtures predicted from the others miss by 1.5%
and 1.8% (a power of the share: 1.2% and 0.8%). The mean of both losses is lowest at a share of 0.50 (0.46 to
0.54) of Python.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llm_jax.config import UserError
from llm_jax.data import Markov, Mixture, Python, Text, Weighted
from llm_jax.ladder import execution
from llm_jax.models.transformer import Transformer
from llm_jax.optimizers import AdamW
from llm_jax.run import Cell, Checkpointing, Run, Sweep
from llm_jax.scaling import forecast as forecasting
from llm_jax.scaling import mixing, page, plots
from llm_jax.scaling.page import Answer, Drawing, Fitted, Page, Table, Tile, ranged
from llm_jax.scaling.plots import Panel, Series
from llm_jax.schedules import Cosine


@dataclasses.dataclass(frozen=True)
class Mixtures(Sweep, kind="mixture"):
    """shares: of the corpus' first source, the second takes the rest; holdouts: those that are predicted."""

    shares: tuple[float, ...] = (0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95)
    holdouts: tuple[float, ...] = (0.02, 0.27)
    seeds: int = 2
    bootstrap: int = 1000

    def validate(self) -> None:
        if len(set(self.shares)) < 5 or self.seeds < 1 or self.bootstrap < 100:
            raise UserError("sweep: a law of three parameters takes 5 shares; seeds >= 1, bootstrap >= 100")
        if not all(0.001 <= share <= 0.999 for share in (*self.shares, *self.holdouts)):
            raise UserError("sweep: shares lie between 0.001 and 0.999; both sources are scored in every run")


SCALES = {
    "cpu": Mixtures(),
    "smoke": Mixtures((0.05, 0.2, 0.5, 0.8, 0.95), (0.35,), seeds=1, bootstrap=100),
    "gpu": Mixtures(seeds=3),
    "full": Mixtures(seeds=3),
}
# layers, width, steps
SIZES = {"smoke": (1, 16, 60), "gpu": (6, 256, 10_000), "full": (12, 768, 40_000)}
DATA = {
    "gpu": {"sequence_length": 256, "batch_size": 64},
    "full": {"sequence_length": 1024, "batch_size": 256},
}


def get_config(scale: str) -> Run:
    """The run whose mixture the sweep varies. full wants two corpora of yours of some billion tokens each."""
    layers, width, steps = SIZES.get(scale, (1, 32, 400))
    many = 2**20 if scale in DATA else 2**13 if scale == "cpu" else 2**11
    corpus = Mixture((Weighted(Python(packages=scale in DATA)), Weighted(Markov(documents_count=many))))
    small = {"sequence_length": 64, "batch_size": 16, "held_out_bytes": 2**14}
    data = Text(corpus, **DATA.get(scale, small))
    return Run(
        model=Transformer(layers=layers, width=width, heads=max(1, width // 16)),
        data=data,
        optimizer=AdamW(learning_rate=0.3 / width, schedule=Cosine(final_fraction=0.0)),
        tokens=steps * data.tokens_per_step,
        name=f"mixture-{scale}",
        sweep=SCALES[scale],
        execution=execution(scale, checkpoint=Checkpointing(at_end=False)),
    )


def sweep(base: Run) -> list[Run]:
    seeds = range(base.seed, base.seed + base.sweep.seeds)
    return [run_of(base, share, seed, "grid") for share in base.sweep.shares for seed in seeds]


def holdout(base: Run) -> list[Run]:
    return [run_of(base, share, base.seed, "holdout") for share in base.sweep.holdouts]


def run_of(base: Run, share: float, seed: int, role: str) -> Run:
    parts = base.data.corpus.sources()
    if len(parts) != 2:
        raise UserError("this experiment mixes two sources: data.corpus has two parts")
    weighted = tuple(
        dataclasses.replace(part, weight=weight)
        for part, weight in zip(parts, (share, 1 - share), strict=True)
    )
    data = dataclasses.replace(base.data, corpus=dataclasses.replace(base.data.corpus, parts=weighted))
    return dataclasses.replace(
        base, data=data, seed=seed, name=f"{role}-{share:g}-seed{seed}", cell=Cell(role)
    )


# ---- the law ----


def points(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The runs that are done with the share of each source, and N, D and C; and the sources' names."""
    done = runs[runs["status"] == "done"]
    if not len(done):
        raise UserError("no run of this sweep is done: there is nothing to fit")
    sources = [name.removeprefix("loss/") for name in done if name.startswith("loss/")]
    weights = [done[f"data.corpus.parts.{number}.weight"].astype(float) for number in range(len(sources))]
    shares = {f"share/{name}": weight / sum(weights) for name, weight in zip(sources, weights, strict=True)}
    return done.assign(N=done["N_matmul"], C=done["flops_6nd_matmul"], **shares), sources


def fit(base: Run, runs: pd.DataFrame, form: str = "exponential") -> mixing.MixtureFit:
    table, sources = points(runs[runs["role"] == "grid"])
    return mixing.fit_mixture(table, sources, form, bootstrap=base.sweep.bootstrap)


def forecast(base: Run, runs: pd.DataFrame, run: Run) -> forecasting.Forecast:
    """The loss on all held-out tokens, and on each source, that a mixture's run will reach."""
    fitted, table = fit(base, runs), points(runs)[0].iloc[0]
    weights = [part.weight for part in run.data.corpus.sources()]
    shares = dict(zip(fitted.fits, weights, strict=True))
    at = {name: table[name] for name in ("N", "D", "C")}
    return forecasting.make(fitted.at(shares), **at, seed_noise=fitted.seed_noise)


def report(base: Run, folder: Path, runs: pd.DataFrame, forecasts: Mapping[str, Any]) -> dict[str, Any]:
    """Fits, checks what was forecast, prints and writes the report; returns its numbers."""
    table, sources = points(runs)
    grid, first = table[table["role"] == "grid"], sources[0]
    every = {form: fit(base, runs, form) for form in mixing.FORMS}
    law, answers, checks, warnings, best = every["exponential"], [], [], [], None
    for run in table[table["role"] == "holdout"].to_dict("records"):
        made, share = forecasts[run["identity"]], run[f"share/{first}"]
        check = forecasting.check(made, run["loss"], grid)
        said = "forecast {:.4f} ({:.4f} to {:.4f})".format(made.loss, *made.intervals[0.9])
        line = f"Unseen mixture of {share:.0%} {first}: {said}, measured {run['loss']:.4f}"
        answers.append(Answer(f"{line} ({check.relative_error:+.2%}).", made.method, check.covered[0.9]))
        for name in sources:
            told = {form: each.one_run(name, run[f"share/{name}"]) for form, each in every.items()}
            checks.append({"share": share, "source": name, "measured": run[f"loss/{name}"], **told})
    try:
        best = law.best_share(first)
        answers.append(Answer(f"The mean of both losses is lowest at a share of {ranged(best)} of {first}."))
    except UserError as error:
        warnings.append(str(error))
    warnings += [f"{name}: {text}" for name, each in law.fits.items() for text in each.warnings]
    missed = {form: mixing.left_out(grid, sources, form) for form in every}
    forms = [[form, *(f"{missed[form][name]:.2%}" for name in sources)] for form in every]
    header = [f"share of {first}", "loss on", "forecast", "measured", *(f"miss, {form}" for form in every)]
    rows = []
    for each in checks:
        errors = [f"{np.log(each['measured'] / each[form].value):+.2%}" for form in every]
        said = ranged(each["exponential"], ".4f")
        rows.append([f"{each['share']:.2f}", each["source"], said, f"{each['measured']:.4f}", *errors])
    drawing = Drawing("mixture", "Loss on each source by its share.", by_share(law, table))
    result = Page(
        title=f"Mixtures: {base.name}",
        question=__doc__.splitlines()[0],
        tiles=[Tile(ranged(best), f"best share of {first}")],
        answers=answers,
        warnings=warnings,
        figures=[drawing],
        fits=[parameters(name, each) for name, each in law.fits.items()],
        tables=[
            ("Unseen mixtures, with 90% intervals for one run", Table(header, rows, (0, 1))),
            ("Each mixture predicted from the others, rms of ln loss", Table(["form", *sources], forms)),
        ],
        notes=[f"the rate is the same for every mixture; {len(grid)} runs of {grid['D'].iloc[0]:,} tokens"],
    )
    page.show(folder, result)
    return {
        "laws": {form: {name: f.to_json() for name, f in each.fits.items()} for form, each in every.items()},
        "left_out": missed,
        "best_share": best and best._asdict(),
        "unseen": checks,
        "warnings": warnings,
    }


def parameters(name: str, each: Any) -> Fitted:
    header = ["", "value", f"{each.level:.0%} low", "high"]
    rows = [[key, *(f"{part:.4g}" for part in number[:3])] for key, number in each.parameters.items()]
    note = f"{len(each.residuals)} runs, residuals {np.sqrt(np.mean(each.residuals**2)):.2%} rms."
    return Fitted(f"{name}: {each.law.formula}", Table(header, rows), note)


def by_share(law: mixing.MixtureFit, table: pd.DataFrame) -> Any:
    """Each source's loss against its own share: runs, law, and the mixtures that were forecast."""
    grid, held, panels = law.points, table[table["role"] == "holdout"], []
    for name in law.fits:
        along = np.geomspace(table[f"share/{name}"].min(), table[f"share/{name}"].max(), 100)
        told = law.predict(name, along)
        series = [
            Series("runs", grid[f"share/{name}"], grid[f"loss/{name}"], group="law"),
            Series("law (90%)", along, told.value, told.low, told.high, "-", "law"),
            Series("unseen mixtures", held[f"share/{name}"], held[f"loss/{name}"], group="held"),
        ]
        panels.append(Panel(f"share of {name}", f"loss on {name} [nats/token]", series, log="x"))
    return plots.draw("Loss by mixture", panels, "c + k exp(t r), r the source's own share.")
