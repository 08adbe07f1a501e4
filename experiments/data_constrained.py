"""How much are repeated tokens worth, and after how many epochs does repeating stop helping?

Muennighoff et al. 2023 (arXiv:2305.16264): L = E + A/N'^alpha + B/D'^beta, where U unique tokens seen for
D/U epochs count as D' = U + U R_D (1 - exp(-(D/U - 1)/R_D)), and parameters beyond what U tokens need fade
alike with R_N; theirs are R_D = 15.4 and R_N = 5.3. Models of a few sizes are trained for 1 to 64 epochs on
a little text, and on as many tokens of which none is seen twice. The law is fitted to all runs but those
past the lowest loss of their size and text: it knows of no loss that rises again. Beside it stand two
readings that need no law: the epochs up to which doubling them helped by more than seeds differ, and the
number of fresh tokens that gave the same loss.

    python -m launch.local --config=experiments/data_constrained.py:cpu --workers=2
    python -m launch.local --config=experiments/data_constrained.py:smoke --workers=2

Cost: smoke 15 seconds, cpu 6 CPU minutes; not run, estimated: gpu an hour on one H100, full some days on a
pod.

Result (cpu, 2026-11-22): R_D is 9.8 (90% interval 3.8 to 15.5), near the published 15.4; R_N isn't determined
(2.6 to 4,500). 16,384 tokens helped 4.1k parameters up to 16 epochs, 12.3k and 34.8k up to 8. After that the
loss of the largest rises fast (2.41 at 8 epochs, 4.68 at 64), that of the smallest doesn't. Four epochs are
worth 3.6, 3.0 and 2.8 fresh ones, smallest model first.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llm_jax import ladder
from llm_jax.config import UserError
from llm_jax.ladder import COUNTING, Shapes, octaves, points, rectangle, shapes
from llm_jax.models.transformer import Transformer
from llm_jax.run import Run, Sweep
from llm_jax.scaling import figures, fits, page, plots
from llm_jax.scaling.page import Answer, Drawing, Page, Table
from llm_jax.scaling.repeats import Repeats, helpful, repeats, seed_noise
from llm_jax.scaling.report import fitted, too_small
from llm_jax.scaling.results import Fit
from llm_jax.scaling.style import short


@dataclasses.dataclass(frozen=True)
class DataConstrained(Sweep, kind="data_constrained"):
    """Every shape on `tokens` fresh ones, and on `unique` ones for 1, 2, 4 .. `epochs` (each by its own)."""

    shapes: Shapes
    tokens: tuple[int, ...]
    unique: tuple[int, ...]
    epochs: tuple[int, ...]
    seeds: int = 2
    rate_exponent: float = -0.7
    horizon_exponent: float = 0.0
    bootstrap: int = 1000

    def validate(self) -> None:
        if len(self.shapes) < 2 or len(self.tokens) < 3 or self.seeds < 2 or self.bootstrap < 20:
            raise UserError(
                "sweep.shapes needs 2, sweep.tokens 3, sweep.seeds 2, and sweep.bootstrap 20, or more"
            )
        if not self.unique or len(self.unique) != len(self.epochs) or min(self.epochs) < 2:
            raise UserError("sweep.unique and sweep.epochs go together, one number each, 2 epochs or more")


SCALES = {
    "cpu": DataConstrained(shapes((8, 16, 32), 2), octaves(14, 20), (2**14, 2**16), (64, 8)),
    "smoke": DataConstrained(shapes((4, 8), 1), octaves(11, 14), (2**12,), (4,), bootstrap=20),
    "gpu": DataConstrained(shapes((64, 128, 256), 4), octaves(19, 25), (2**19, 2**21), (64, 16)),
    "full": DataConstrained(shapes((512, 768, 1024), 12), octaves(27, 33), (2**27, 2**29), (64, 16)),
}


def get_config(scale: str) -> Run:
    return Run(
        model=Transformer(),
        data=ladder.text(scale),
        optimizer=ladder.OPTIMIZER,
        name=f"data-constrained-{scale}",
        sweep=SCALES[scale],
        execution=ladder.execution(scale),
    )


def sweep(base: Run) -> list[Run]:
    settings = base.sweep
    # One epoch of a limited text is as fresh as any, and stands for it.
    others = tuple(D for D in settings.tokens if D not in settings.unique)
    runs = rectangle(base, others, "fresh-")
    for unique, epochs in zip(settings.unique, settings.epochs, strict=True):
        data = dataclasses.replace(base.data, unique_tokens=unique, repeat=True)
        tokens = tuple(unique * 2**n for n in range(epochs.bit_length()))
        for seed in range(base.seed, base.seed + settings.seeds):
            limited = dataclasses.replace(base, data=data, seed=seed)
            runs += rectangle(limited, tokens, f"U{unique}-seed{seed}-")
    return runs


def report(base: Run, folder: Path, runs: pd.DataFrame, _: Mapping[str, Any]) -> dict[str, Any]:
    """Fits, prints and writes the report; returns its numbers."""
    table = points(runs)
    unique = table.get("data.unique_tokens", pd.Series(np.nan, table.index)).astype(float)
    table = table.assign(U=np.minimum(unique.fillna(np.inf), table["D"]))
    done = table[table["status"] == "done"]
    noise, freedom = seed_noise(done)
    found = [r for r in repeats(done) if done["D"].max() > r.U and len(r.epochs) > 1]
    fitted_runs = helpful(done)
    law = fits.fit_law(fitted_runs, "data-constrained", bootstrap=base.sweep.bootstrap, counting=COUNTING)
    left_out = len(done) - len(fitted_runs)
    content = Page(
        title=f"Repeated data: {base.name}",
        question=__doc__.splitlines()[0],
        caution=too_small(law),
        answers=[*map(stops, found), half_life(law)],
        warnings=law.warnings,
        notes=[f"{left_out} runs past the lowest loss of their size and text are not fitted"],
        figures=[Drawing("epochs", "Loss by tokens seen, fresh (circles) and repeated.", drawing(done, law))],
        fits=[fitted(law)],
        tables=[("What repeating was worth (mean over seeds)", worth(found))],
        conventions={
            "N counts": COUNTING,
            "a gain": f"more than seeds show: {noise:.2%} of a loss, {freedom} d.f.",
        },
    )
    page.show(folder, content)
    read = [
        r._asdict() | {"epochs": r.epochs.tolist(), "losses": r.losses.tolist(), "worth": r.worth.tolist()}
        for r in found
    ]
    return {"law": law.to_json(), "repeats": read, "seed_noise": noise}


def stops(r: Repeats) -> Answer:
    """Where repeating stopped helping one model on one text."""
    last = r.epochs[-1]
    rises = f"lowest at {r.best:.0f}" if r.best < last else f"still lowest at {last:.0f}"
    helped = f"helped up to {r.helped:.0f} epochs" if r.helped > 1 else "never helped"
    return Answer(
        f"N = {short(r.N)}, U = {short(r.U)}: doubling the epochs {helped} of {last:.0f} tried; "
        f"loss is {rises}."
    )


def half_life(law: Fit) -> Answer:
    """What the law says of repeating without end, where the runs determine it."""
    R_D, level = law.parameters["R_D"], f"{law.level:.0%}"
    if "R_D" in law.bounds_hit:
        line = f"R_D is not determined: the best fit has it at its {law.bounds_hit['R_D']} bound."
        return Answer(line, f"{level} of the refits have it from {R_D.low:.3g} to {R_D.high:.3g}.", False)
    return Answer(
        f"R_D is {R_D.value:.3g} ({level}: {R_D.low:.3g} to {R_D.high:.3g}); Muennighoff et al. found 15.4.",
        f"By the law no number of epochs is worth more than {1 + R_D.value:.3g} of fresh text.",
    )


def worth(found: list[Repeats]) -> Table:
    """A row a number of epochs: losses, and how many epochs' worth of fresh tokens had given them."""
    rows = []
    for r in found:
        for epochs, loss, fresh in zip(r.epochs, r.losses, r.worth, strict=True):
            mark = " lowest" if epochs == r.best else ""
            shown = f"{fresh:.1f}" if np.isfinite(fresh) else "?"
            rows.append([short(r.N), short(r.U), f"{epochs:.0f}", f"{loss:.4f}{mark}", shown])
    return Table(["N", "unique tokens", "epochs", "loss", "worth, in fresh epochs"], rows)


def drawing(runs: pd.DataFrame, law: Fit) -> Any:
    """A panel for each size: loss over tokens, fresh and repeated, with the law."""
    panels = []
    for N, model in runs.groupby("N"):
        series = []
        for group, (name, cell) in enumerate(
            [("fresh", model[model["U"] == model["D"]]), *model[model["U"] < model["D"]].groupby("U")]
        ):
            D = np.geomspace(cell["D"].min(), cell["D"].max(), 40)
            U = D if group == 0 else np.full(40, float(name))
            label = name if group == 0 else f"{short(name)} unique"
            series.append(plots.Series(label, cell["D"], cell["loss"], group=group))
            series.append(
                plots.Series(
                    None, D, law.predict(N=np.full(40, float(N)), D=D, U=U).value, mark="-", group=group
                )
            )
        panels.append(plots.Panel(f"D, tokens seen by N = {short(N)}", "loss [nats/token]", series, log="x"))
    return plots.draw("Repeated and fresh tokens", panels, f"Lines: the law. {figures.conventions(law)}")
