"""Does leaving embeddings out of N move the exponent of N_opt ~ C^a, as Pearce and Song predict?

Kaplan et al. 2020 found a = 0.73 without embeddings, Hoffmann et al. 2022 found 0.50 with them. Pearce and Song
2024 (arXiv:2406.12907) explain it: if loss follows all parameters, the same runs counted without embeddings
show a larger exponent, the more so the larger the vocabulary. One sweep is trained at several vocabularies
and fitted twice, with N counting everything and with N counting the body alone (Approach 3). The prediction
is what the first law makes of the second count: its own losses, without noise, fitted with the other N.

    python -m launch.local --config=experiments/counting.py:cpu --workers=2
    python -m launch.local --config=experiments/counting.py:smoke --workers=2

Cost: smoke 20 seconds, cpu 5 minutes, each on 2 CPU cores; gpu an hour on one H100, full a day on a pod (not
run, estimated).

The page also gives their local exponent where this sweep's sizes lie (scaling/embeddings.py), and what it is
for Chinchilla's models: 0.52, 0.61 and 0.94 at 5 million parameters and a vocabulary of 256, 4,096 and 32,768.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llm_jax.config import UserError
from llm_jax.data import Bytes, SentencePiece, Tokenizer
from llm_jax.ladder import Shapes, run_of, text
from llm_jax.models.transformer import Transformer
from llm_jax.optimizers import AdamW
from llm_jax.run import Run, Sweep
from llm_jax.scaling import fits, isoflop, page, plots
from llm_jax.scaling.embeddings import OMEGA_PER_TOKEN, local_exponent
from llm_jax.scaling.page import Answer, Drawing, Page, Table, Tile
from llm_jax.scaling.report import fitted
from llm_jax.schedules import Cosine

COUNTS = {"N_total": "all parameters", "N_non_embedding": "parameters without embeddings"}


@dataclasses.dataclass(frozen=True)
class Counting(Sweep, kind="counting"):
    """Every shape (width, layers) on every number of tokens at every vocabulary; the smallest is bytes."""

    vocabularies: tuple[int, ...]
    shapes: Shapes
    tokens: tuple[int, ...]
    rate_exponent: float = -0.7
    bootstrap: int = 1000

    def validate(self) -> None:
        if min(len(self.vocabularies), len(self.shapes), len(self.tokens)) < 2 or self.bootstrap < 100:
            raise UserError("sweep needs 2 vocabularies, shapes and numbers of tokens, and bootstrap >= 100")
        if self.vocabularies[0] != Bytes.vocabulary or min(self.vocabularies[1:]) < 260:
            raise UserError(
                f"sweep.vocabularies begin with {Bytes.vocabulary} (bytes), the others have 260 or more"
            )


# Depth goes with width, so that embeddings grow as the cube root of the rest.
SCALES = {
    "cpu": Counting(
        (257, 4096, 8192), ((8, 1), (12, 2), (16, 2), (24, 3), (32, 4)), tuple(2**n for n in range(15, 19))
    ),
    "smoke": Counting((257, 512), ((4, 1), (8, 1), (16, 2)), (2**12, 2**13, 2**14), bootstrap=100),
    "gpu": Counting(
        (257, 4096, 32768),
        tuple((width, width // 16) for width in (32, 48, 64, 96, 128, 192)),
        tuple(2**n for n in range(20, 25)),
    ),
    "full": Counting(
        (257, 4096, 32768),
        tuple((width, width // 40) for width in (160, 240, 320, 480, 640)),
        tuple(2**n for n in range(26, 32)),
    ),
}


def get_config(scale: str) -> Run:
    data = dataclasses.replace(text(scale), held_out_bytes=2**16)
    if scale in ("smoke", "cpu"):
        data = dataclasses.replace(data, sequence_length=64, batch_size=4)
    return Run(
        model=Transformer(activation="gelu"),  # matrices of 12 x layers x width^2, as the prediction has it
        data=data,
        optimizer=AdamW(learning_rate=6e-3, schedule=Cosine(warmup_fraction=0.05, final_fraction=0.0)),
        name=f"counting-{scale}",
        sweep=SCALES[scale],
    )


def sweep(base: Run) -> list[Run]:
    runs = []
    for vocabulary in base.sweep.vocabularies:
        data = dataclasses.replace(base.data, tokenizer=tokenizer(vocabulary))
        for width, layers in base.sweep.shapes:
            for D in base.sweep.tokens:
                cell = {"name": f"V{vocabulary}-{width}x{layers}-{D}", "role": "grid", "budget_flops": None}
                runs.append(
                    run_of(
                        dataclasses.replace(base, data=data),
                        cell | {"width": width, "layers": layers, "D": D},
                    )
                )
    return runs


def tokenizer(vocabulary: int) -> Tokenizer:
    return Bytes() if vocabulary == Bytes.vocabulary else SentencePiece(vocabulary=vocabulary)


@dataclasses.dataclass(frozen=True)
class Recount:
    """One vocabulary's runs under both counts; predicted: the exponent of the second by the law of the first."""

    vocabulary: int
    total: fits.Fit
    body: fits.Fit
    predicted: float
    local: float

    @property
    def agrees(self) -> bool:
        a = self.body.parameters["a"]
        return bool(a.low <= self.predicted <= a.high)


def recount(vocabulary: int, runs: pd.DataFrame, bootstrap: int) -> Recount:
    """Fits the runs of one vocabulary with N counting everything, and with N counting the body alone."""

    def law(table: pd.DataFrame, column: str, bootstrap: int) -> fits.Fit:
        return fits.fit_law(table, columns={"N": column}, bootstrap=bootstrap, counting=COUNTS[column])

    total, body = (law(runs, column, bootstrap) for column in COUNTS)
    noiseless = total.predict(N=runs["N_total"].astype(float), D=runs["D"].astype(float)).value
    predicted = law(runs.assign(loss=noiseless), "N_non_embedding", 0).parameters["a"].value
    power, omega = isoflop.power_law(runs["N_non_embedding"], runs["N_embedding"])
    middle = np.exp(np.log(runs["N_non_embedding"].astype(float)).mean())
    exponents = (total.parameters[name].value for name in ("alpha", "beta"))
    return Recount(
        vocabulary, total, body, predicted, float(local_exponent(middle, omega, *exponents, power))
    )


def report(base: Run, folder: Path, runs: pd.DataFrame, _: Mapping[str, Any]) -> dict[str, Any]:
    """Fits, prints and writes the report; returns its numbers."""
    done = runs[runs["status"] == "done"]
    of = done["identity"].map({run.identity(): run.data.vocabulary for run in sweep(base)})
    found = [recount(int(v), group, base.sweep.bootstrap) for v, group in done.groupby(of)]
    content = Page(
        title=f"Counting parameters: {base.name}",
        question=__doc__.splitlines()[0],
        tiles=[
            Tile(
                f"{r.total.parameters['a'].value:.2f} → {r.body.parameters['a'].value:.2f}",
                f"a with and without embeddings, vocabulary {r.vocabulary:,}",
                f"predicted {r.predicted:.2f}",
            )
            for r in found
        ],
        answers=[*map(moved, found), constant(found)],
        warnings=[
            f"vocabulary {r.vocabulary:,}, {COUNTS[c]}: {w}"
            for r in found
            for c, fit in zip(COUNTS, (r.total, r.body), strict=True)
            for w in fit.warnings
        ],
        figures=[
            Drawing("exponents", "The exponent under both counts, and what is predicted.", drawing(found))
        ],
        fits=[
            fitted(fit)._replace(heading=f"Vocabulary {r.vocabulary:,}, N: {fit.conventions['N']}")
            for r in found
            for fit in (r.total, r.body)
        ],
        tables=[("Exponent a of N_opt ~ C^a, C = 6 N D of the same count", exponents(found))],
        conventions={"fits": "L = E + A/N^alpha + B/D^beta, Huber 1e-3 on ln L; a = beta / (alpha + beta)"},
    )
    page.show(folder, content)
    return {
        "vocabularies": [
            {
                "vocabulary": r.vocabulary,
                "total": r.total.to_json(),
                "non_embedding": r.body.to_json(),
                "predicted": r.predicted,
                "local_exponent": r.local,
            }
            for r in found
        ]
    }


def moved(r: Recount) -> Answer:
    """What leaving embeddings out did at one vocabulary, against the prediction."""
    total, body = r.total.parameters["a"], r.body.parameters["a"]
    place = "inside" if r.agrees else "OUTSIDE"
    return Answer(
        f"Vocabulary {r.vocabulary:,}: a is {total.value:.2f} counting everything, {body.value:.2f} without "
        f"embeddings; predicted {r.predicted:.2f}, {place} its {r.body.level:.0%} interval.",
        f"Intervals {total.low:.2f} to {total.high:.2f} and {body.low:.2f} to {body.high:.2f}.",
        r.agrees,
    )


def constant(found: list[Recount]) -> Answer:
    """Whether one exponent serves all vocabularies if everything counts, and if embeddings don't."""

    def shared(laws: list[fits.Fit]) -> bool:
        intervals = [law.parameters["a"] for law in laws]
        return max(i.low for i in intervals) <= min(i.high for i in intervals)

    total, body = shared([r.total for r in found]), shared([r.body for r in found])
    says = {
        True: "one exponent fits the intervals of all vocabularies",
        False: "no one exponent fits them all",
    }
    return Answer(
        f"Counting everything, {says[total]}; without embeddings, {says[body]}.",
        "Wide intervals share an exponent easily: that one fits is no proof that it is the same."
        * (total or body),
        total,
    )


def exponents(found: list[Recount]) -> Table:
    rows = []
    for r in found:
        shown = [r.total.parameters["a"], r.body.parameters["a"]]
        theirs = local_exponent(5e6, OMEGA_PER_TOKEN * r.vocabulary, 0.3478, 0.3658)
        rows.append(
            [f"{r.vocabulary:,}", *(f"{a.value:.3f} ({a.low:.2f} to {a.high:.2f})" for a in shown)]
            + [f"{r.predicted:.3f}", f"{r.local:.2f}", f"{theirs:.2f}"]
        )
    header = [
        "vocabulary",
        "all parameters",
        "without embeddings",
        "predicted",
        "local",
        "Chinchilla's at 5M",
    ]
    return Table(header, rows)


def drawing(found: list[Recount]) -> Any:
    """Draws the exponents over the vocabulary."""
    V = [r.vocabulary for r in found]
    series = []
    for label, fits_ in (
        ("all parameters", [r.total for r in found]),
        ("without embeddings", [r.body for r in found]),
    ):
        a = [fit.parameters["a"] for fit in fits_]
        series.append(
            plots.Series(label, V, *([getattr(e, part) for e in a] for part in ("value", "low", "high")))
        )
    series.append(
        plots.Series("predicted without embeddings", V, [r.predicted for r in found], mark="--", group=1)
    )
    panel = plots.Panel("vocabulary", "a in N_opt ~ C^a", series, log="x")
    return lambda theme: plots.draw("The exponent and what N counts", [panel], theme=theme)
