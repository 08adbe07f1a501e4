"""How fast does the core train, and how far is that from the hardware and from eager torch?

    python -m launch.local --config=experiments/throughput.py:cpu        (2 minutes on 2 cores)
    python -m launch.local --config=experiments/throughput.py:smoke      (10 seconds)
    python -m launch.local --config=experiments/throughput.py:gpu        (an H100; not run yet)

Trains GPT-2 (LayerNorm, GELU, learned positions, no biases, tied head) by the project's own train step on
made-up tokens without document masks, as nanoGPT does, and prints tokens/s, FLOP/s (exact: every product of
the definition, all T x T scores), MFU, memory and compile seconds. Where torch is installed, the same GPT is
trained in eager torch in a process of its own; the two take turns, so that both meet the same machine, and
the ratio is the median over the rounds with its range.

On 2 cores of an AMD EPYC in float32, medians of 4 rounds of 1.5 s beside torch 2.13; the machine was busy,
so both went before its other work (`chrt -f 10`). A bare 1024 x 1024 product reaches 400 GFLOP/s there.

    4 x 64    71,033 tokens/s   113 GFLOP/s   1.29 x torch (1.23 to 1.34)
    4 x 128   24,214 tokens/s   154 GFLOP/s   1.42 x torch (1.31 to 1.52)
    6 x 256    5,728 tokens/s   190 GFLOP/s   1.48 x torch (1.26 to 1.66)
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.baselines.process import Process
from llm_jax import config, optimizers, program, sharding
from llm_jax.config import UserError, outside_identity
from llm_jax.kernels import devices
from llm_jax.kernels.memory import keep_freed_memory
from llm_jax.losses import NextToken
from llm_jax.models import Layout, counting
from llm_jax.models.positions import Learned
from llm_jax.models.transformer import LayerNorm, Transformer
from llm_jax.optimizers import AdamW
from llm_jax.program import Program
from llm_jax.run import SCHEMA
from llm_jax.scaling.page import Page, Table, write
from llm_jax.sharding import MeshConfig
from llm_jax.values import check_least


@dataclasses.dataclass(frozen=True)
class Shape:
    """One model and its batch."""

    name: str
    layers: int
    width: int
    heads: int
    sequence_length: int
    batch_size: int
    vocabulary: int = 65  # characters of Shakespeare, as in nanoGPT's smallest configuration
    dtype: Literal["float32", "bfloat16"] = "float32"

    def validate(self) -> None:
        sizes = "layers", "width", "heads", "sequence_length", "batch_size", "vocabulary"
        check_least(self, f"shape {self.name}: ", **dict.fromkeys(sizes, 1))
        if self.width % self.heads:
            raise UserError(f"shape {self.name}: heads={self.heads} does not divide width={self.width}")

    @property
    def tokens(self) -> int:
        return self.batch_size * self.sequence_length

    @property
    def model(self) -> Transformer:
        return Transformer(
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            vocabulary=self.vocabulary,
            positions=Learned(self.sequence_length),
            norm=LayerNorm(),
            activation="gelu",
            dtype=self.dtype,
        )


@dataclasses.dataclass(frozen=True)
class Throughput:
    """What is measured: each shape in `rounds` turns of `seconds`, beside torch if that is installed."""

    shapes: tuple[Shape, ...]
    rounds: int = 5
    seconds: float = 3.0
    torch: bool = True
    layout: Layout = outside_identity(Layout())

    def identity(self, content: bool = True) -> str:
        return config.identity(self, SCHEMA, content)

    def validate(self) -> None:
        if not self.shapes:
            raise UserError("shapes is empty: there is nothing to measure")
        check_least(self, "", ("seconds",), rounds=1)


CPU = (
    Shape("4 x 64", layers=4, width=64, heads=4, sequence_length=128, batch_size=16),
    Shape("4 x 128", layers=4, width=128, heads=4, sequence_length=256, batch_size=8),
    Shape("6 x 256", layers=6, width=256, heads=8, sequence_length=256, batch_size=8),
)
GPU = tuple(
    Shape(name, layers, width, heads, 1024, batch_size, vocabulary=50304, dtype="bfloat16")
    for name, layers, width, heads, batch_size in [
        ("124M", 12, 768, 12, 32),
        ("350M", 24, 1024, 16, 16),
        ("1.3B", 24, 2048, 16, 8),
    ]
)
SCALES = {
    "smoke": Throughput((Shape("1 x 32", 1, 32, 2, 32, 4),), rounds=1, seconds=0.2, torch=False),
    "cpu": Throughput(CPU),
    "gpu": Throughput(GPU, rounds=3, seconds=10.0),
}


def get_config(scale: str) -> Throughput:
    return SCALES[scale]


def measure(base: Throughput, folder: Path) -> dict[str, Any]:
    """The numbers of each shape; the table is printed and written to report.html."""
    keep_freed_memory()  # as training does
    with contextlib.ExitStack() as stack:
        installed = base.torch and importlib.util.find_spec("torch") is not None
        torch = stack.enter_context(Torch()) if installed else None
        rows = []
        for shape in base.shapes:
            print(f"{shape.name}: {base.rounds} rounds of {base.seconds:g} s", flush=True)
            rows.append(measure_shape(base, shape, torch))
    shown = [cells(row) for row in rows]
    table = Table(list(shown[0]), [list(row.values()) for row in shown])
    device, cores, load = jax.devices()[0].device_kind, os.cpu_count(), [row["load"] for row in rows]
    machine = f"{device}, {cores} cores, load average {min(load):.1f} to {max(load):.1f} while measuring"
    print(f"{table}\n{machine}")
    question = __doc__.splitlines()[0]
    write(folder, Page("Throughput", question, tables=[("Each shape", table)], notes=[machine]))
    return {"device": device, "cores": cores, "rows": rows}


def measure_shape(base: Throughput, shape: Shape, torch: "Torch | None") -> dict[str, Any]:
    """One row: our rate and torch's over the rounds, in which they take turns."""
    trainer = Trainer(shape, base.layout)
    facts = counting.closed_form(shape.model, shape.sequence_length)
    ours, theirs = [], []
    for _ in range(base.rounds):
        ours.append(trainer.rate(base.seconds))
        if torch is not None:
            theirs.append(torch.rate(shape, base.seconds, facts["N_total"]))
    tokens_per_second = statistics.median(ours)
    flops_per_second = tokens_per_second * facts["flops_exact_per_token"]
    peak = devices.peak_flops(jax.devices()[0], shape.dtype)
    ratios = [a / b for a, b in zip(ours, theirs, strict=False)]
    return {
        **dataclasses.asdict(shape),
        "N_total": facts["N_total"],
        "tokens_per_second": tokens_per_second,
        "flops_per_second": flops_per_second,
        "mfu": None if peak is None else flops_per_second / peak,
        "memory_bytes": trainer.memory_bytes,
        "compile_seconds": trainer.program.compile_seconds,
        "torch_tokens_per_second": statistics.median(theirs) if theirs else None,
        "ratio": statistics.median(ratios) if ratios else None,
        "rounds": {"ours": ours, "torch": theirs, "ratio": ratios},
        "load": os.getloadavg()[0],
    }


class Trainer:
    """The program that training runs, on one device, with a state and a batch.

    members: a pack of so many, over as many devices as divide it; the first `diverged` of them have.
    """

    def __init__(
        self, shape: Shape, layout: Layout, members: int | None = None, block: int = 1, diverged: int = 0
    ) -> None:
        self.shape, optimizer, objective = shape, AdamW(), NextToken()
        tokens = np.random.default_rng(0).integers(
            0, shape.vocabulary, (shape.batch_size, shape.sequence_length + 1), np.int32
        )
        mask = np.ones((shape.batch_size, shape.sequence_length), np.float32)
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask}
        spec = tuple((name, jax.ShapeDtypeStruct(x.shape, x.dtype)) for name, x in batch.items())
        structure = optimizers.structure(optimizer)
        compiled = program.Shape(shape.model, objective, structure, layout, 1, spec, block, members)
        mesh = sharding.make_mesh(MeshConfig(data=1, member=math.gcd(members or 1, jax.device_count())))
        with jax.set_mesh(mesh):
            self.program = Program(compiled, mesh)
            self.state = self.program.start([(n, 1.0) for n in range(members or 1)], [None] * (members or 1))
        row = {name: column[0] for name, column in optimizers.tables(optimizer, objective, 1).items()}
        row["active"] = np.float32(1)
        hyper = {n: np.full(compiled.hyper_axes, row[n], np.float32) for n in self.program.hyper}
        if diverged:
            gone = np.arange(members) < diverged
            hyper["active"] = hyper["active"] * ~gone
            spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x.at[gone].set(jnp.nan), tree))
            self.state = self.state._replace(trained=spoil(self.state.trained))
        self.hyper = jax.device_put(hyper, {n: x.sharding for n, x in self.program.hyper.items()})
        wide = {name: np.broadcast_to(x, (*compiled.batch_axes, *x.shape)) for name, x in batch.items()}
        self.batch = jax.device_put(wide, {n: x.sharding for n, x in self.program.batch.items()})
        self.tokens_per_call = shape.tokens * block * (members or 1)

    def rate(self, seconds: float) -> float:
        """Tokens per second over about `seconds`, one step in flight, after two steps to warm up."""
        start, calls, in_flight, step = None, -2, None, self.program.step
        while start is None or time.perf_counter() - start < seconds:
            self.state, metrics = step(self.state, self.batch, self.hyper)
            if in_flight is not None:
                np.asarray(in_flight["loss"])
            in_flight, calls = metrics, calls + 1
            if calls == 0:
                np.asarray(in_flight["loss"])
                start = time.perf_counter()
        np.asarray(in_flight["loss"])
        return calls * self.tokens_per_call / (time.perf_counter() - start)

    @property
    def memory_bytes(self) -> int:
        """The most that the device has held; where it doesn't say (CPU), what the compiled step plans."""
        if stats := jax.devices()[0].memory_stats():
            return stats["peak_bytes_in_use"]
        return self.program.memory_bytes


class Torch(Process):
    """The process of baselines/torch_gpt.py."""

    def __init__(self) -> None:
        super().__init__([sys.executable, str(Path(__file__).parent / "baselines" / "torch_gpt.py")])

    def rate(self, shape: Shape, seconds: float, parameters: int) -> float:
        """Tokens per second; raises ValueError if its model is not as big as ours, `parameters`."""
        reply = self.ask(**dataclasses.asdict(shape), seconds=seconds)
        if reply["parameters"] != parameters:
            raise ValueError(f"torch's model has {reply['parameters']} parameters, ours {parameters}")
        return reply["tokens_per_second"]


# ---- the table ----


def cells(row: dict[str, Any]) -> dict[str, str]:
    """What the table shows of a row, by column."""
    shown = {
        "shape": row["name"],
        "parameters": f"{row['N_total']:,}",
        "tokens/s": f"{row['tokens_per_second']:,.0f}",
        "GFLOP/s": f"{row['flops_per_second'] / 1e9:,.1f}",
        "MFU": "" if row["mfu"] is None else f"{row['mfu']:.1%}",
        "memory MB": f"{row['memory_bytes'] / 1e6:,.0f}",
        "compile s": f"{row['compile_seconds']:.1f}",
    }
    if row["ratio"] is None:
        return shown
    low, high = min(row["rounds"]["ratio"]), max(row["rounds"]["ratio"])
    return shown | {
        "torch tokens/s": f"{row['torch_tokens_per_second']:,.0f}",
        "ratio": f"{row['ratio']:.2f}",
        "range": f"{low:.2f} to {high:.2f}",
    }
