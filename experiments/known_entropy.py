"""Does the fitted irreducible loss E find the entropy of a source whose entropy is known exactly?

The text is a Markov chain, so the loss that no model can beat is a number and not a guess. Every size is
trained on every number of tokens, L = E + A/N^alpha + B/D^beta is fitted, and E's interval is held against
the truth. Losses are measured on held-out documents, whose own entropy is a little off the source's: the
best predictor is scored on them too, and that is what E has to find.

    python -m launch.local --config=experiments/known_entropy.py:cpu --workers=2
    python -m launch.local --config=experiments/known_entropy.py:smoke --workers=2

Cost: smoke 15 seconds, cpu 4 minutes, each on 2 CPU cores; gpu some minutes and full some hours on one H100
(not run, estimated).

Result (cpu, 2026-11-22): E is 1.896 (90% interval 1.842 to 1.929), the best predictor loses 1.9219 on the
held-out documents: covered. That sample is 0.0016 above the source's entropy of 1.9203, half of its standard
error of 0.0032; the best of 30 runs comes within 0.9% of it.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llm_jax import sharding
from llm_jax.config import UserError
from llm_jax.data import Bytes, Markov, Text
from llm_jax.held_out import score
from llm_jax.ladder import COUNTING, OPTIMIZER, Shapes, execution, octaves, points, rectangle, shapes
from llm_jax.models.transformer import Transformer
from llm_jax.run import Run, Sweep
from llm_jax.scaling import figures, fits, page, plots
from llm_jax.scaling.page import Answer, Drawing, Page, Table, Tile
from llm_jax.scaling.report import fitted, too_small


@dataclasses.dataclass(frozen=True)
class KnownEntropy(Sweep, kind="known_entropy"):
    """Every shape (width, layers) on every number of tokens; the rate goes with the width (ladder.py)."""

    shapes: Shapes
    tokens: tuple[int, ...]
    rate_exponent: float = -0.7
    horizon_exponent: float = 0.0
    bootstrap: int = 1000

    def validate(self) -> None:
        if len(self.shapes) < 3 or len(self.tokens) < 3 or self.bootstrap < 100:
            raise UserError("sweep.shapes and sweep.tokens need 3 or more, sweep.bootstrap 100 or more")


SCALES = {
    "cpu": KnownEntropy(shapes((6, 8, 12, 16, 24, 32), 2), octaves(16, 20), bootstrap=4000),
    "smoke": KnownEntropy(shapes((4, 8, 16), 1), octaves(13, 15), bootstrap=200),
    "gpu": KnownEntropy(shapes((8, 12, 16, 24, 32, 48, 64), 2), octaves(17, 23), bootstrap=4000),
    "full": KnownEntropy(shapes((16, 24, 32, 48, 64, 96, 128), 4), octaves(19, 27), bootstrap=4000),
}
# The larger scales have more to find out about.
SMALL = Markov(states=16, order=2)
CHAINS = {
    "gpu": Markov(states=32, order=2, documents_count=2**17),
    "full": Markov(states=32, order=3, documents_count=2**20),
}


def get_config(scale: str) -> Run:
    held_out, rows = {"smoke": 2**15}.get(scale, 2**17), {"gpu": 32, "full": 128}.get(scale, 8)
    return Run(
        model=Transformer(),
        data=Text(CHAINS.get(scale, SMALL), sequence_length=64, batch_size=rows, held_out_bytes=held_out),
        optimizer=OPTIMIZER,
        name=f"known-entropy-{scale}",
        sweep=SCALES[scale],
        execution=execution(scale),
    )


def sweep(base: Run) -> list[Run]:
    if not (isinstance(base.data, Text) and isinstance(base.data.corpus, Markov)):
        raise UserError("the entropy is known of --config.data.corpus=markov alone")
    if not isinstance(base.data.tokenizer, Bytes):
        raise UserError("the entropy is that of a byte: leave --config.data.tokenizer=bytes")
    return rectangle(base, base.sweep.tokens)


def sample_entropy(base: Run) -> tuple[float, float]:
    """What the best predictor loses on the held-out documents [nats/token], and its standard error."""

    def nats(_: None, batch: Mapping[str, Any]) -> np.ndarray:
        return base.data.corpus.nats(np.asarray(batch["tokens"]), np.asarray(batch["targets"]))

    held_out, mesh = base.data.open().held_out(), sharding.make_mesh(sharding.MeshConfig(data=1))
    (found,) = score(nats, None, held_out, 512, mesh)
    return found["loss"], found["loss_standard_error"]


def report(base: Run, folder: Path, runs: pd.DataFrame, _: Mapping[str, Any]) -> dict[str, Any]:
    """Fits, prints and writes the report; returns its numbers."""
    grid = points(runs)
    source = base.data.corpus.entropy(base.data.sequence_length)
    sample, error = sample_entropy(base)
    options = {"bootstrap": base.sweep.bootstrap, "counting": COUNTING}
    law = fits.fit_law(grid, "chinchilla", **options)
    told = fits.fit_law(grid, "chinchilla", fixed={"E": sample}, **options)
    E = law.parameters["E"]
    covered = bool(E.low <= sample <= E.high)
    best = grid.loc[grid["loss"].idxmin()]
    where = "inside" if covered else "OUTSIDE"
    interval = f"{law.level:.0%} interval {E.low:.4f} to {E.high:.4f}"
    answers = [
        Answer(
            f"E is {E.value:.4f} ({interval}); the truth for these documents, {sample:.4f}, lies {where}.",
            f"E is off by {E.value / sample - 1:+.2%}; the best run ({best['name']}, {best['loss']:.4f}) "
            f"is {best['loss'] / sample - 1:.2%} above the truth.",
            covered,
        ),
        Answer(
            f"The held-out sample's own entropy is {sample - source:+.4f} from the source's {source:.4f}.",
            f"That is {(sample - source) / error:+.1f} of its standard errors ({error:.4f}, over documents).",
        ),
    ]
    content = Page(
        title=f"A known entropy: {base.name}",
        question=__doc__.splitlines()[0],
        caution=too_small(law),
        tiles=[
            Tile(f"{E.value:.4f}", "fitted E [nats/token]", interval),
            Tile(f"{sample:.4f}", "entropy of the held-out documents", f"source: {source:.4f}"),
        ],
        answers=answers,
        warnings=law.warnings,
        figures=[
            Drawing("excess", "Every run's loss above the entropy; lines: the law.", excess(law, sample)),
            Drawing("residuals", "What the law leaves.", figures.residuals(law)),
        ],
        fits=[fitted(law), fitted(told)._replace(heading=f"With E fixed at the truth, {sample:.4f}")],
        tables=[("Loss above the entropy [nats/token], width by tokens", square(grid, sample))],
        conventions={"N counts": COUNTING, "chain": str(base.data.corpus)},
    )
    page.show(folder, content)
    truth = {"source": source, "sample": sample, "sample_standard_error": error}
    return {"law": law.to_json(), "law_with_E": told.to_json(), "entropy": truth, "covered": covered}


def square(grid: pd.DataFrame, sample: float) -> Table:
    """Excess loss, a row a width and a column a number of tokens."""
    table = grid.pivot(index="width", columns="D", values="loss") - sample
    cells = [
        [f"{width}", *(f"{v:.4f}" for v in row)] for width, row in zip(table.index, table.values, strict=True)
    ]
    return Table(["width", *(f"{D:,}" for D in table.columns)], cells)


def excess(law: fits.Fit, sample: float) -> Any:
    """Draws loss - entropy over D for each size."""
    series = []
    for group, (N, runs) in enumerate(law.points.frame.groupby("N")):
        D = np.geomspace(runs["D"].min(), runs["D"].max(), 40)
        line = law.predict(N=np.full(40, float(N)), D=D).value - sample
        series.append(plots.Series(f"N = {N:,.0f}", runs["D"], runs["loss"] - sample, group=group))
        series.append(plots.Series(None, D, np.where(line > 0, line, np.nan), mark="-", group=group))
    panel = plots.Panel("D, training tokens", "loss - entropy [nats/token]", series)
    return plots.draw("Loss above the entropy", [panel], f"Lines: the law. {figures.conventions(law)}")
