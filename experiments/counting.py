"""Does leaving embeddings out of N move the exponent of N_opt ~ C^a, as Pearce and Song predict?

Kaplan et al. 2020 found a = 0.73 without embeddings, Hoffmann et al. 2022 found 0.50 with them. Pearce and
Song 2024 (arXiv:2406.12907) explain it: if loss follows all parameters, the same runs counted without
embeddings show a larger exponent. One sweep is trained at several vocabularies and fitted twice (Approach 3),
with N counting everything and with N counting the body alone. The prediction takes alpha and beta from the
bytes' runs: a law of all parameters with these exponents is fitted to another vocabulary's runs, and its
losses there, without noise, are fitted with the other N.

    python -m launch.local --config=experiments/counting.py:cpu --workers=2
    python -m launch.local --config=experiments/counting.py:smoke --workers=2

Cost: smoke 20 seconds on 2 CPU cores, cpu 5 minutes; not run, estimated: gpu an hour on one H100, full a
day on a pod.

Result (cpu, 2026-11-22), 90% intervals: without embeddings a moves by +0.21 (+0.12 to +0.39) at a vocabulary
of 4,096 and +0.31 (+0.15 to +0.46) at 8,192; predicted are +0.48 and +0.42. With bytes it moves by +0.29
(+0.18 to +0.37). It moves the way they say at all three; but the amount is refuted at 4,096, and the shift
doesn't grow with the vocabulary. What they predict of it is not shown at this size.

The page also gives their local exponent in the middle of this sweep's sizes (scaling/embeddings.py), and what
it is for Chinchilla's models of 5 million parameters: 0.52, 0.61 and 0.94 at a vocabulary of 256, 4,096 and
32,768.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llm_jax.config import UserError
from llm_jax.data import Bytes, SentencePiece, Tokenizer
from llm_jax.ladder import OPTIMIZER, Shapes, execution, octaves, rectangle, text
from llm_jax.models.transformer import Transformer
from llm_jax.run import Run, Sweep
from llm_jax.scaling import page, plots
from llm_jax.scaling.embeddings import OMEGA_PER_TOKEN, Recount, exponent, local_exponent, recount
from llm_jax.scaling.page import Answer, Drawing, Page, Table, ranged
from llm_jax.scaling.report import fitted, too_small
from llm_jax.scaling.results import gap, told


@dataclasses.dataclass(frozen=True)
class Counting(Sweep, kind="counting"):
    """Every shape (width, layers) on every number of tokens at every vocabulary; the smallest is bytes."""

    vocabularies: tuple[int, ...]
    shapes: Shapes
    tokens: tuple[int, ...]
    rate_exponent: float = -0.7
    horizon_exponent: float = 0.0
    bootstrap: int = 1000

    def validate(self) -> None:
        if min(len(self.vocabularies), len(self.shapes), len(self.tokens)) < 2 or self.bootstrap < 50:
            raise UserError(
                "sweep.vocabularies, sweep.shapes and sweep.tokens need 2 or more, sweep.bootstrap 50 or more"
            )
        if self.vocabularies[0] != Bytes.vocabulary or min(self.vocabularies[1:]) < 260:
            raise UserError(
                f"sweep.vocabularies begin with {Bytes.vocabulary} (bytes), the others have 260 or more"
            )


def deep(widths: Sequence[int], aspect: int) -> Shapes:
    """Depth goes with width, so that embeddings grow as the cube root of the rest."""
    return tuple((width, width // aspect) for width in widths)


SCALES = {
    "cpu": Counting((257, 4096, 8192), ((8, 1), (12, 2), (16, 2), (24, 3), (32, 4)), octaves(15, 18)),
    "smoke": Counting((257, 512), ((4, 1), (12, 1)), octaves(12, 14), bootstrap=50),
    "gpu": Counting((257, 4096, 32768), deep((32, 48, 64, 96, 128, 192), 16), octaves(20, 24)),
    "full": Counting((257, 4096, 32768), deep((160, 240, 320, 480, 640), 40), octaves(26, 31)),
}


def get_config(scale: str) -> Run:
    data = dataclasses.replace(text(scale), held_out_bytes=2**16)
    if scale in ("smoke", "cpu"):
        data = dataclasses.replace(data, sequence_length=64, batch_size=4)
    return Run(
        model=Transformer(activation="gelu"),  # matrices of 12 x layers x width^2, as the prediction has it
        data=data,
        optimizer=OPTIMIZER,
        name=f"counting-{scale}",
        sweep=SCALES[scale],
        execution=execution(scale),
    )


def sweep(base: Run) -> list[Run]:
    runs = []
    for vocabulary in base.sweep.vocabularies:
        data = dataclasses.replace(base.data, tokenizer=tokenizer(vocabulary))
        runs += rectangle(dataclasses.replace(base, data=data), base.sweep.tokens, f"V{vocabulary}-")
    return runs


def tokenizer(vocabulary: int) -> Tokenizer:
    return Bytes() if vocabulary == Bytes.vocabulary else SentencePiece(vocabulary=vocabulary)


def report(base: Run, folder: Path, runs: pd.DataFrame, _: Mapping[str, Any]) -> dict[str, Any]:
    """Fits, prints and writes the report; returns its numbers."""
    done = runs[runs["status"] == "done"]
    vocabulary = done["identity"].map({run.identity(): run.data.vocabulary for run in sweep(base)})
    found, exponents = {}, None
    for V, group in done.sort_values(["N_non_embedding", "D"]).groupby(vocabulary):
        found[int(V)] = recount(group, exponents, base.sweep.bootstrap)
        law = found[min(found)].total.parameters
        exponents = {name: law[name].value for name in ("alpha", "beta")}
    laws = [(V, law) for V, r in found.items() for law in (r.total, r.body)]
    drawn = "The exponent under both counts; dashed: predicted without embeddings."
    content = Page(
        title=f"Counting parameters: {base.name}",
        question=__doc__.splitlines()[0],
        caution=next(filter(None, (too_small(law) for _, law in laws)), ""),
        answers=[*(moved(V, r) for V, r in list(found.items())[1:]), constant(found)],
        warnings=[
            f"V = {V:,}, N: {law.conventions['N']}: {text}" for V, law in laws for text in law.warnings
        ],
        figures=[Drawing("exponents", drawn, drawing(found))],
        fits=[fitted(law)._replace(heading=f"V = {V:,}, N: {law.conventions['N']}") for V, law in laws],
        tables=[("Exponent a of N_opt ~ C^a, where C = 6 N D of the same N", compared(found))],
        conventions={"fits": "L = E + A/N^alpha + B/D^beta, Huber 1e-3 on ln L; a = beta / (alpha + beta)"},
    )
    page.show(folder, content)
    return {
        "vocabularies": {
            V: {"all": r.total.to_json(), "without_embeddings": r.body.to_json()}
            | {"shift": r.shift._asdict(), "predicted_shift": r.predicted_shift, "local_exponent": r.local}
            for V, r in found.items()
        }
    }


def moved(vocabulary: int, r: Recount) -> Answer:
    """What leaving embeddings out did at one vocabulary, against the prediction."""
    total, body, shift = r.total.parameters["a"], r.body.parameters["a"], r.shift
    return Answer(
        f"Vocabulary {vocabulary:,}: without embeddings a moves by {shift.value:+.3f} ({shift.low:+.3f} to "
        f"{shift.high:+.3f}); predicted: {r.predicted_shift:+.3f}, {'inside' if r.agrees else 'OUTSIDE'}.",
        f"{r.body.level:.0%} intervals; a is {ranged(total, '.2f')} counting everything, "
        f"{ranged(body, '.2f')} without.",
        r.agrees,
    )


def constant(found: Mapping[int, Recount]) -> Answer:
    """How far a moves from the smallest vocabulary to the others, under both counts.

    Cells are the same at every vocabulary, so they are drawn together.
    """
    (smallest, first), *others = found.items()
    moves = {V: (gap(first.total, r.total, exponent), gap(first.body, r.body, exponent)) for V, r in others}
    total, body = (
        "; ".join(f"{told(each[kind], '+.2f')} at {V:,}" for V, each in moves.items()) for kind in (0, 1)
    )
    return Answer(
        f"Beside a vocabulary of {smallest:,}, a moves counting everything by {total}.",
        f"Without embeddings by {body}. {first.body.level:.0%} intervals of differences.",
    )


def compared(found: Mapping[int, Recount]) -> Table:
    rows = []
    for V, r in found.items():
        shown = [ranged(law.parameters["a"], ".2f") for law in (r.total, r.body)]
        shifts = [ranged(r.shift, "+.3f"), f"{r.predicted_shift:+.3f}"]
        theirs = local_exponent(5e6, OMEGA_PER_TOKEN * V, 0.3478, 0.3658)
        rows.append([f"{V:,}", *shown, *shifts, f"{r.local:.2f}", f"{theirs:.2f}"])
    columns = [
        "V",
        "all parameters",
        "without embeddings",
        "shift",
        "predicted",
        "local",
        "Chinchilla's at 5M",
    ]
    return Table(columns, rows)


def drawing(found: Mapping[int, Recount]) -> Any:
    """Draws the exponents over the vocabulary."""
    V, series = np.array(list(found)), []
    laws = {"all": [r.total for r in found.values()], "without embeddings": [r.body for r in found.values()]}
    for group, (label, own) in enumerate(laws.items()):
        value, low, high, _ = zip(*(law.parameters["a"] for law in own), strict=True)
        beside = V * 1.03 ** (2 * group - 1)  # so that one interval doesn't hide the other
        series.append(plots.Series(label, beside, value, low, high, group=group))
    predicted = [r.total.parameters["a"].value + r.predicted_shift for r in found.values()]
    series.append(plots.Series("predicted from all", V, predicted, mark="--", group=1))
    panel = plots.Panel("V, vocabulary", "a in N_opt ~ C^a", series, log="x")
    law = next(iter(found.values())).total.conventions
    how = f"{law['loss']} on {law['on']}, {law['reduction']}"
    note = f"N: as the legend says; C = 6 N D of the same N. L = E + A/N^alpha + B/D^beta, {how}."
    return plots.draw("The exponent and what N counts", [panel], note)
