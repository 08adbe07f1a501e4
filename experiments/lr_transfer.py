"""Does the best learning rate of a small model serve a larger one, and in which parametrisation?

    python -m launch.local --config=experiments/lr_transfer.py:cpu --workers=2
    python -m launch.local --config=experiments/lr_transfer.py:smoke
    python -m launch.local --config=experiments/lr_transfer.py:gpu          (an H100; not run)

Models are trained at several rates for each width (standard, muP and per-layer rates), each depth (standard
and CompleteP) and each number of tokens. The best rate of each must lie between rates that were trained; its
drift is the power of the size that it goes with, 0 where the rate transfers. The coordinate check says by
what power of the size the first steps' movements in the last layer grow.

Cost: smoke 15 seconds, cpu an hour on 2 CPU cores, loaded.

Result (cpu, 2026-11-22; 90% intervals): the best rate goes as width^-1.12 (-1.25 to -0.99) in the standard
parametrisation, width^-0.05 (-0.19 to 0.08) in muP, width^-0.06 (-0.23 to 0.11) with per-layer rates; as
depth^-0.41 (-0.53 to -0.30) and, with CompleteP, depth^-0.21 (-0.34 to -0.07), which is not transfer; as
tokens^-0.30 (-0.47 to -0.14). Tuned at width 64 itself the standard one is the best of the three there.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from llm_jax.config import UserError
from llm_jax.coordinates import growth, movements
from llm_jax.data import Python, SentencePiece, Text
from llm_jax.ladder import execution
from llm_jax.models.parametrization import CompleteP, MuP, Parametrization, PerLayer, Standard
from llm_jax.models.transformer import Transformer
from llm_jax.optimizers import AdamW
from llm_jax.run import Cell, Checkpointing, Run, Sweep
from llm_jax.scaling import page as pages
from llm_jax.scaling import plots
from llm_jax.scaling.drift import Drift, drift
from llm_jax.scaling.plots import Panel, Series
from llm_jax.schedules import Cosine
from llm_jax.transfer import HORIZON_EXPONENT
from llm_jax.values import check_least, nearest, write

SHOWN = ("mixer", "mlp", "stream", "logits")  # of the coordinate check
NOTE = (
    "Rate: the cosine's peak, without the factors of roles. Best: the vertex of a parabola of ln loss in ln "
    "rate, least squares through the 5 rates around the lowest, seeds of weight 1."
)


@dataclasses.dataclass(frozen=True)
class LrTransfer(Sweep, kind="lr_transfer"):
    """Every size at every rate with every seed.

    The width series has the base's depth, the depth series its width, the horizons (multiples of its tokens)
    both. Parametrisations have the first of a series as their base, where all are the standard one. The
    coordinate check takes `coordinate_steps` steps at the base's rate.
    """

    widths: tuple[int, ...] = (8, 16, 32, 64)
    width_kinds: tuple[str, ...] = ("standard", "mup", "per_layer")
    depths: tuple[int, ...] = (1, 2, 4, 8)
    depth_kinds: tuple[str, ...] = ("standard", "completep")
    horizons: tuple[int, ...] = (1, 2, 4)
    head_width: int = 8
    rates: tuple[float, ...] = (2.15e-3, 4.64e-3, 1e-2, 2.15e-2, 4.64e-2, 1e-1, 2.15e-1)
    seeds: int = 2
    coordinate_steps: int = 6
    bootstrap: int = 1000

    def validate(self) -> None:
        check_least(self, "sweep.", head_width=1, seeds=1, coordinate_steps=1)
        if len(self.rates) < 3 or list(self.rates) != sorted(set(self.rates)):
            raise UserError(
                f"sweep.rates is {write(self.rates)}; at least 3, each larger than the one before"
            )
        if any(width % self.head_width for width in self.widths):
            raise UserError(
                f"sweep.widths is {write(self.widths)}; sweep.head_width={self.head_width} divides each"
            )
        for name in ("width_kinds", "depth_kinds"):
            for kind in set(getattr(self, name)) - set(Parametrization.members):
                raise UserError(f"sweep.{name}: no {kind!r}; {nearest(kind, Parametrization.members)}")
        for name in ("widths", "depths", "horizons"):
            sizes = getattr(self, name)
            if list(sizes) != sorted(set(sizes)) or any(size < 1 for size in sizes):
                raise UserError(f"sweep.{name} is {write(sizes)}; sizes grow from 1 or more")


SCALES = {
    "cpu": LrTransfer(),
    "smoke": LrTransfer(
        widths=(4, 8),
        width_kinds=("standard", "mup"),
        depths=(),
        horizons=(),
        head_width=4,
        rates=(3e-2, 2e-1, 1.5),
        seeds=1,
        coordinate_steps=2,
        bootstrap=100,
    ),
    "gpu": LrTransfer(
        widths=(64, 128, 256, 512, 1024),
        depths=(2, 4, 8, 16, 32),
        horizons=(1, 2, 4, 8),
        head_width=32,
        rates=tuple(float(f"{1e-4 * 2**k:.3g}") for k in range(10)),
        seeds=3,
    ),
}
CPU = Text(Python(), sequence_length=128, batch_size=8, held_out_bytes=2**15)
DATA = {
    "cpu": CPU,
    "smoke": dataclasses.replace(CPU, sequence_length=32, batch_size=4, held_out_bytes=2**12),
    "gpu": Text(Python(packages=True), SentencePiece(vocabulary=4096), sequence_length=512, batch_size=64),
}
# layers, width, steps
BASES = {"cpu": (2, 16, 128), "smoke": (1, 4, 20), "gpu": (4, 256, 2000)}


def get_config(scale: str) -> Run:
    """The run that the sweep varies. GELU, whose MLP is exactly 4 widths wide, and no decay to tune too."""
    layers, width, steps = BASES[scale]
    heads = width // SCALES[scale].head_width
    return Run(
        model=Transformer(layers=layers, width=width, heads=heads, tied=False, activation="gelu"),
        data=DATA[scale],
        optimizer=AdamW(1e-2, weight_decay=0.0, schedule=Cosine(warmup_fraction=0.1, final_fraction=0.0)),
        tokens=steps * DATA[scale].tokens_per_step,
        name=f"lr_transfer-{scale}",
        sweep=SCALES[scale],
        # Runs of seconds: to train one again costs less than to save it.
        execution=execution(scale, checkpoint=Checkpointing(every_seconds=0, at_end=False)),
    )


# ---- the runs ----

Name = tuple[str, str]  # what varies, and the parametrisation


def series(base: Run) -> dict[Name, dict[int, Run]]:
    """The run of each size, at the base's rate and seed, in every series."""
    settings, out = base.sweep, {}
    for kind in settings.width_kinds:
        sizes = settings.widths
        out["width", kind] = {n: resized(base, kind, n, base.model.layers, sizes[0]) for n in sizes}
    for kind in settings.depth_kinds:
        sizes, width = settings.depths, base.model.width
        out["depth", kind] = {n: resized(base, kind, width, n, width, sizes[0]) for n in sizes}
    horizons = {n: dataclasses.replace(base, tokens=n * base.tokens) for n in settings.horizons}
    out["horizon", "standard"] = horizons
    return {name: runs for name, runs in out.items() if runs}


def resized(
    base: Run, kind: str, width: int, layers: int, base_width: int, base_layers: int | None = None
) -> Run:
    """The base at another shape. At its base a parametrisation is the standard one: those runs are shared."""
    head = base.sweep.head_width
    given: dict[str, Parametrization] = {
        "standard": Standard(),
        "mup": MuP(base_width, head),
        "per_layer": PerLayer(base_width),
        "completep": CompleteP(base_width, head, base_layers or layers),
    }
    at_base = width == base_width and layers == (base_layers or layers)
    model = dataclasses.replace(
        base.model,
        width=width,
        heads=width // head,
        layers=layers,
        parametrization=Standard() if at_base else given[kind],
    )
    return dataclasses.replace(base, model=model)


def at_rates(run: Run, what: str) -> Iterator[Run]:
    """The run at every rate with every seed; runs of one shape share a program, so they follow each other."""
    for rate in run.sweep.rates:
        for seed in range(run.seed, run.seed + run.sweep.seeds):
            model = run.model
            size = f"{model.parametrization.kind}-{model.width}x{model.layers}-{run.steps}"
            yield dataclasses.replace(
                run,
                optimizer=dataclasses.replace(run.optimizer, learning_rate=rate),
                seed=seed,
                name=f"{size}-rate{rate:g}-seed{seed}",
                cell=Cell(what),
            )


def sweep(base: Run) -> list[Run]:
    """All series; a run that two of them have is trained once."""
    return [
        run
        for (what, _), sizes in series(base).items()
        for size in sizes.values()
        for run in at_rates(size, what)
    ]


# ---- what they show ----


def points(base: Run, runs: pd.DataFrame, name: Name) -> pd.DataFrame:
    """The runs of a series with the columns that `drift` reads."""
    rows = []
    for size, run in series(base)[name].items():
        for each in at_rates(run, name[0]):
            rows.append({"size": size, "rate": each.optimizer.learning_rate, "identity": each.identity()})
    found = runs[["identity", "loss", "seed", "status", "name"]]
    return pd.DataFrame(rows).merge(found, on="identity")


def coordinates(base: Run, names: Sequence[Name]) -> dict[Name, list[dict[str, float]]]:
    """The movements in the last layer, of each size of each series."""
    steps, known = base.sweep.coordinate_steps, {}
    for name in names:
        for run in series(base)[name].values():
            if run.model not in known:
                known[run.model] = movements(run, steps)
    return {name: [known[run.model] for run in series(base)[name].values()] for name in names}


def report(base: Run, folder: Path, runs: pd.DataFrame, _: Mapping[str, Any]) -> dict[str, Any]:
    """Fits, prints and writes the report; returns its numbers."""
    every = series(base)
    drifts = {name: drift(points(base, runs, name), base.sweep.bootstrap) for name in every}
    moved = coordinates(base, [name for name in every if name[0] != "horizon"])
    grown = {name: growth(list(every[name]), rows) for name, rows in moved.items()}
    diverged = int((runs["status"] == "diverged").sum())
    tokens = base.steps * base.data.tokens_per_step
    page = pages.Page(
        title=f"Transfer of the learning rate: {base.name}",
        question=__doc__.splitlines()[0],
        answers=[answer(name, found) for name, found in drifts.items()],
        warnings=[text for name, found in drifts.items() for text in warnings(name, found)],
        figures=list(drawings(base, drifts, moved)),
        fits=[
            pages.Fitted("The best rate ~ size^slope", slopes(drifts), "Bootstrap of the curves' residuals.")
        ],
        tables=[
            ("The best rate of each size", optima(drifts)),
            ("Movements grow as size^power", powers(grown)),
        ],
        conventions={
            "loss": "held out [nats/token]",
            "rate": "the peak of the cosine; what roles multiply it by is not in it",
            "best": "the minimum of the parabola in ln rate through the 5 rates around the lowest",
            "horizons": f"the published slope is {-HORIZON_EXPONENT:g} (arXiv:2409.19913)",
            "tokens": f"{tokens:,} (horizons: multiples of it), batches of {base.data.tokens_per_step:,}",
            "machine": ", ".join(sorted(set(map(str, runs["device"].dropna())))),
        },
        notes=[f"{len(runs)} runs, {diverged} diverged; the base shape of a series is the standard run"],
    )
    print(page)
    print(f"\nreport: {pages.write(folder, page)}")
    return {
        "series": [result(name, found) | {"grown": grown.get(name)} for name, found in drifts.items()],
        "warnings": list(page.warnings),
    }


def label(name: Name) -> str:
    what, kind = name
    return f"{kind} over {what}"


def answer(name: Name, found: Drift) -> pages.Answer:
    if found.refused:
        return pages.Answer(f"{label(name)}: no drift to tell.", found.refused, good=False)
    slope, last = found.slope, found.best[-1]
    known = math.isfinite(slope.low)
    interval = f"{found.level:.0%}: {slope.low:.2f} to {slope.high:.2f}" if known else "no interval"
    still = known and slope.low <= 0 <= slope.high
    verdict = "transfers" if found.transfers else "is not told to drift" if still else "drifts"
    verdict = verdict if known else "goes"
    line = f"{label(name)}: the best rate {verdict}, as {name[0]}^{slope.value:.2f} ({interval})."
    cost = (
        f"The best rate of {found.best[0].size:g} costs {last.kept - last.loss:+.3f} nats at {last.size:g}."
    )
    return pages.Answer(line, cost if math.isfinite(last.kept - last.loss) else "", found.transfers)


def warnings(name: Name, found: Drift) -> list[str]:
    refused = [f"{label(name)}, at {best.size:g}: {best.refused}" for best in found.best if best.refused]
    return refused + [f"{label(name)}: {text}" for text in found.warnings]


def result(name: Name, found: Drift) -> dict[str, Any]:
    sizes = [
        {"size": best.size, "rate": best.rate._asdict(), "loss": best.loss, "loss_at_first_rate": best.kept}
        | {"refused": best.refused or None}
        for best in found.best
    ]
    slope = None if found.refused else found.slope._asdict()
    return {"over": name[0], "parametrization": name[1], "slope": slope, "noise": found.noise, "sizes": sizes}


def slopes(drifts: Mapping[Name, Drift]) -> pages.Table:
    rows = [[label(name), *map(digits, (*found.slope, found.noise))] for name, found in drifts.items()]
    return pages.Table(["series", "slope", "low", "high", "std. error", "noise of ln loss"], rows)


def optima(drifts: Mapping[Name, Drift]) -> pages.Table:
    rows = [
        [
            label(name),
            *map(digits, (best.size, *best.rate[:3], best.loss, best.kept - best.loss)),
            best.refused,
        ]
        for name, found in drifts.items()
        for best in found.best
    ]
    header = ["series", "size", "rate", "low", "high", "loss", "the first size's rate costs", ""]
    return pages.Table(header, rows, (0, 7))


def powers(grown: Mapping[Name, Mapping[str, float]]) -> pages.Table:
    rows = [[label(name), *(f"{found[of]:+.2f}" for of in SHOWN)] for name, found in grown.items()]
    return pages.Table(["series", *SHOWN], rows)


def digits(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else ""


def drawings(
    base: Run, drifts: Mapping[Name, Drift], moved: Mapping[Name, Sequence[Mapping[str, float]]]
) -> Iterator[pages.Drawing]:
    """The losses of each series, the best rates over each kind of size, and the coordinate check."""
    for name, found in drifts.items():
        panel = Panel("learning rate", "held-out loss [nats/token]", list(losses(name, found)), log="x")
        caption = "Loss over the rate at each size, with the parabola; dotted where it has no minimum."
        yield drawing(f"{name[0]}-{name[1]}", label(name), caption, [panel])
    panels = [
        Panel(what, "best learning rate", [best_rates(n, f) for n, f in drifts.items() if n[0] == what])
        for what in dict.fromkeys(name[0] for name in drifts)
    ]
    yield drawing("drift", "The best rate of each size", "Level where the rate transfers.", panels)
    panels = [
        Panel(
            what,
            f"movement of the {of}",
            [movement(base, n, rows, of) for n, rows in moved.items() if n[0] == what],
        )
        for what in dict.fromkeys(name[0] for name in moved)
        for of in ("stream", "logits")
    ]
    caption = f"What {base.sweep.coordinate_steps} steps change in the last layer; level where it transfers."
    yield drawing("coordinates", "Coordinate check", caption, panels)


def drawing(name: str, title: str, caption: str, panels: list[Panel]) -> pages.Drawing:
    return pages.Drawing(name, caption, plots.draw(title, panels, NOTE))


def losses(name: Name, found: Drift) -> Iterator[Series]:
    for index, best in enumerate(found.best):
        curve, rates = best.curve, sorted(set(best.curve.sizes))
        means = pd.Series(curve.losses).groupby(curve.sizes)
        spread = Series(
            f"{name[0]} {best.size:g}", rates, means.mean(), means.min(), means.max(), group=index
        )
        yield spread
        fine = [rates[0] * (rates[-1] / rates[0]) ** (step / 200) for step in range(201)]
        yield Series(None, fine, curve.predict(fine), mark=":" if best.refused else "-", group=index)


def best_rates(name: Name, found: Drift) -> Series:
    good = [best for best in found.best if not best.refused]
    columns = zip(*((best.size, *best.rate[:3]) for best in good), strict=True) if good else ([],) * 4
    x, y, low, high = map(list, columns)
    return Series(name[1], x, y, low, high, group=KINDS.index(name[1]))


def movement(base: Run, name: Name, rows: Sequence[Mapping[str, float]], of: str) -> Series:
    return Series(name[1], list(series(base)[name]), [row[of] for row in rows], group=KINDS.index(name[1]))


KINDS = ("standard", "mup", "per_layer", "completep")
