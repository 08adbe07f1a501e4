"""How much faster does a sweep of small models train when its members are packed into one program?

    python -m launch.local --config=experiments/packing.py:cpu        (2 cores, 7 minutes)
    python -m launch.local --config=experiments/packing.py:smoke      (seconds)
    python -m launch.local --config=experiments/packing.py:gpu        (one GPU; not run yet)

A pack is the step of llm_jax/pack.py on one shared batch of made-up tokens, `block_steps` steps a dispatch,
its members spread over as many CPU devices as there are cores. Beside it, taking turns with it:

    one after another   the members in one process that has compiled their program: the rate of one alone,
                        by single steps as `train` runs them, and in blocks
    at once             each in a process of its own, as many at a time as there are cores, each on its own,
                        by single steps and in blocks too

Rates are tokens/s summed over all that train, compiling stands apart, and a speed-up is the median of the
rounds' ratios. The rooflines are bare products of matrices: of 1024 x 1024, the best that there is, and of a
step's tokens with the model's first MLP matrix.

Result (cpu, 2026-11-22): eight members are 2.4 times as fast as one after another at width 32 (2.1 to 2.4),
1.8 times at width 64 (1.5 to 2.3), but 0.85 times as fast as processes at once: analysis/packing.md.
"""

import contextlib
import dataclasses
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.baselines.process import Process
from experiments.throughput import Shape
from launch.processes import Share, gpus, inheriting, shares
from llm_jax import config
from llm_jax.config import UserError
from llm_jax.models import counting
from llm_jax.run import SCHEMA
from llm_jax.scaling import page, plots
from llm_jax.scaling.page import Drawing, Page, Table, Tile
from llm_jax.values import check_least

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Packing:
    """What is measured: each shape at each width, in `rounds` turns of `seconds`.

    And the widest pack with one member that has diverged.
    """

    shapes: tuple[Shape, ...]
    widths: tuple[int, ...] = (1, 2, 4, 8, 16)
    block_steps: int = 4
    rounds: int = 3
    seconds: float = 0.3

    def identity(self, content: bool = True) -> str:
        return config.identity(self, SCHEMA, content)

    def validate(self) -> None:
        if not self.shapes or not self.widths:
            raise UserError("shapes and widths name at least one each")
        if min(self.widths) < 1:
            raise UserError(f"widths has {min(self.widths)}; a pack has at least 1 member")
        check_least(self, "", ("seconds",), block_steps=1, rounds=1)


# Layers x width: the sizes of experiments/isoflop.py, with its batch.
CPU = tuple(
    Shape(f"{layers} x {width}", layers, width, width // 16, 128, 4, vocabulary=257)
    for layers, width in [(2, 16), (2, 32), (4, 32), (2, 64), (2, 128)]
)
GPU = tuple(
    Shape(name, layers, width, width // 64, 256, 32, vocabulary=257, dtype="bfloat16")
    for name, layers, width in [
        ("1M", 5, 128),
        ("3M", 4, 256),
        ("7M", 9, 256),
        ("13M", 7, 384),
        ("20M", 6, 512),
    ]
)
SCALES = {
    # Single steps, so that alone and in blocks are one program, compiled once.
    "smoke": Packing((Shape("1 x 16", 1, 16, 1, 32, 2, 257),), (2,), block_steps=1, rounds=1, seconds=0.1),
    "cpu": Packing(CPU),
    "gpu": Packing(GPU, widths=(1, 2, 4, 8, 16, 32, 64), rounds=3, seconds=2.0),
}


def get_config(scale: str) -> Packing:
    return SCALES[scale]


class Trainer(Process):
    """A process of baselines/trainer.py, on its share of the machine."""

    def __init__(self, share: Share, devices: int, cache: str) -> None:
        command = [sys.executable, "-m", "experiments.baselines.trainer", f"--devices={devices}"]
        own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_COMPILATION_CACHE_DIR": cache}
        own |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        with inheriting(share.cores):
            super().__init__(command, cwd=ROOT, env=os.environ | own | dict(share.environment))


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to train, by one process or by several at once."""

    processes: tuple[Trainer, ...]
    members: int | None = None
    block: int = 1
    diverged: int = 0

    def run(self, shape: Shape, seconds: float) -> dict[str, float]:
        """The answers, added up."""
        question = {"members": self.members, "block": self.block, "diverged": self.diverged}
        for process in self.processes:
            process.send(shape=dataclasses.asdict(shape), seconds=seconds, **question)
        answers = [process.answer() for process in self.processes]
        return {name: sum(answer[name] for answer in answers) for name in answers[0]}


def measure(base: Packing, folder: Path) -> dict[str, Any]:
    """The numbers of each shape; the table is printed and written to report.html."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    single = shares(None, 64)  # the machine as the launcher divides it
    spread = 1 if gpus() else cores
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(
            tempfile.TemporaryDirectory()
        )  # each program is compiled once, by the first
        alone = stack.enter_context(Trainer(Share(), 1, cache))
        packed = stack.enter_context(Trainer(Share(), spread, cache))
        apart = tuple(stack.enter_context(Trainer(share, 1, cache)) for share in single)
        machine = alone.ask(product=[1024, 1024, 1024])
        rows = []
        for shape in base.shapes:
            print(f"{shape.name}: widths {', '.join(map(str, base.widths))}", flush=True)
            rows.append(measure_shape(base, shape, alone, packed, apart))
    result = {
        "device": machine["device"],
        "cores": cores,
        "processes_at_once": len(apart),
        "product_flops_per_second": machine["flops_per_second"],
        "speedup": {row["name"]: speedups(row) for row in rows},
        "speed_with_one_diverged": {
            row["name"]: ratios(row, "diverged", f"packed {max(base.widths)}") for row in rows
        },
        "rows": rows,
    }
    page.show(folder, report(result))
    return result


def measure_shape(
    base: Packing, shape: Shape, alone: Trainer, packed: Trainer, apart: tuple[Trainer, ...]
) -> dict[str, Any]:
    """One row: rates of all ways over the rounds, in which they take turns."""
    widest = max(base.widths)
    ways = {"alone": Way((alone,)), "blocks": Way((alone,), block=base.block_steps), "apart": Way(apart)}
    ways["apart blocks"] = Way(apart, block=base.block_steps)
    ways |= {f"packed {width}": Way((packed,), width, base.block_steps) for width in base.widths}
    ways["diverged"] = Way((packed,), widest, base.block_steps, diverged=1)
    facts = counting.closed_form(shape.model, shape.sequence_length)
    product = alone.ask(product=[shape.tokens, shape.width, shape.model.size_of_mlp])["flops_per_second"]
    first = {name: way.run(shape, 0.01) for name, way in ways.items()}  # compiles
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    load = []
    for _ in range(base.rounds):
        load.append(os.getloadavg()[0])
        for name, way in ways.items():
            rounds[name].append(way.run(shape, base.seconds)["tokens_per_second"])
    return {
        **dataclasses.asdict(shape),
        "N_total": facts["N_total"],
        "flops_per_token": facts["flops_exact_per_token"],
        "product_flops_per_second": product,
        "tokens_per_second": {name: statistics.median(rates) for name, rates in rounds.items()},
        "compile_seconds": {name: answer["compile_seconds"] for name, answer in first.items()},
        "memory_bytes": {name: answer["memory_bytes"] for name, answer in first.items()},
        "rounds": rounds,
        "load": load,
    }


def speedups(row: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """`ratios` of packed to each baseline, by width."""
    against = {
        "one_after_another": "alone",
        "one_after_another_in_blocks": "blocks",
        "at_once": "apart",
        "at_once_in_blocks": "apart blocks",
    }
    return {
        name.removeprefix("packed "): {label: ratios(row, name, other) for label, other in against.items()}
        for name in row["rounds"]
        if name.startswith("packed")
    }


def ratios(row: dict[str, Any], way: str, other: str) -> list[float]:
    """[median, lowest, highest] over the rounds of one way's rate over another's."""
    rounds = [a / b for a, b in zip(row["rounds"][way], row["rounds"][other], strict=True)]
    return [statistics.median(rounds), min(rounds), max(rounds)]


# ---- what is shown ----


def report(result: dict[str, Any]) -> Page:
    load = [value for row in result["rows"] for value in row["load"]]
    machine = (
        f"{result['device']}, {result['cores']} cores, {result['processes_at_once']} processes at once; a "
        f"bare 1024 x 1024 product reaches {result['product_flops_per_second'] / 1e9:,.0f} GFLOP/s; load "
        f"average {min(load):.1f} to {max(load):.1f} while measuring"
    )
    tables = [(row["name"], table(row, result["speedup"][row["name"]], result)) for row in result["rows"]]
    return Page(
        "Packed sweeps",
        __doc__.splitlines()[0],
        tiles=[best(row["name"], result["speedup"][row["name"]]) for row in result["rows"]],
        figures=[Drawing("packing", "Speed-up by pack width", figure(result))],
        tables=tables,
        notes=[machine],
    )


def best(name: str, speedup: dict[str, Any]) -> Tile:
    width = max(speedup, key=lambda width: speedup[width]["one_after_another"][0])
    found = {label: values[0] for label, values in speedup[width].items()}
    detail = f"at width {width}; {found['one_after_another_in_blocks']:.2f} of the same in blocks"
    return Tile(f"{found['one_after_another']:.2f} x", name, detail)


def table(row: dict[str, Any], speedup: dict[str, Any], result: dict[str, Any]) -> Table:
    """Each way's rate, FLOP/s, their share of the rooflines, speed-ups, memory and compile seconds."""
    header = ["way", "tokens/s", "GFLOP/s", "of 1024²", "of its MLP"]
    header += ["x alone", "x in blocks", "x at once", "x those in blocks"]
    rows = []
    for name, rate in row["tokens_per_second"].items():
        flops = rate * row["flops_per_token"]
        found = speedup.get(name.removeprefix("packed "), {})
        cells = [name, f"{rate:,.0f}", f"{flops / 1e9:,.1f}"]
        cells += [f"{flops / peak['product_flops_per_second']:.0%}" for peak in (result, row)]
        cells += [f"{median:.2f} ({low:.2f} to {high:.2f})" for median, low, high in found.values()]
        cells += [""] * (len(header) - len(cells))
        cells += [f"{row['memory_bytes'][name] / 1e6:,.1f}", f"{row['compile_seconds'][name]:.1f}"]
        rows.append(cells)
    return Table([*header, "memory MB", "compile s"], rows)


def figure(result: dict[str, Any]) -> Any:
    """Speed-up against width, one line a shape."""

    def series(baseline: str) -> list[plots.Series]:
        lines: list[plots.Series] = []
        for number, (name, by_width) in enumerate(result["speedup"].items()):
            values = [by_width[width][baseline] for width in by_width]
            middle, low, high = zip(*values, strict=True)
            x = [int(width) for width in by_width]
            lines.append(plots.Series(name, x, middle, low, high, group=number))
            lines.append(plots.Series(None, x, middle, mark="-", group=number))
        return lines

    panels = [
        plots.Panel("members packed", f"times {words}", series(baseline), level=1.0)
        for baseline, words in (
            ("one_after_another", "one after another"),
            ("one_after_another_in_blocks", "the same in blocks"),
            ("at_once_in_blocks", "processes in blocks"),
        )
    ]
    return plots.draw("Packed sweeps", panels, "medians and ranges over the rounds")
