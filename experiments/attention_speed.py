"""How fast is causal attention on a CPU, beside jax.nn, a plain product and torch's fused kernel?

    python -m launch.local --config=experiments/attention_speed.py:cpu        (2 cores, 90 seconds)
    python -m launch.local --config=experiments/attention_speed.py:smoke      (seconds)

One call on float32 arrays of normal numbers, forward alone and with the gradients of queries, keys and
values, by every way in turns, so that all meet the same machine. A turn is worth its median call; the table
has the best turn of each, and the ratio to torch is the median over the turns, with its range. Beside the
times stands what the compiled gradient holds at once, where only the chunked way is linear in the length.

Result (cpu, 2026-11-22): chunked attention is 1.3 and 1.4 times as fast as torch's kernel at 256 tokens
(forward, with gradients), 1.1 and 1.2 times at 1,024, and 0.8 and 0.7 times at 4,096; jax.nn is 0.3 to 0.7.
"""

import contextlib
import dataclasses
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from experiments.baselines.process import Process
from llm_jax import config
from llm_jax.config import UserError
from llm_jax.kernels.attention import attend
from llm_jax.kernels.memory import keep_freed_memory
from llm_jax.run import SCHEMA
from llm_jax.scaling.page import Page, Table, write
from llm_jax.values import check_least


@dataclasses.dataclass(frozen=True)
class Case:
    """What is attended to: as many key as query heads, each `head_width` wide."""

    name: str
    batch: int
    length: int
    heads: int
    head_width: int

    def validate(self) -> None:
        sizes = "batch", "length", "heads", "head_width"
        check_least(self, f"case {self.name}: ", **dict.fromkeys(sizes, 1))


@dataclasses.dataclass(frozen=True)
class AttentionSpeed:
    """Each case by every way in `rounds` turns of `seconds`, beside torch if that is installed."""

    cases: tuple[Case, ...]
    rounds: int = 5
    seconds: float = 0.5
    torch: bool = True

    def identity(self, content: bool = True) -> str:
        return config.identity(self, SCHEMA, content)

    def validate(self) -> None:
        if not self.cases:
            raise UserError("cases is empty: there is nothing to measure")
        check_least(self, "", ("seconds",), rounds=1)


CPU = (
    Case("8 x 256, 8 heads of 32", 8, 256, 8, 32),
    Case("4 x 1024, 8 heads of 64", 4, 1024, 8, 64),
    Case("1 x 4096, 4 heads of 64", 1, 4096, 4, 64),
)
SCALES = {
    "smoke": AttentionSpeed((Case("1 x 64", 1, 64, 2, 8),), rounds=1, seconds=0.05, torch=False),
    "cpu": AttentionSpeed(CPU),
}


def get_config(scale: str) -> AttentionSpeed:
    return SCALES[scale]


WAYS: dict[str, Callable[..., jax.Array]] = {
    "chunked": lambda q, k, v: attend(q, k, v, kind="chunked"),
    "reference": lambda q, k, v: attend(q, k, v, kind="reference"),
    "jax.nn": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True),
}


class Timed:
    """One way compiled for a case, forward alone or with the gradient."""

    def __init__(self, way: Callable[..., jax.Array], case: Case, gradient: bool) -> None:
        shape = (4, case.batch, case.length, case.heads, case.head_width)
        *self.arrays, d_out = jax.random.normal(jax.random.key(0), shape)

        def with_gradient(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
            return jax.vjp(way, q, k, v)[1](d_out)

        self.compiled = jax.jit(with_gradient if gradient else way).lower(*self.arrays).compile()
        self.memory_bytes = self.compiled.memory_analysis().temp_size_in_bytes
        jax.block_until_ready(self.compiled(*self.arrays))

    def seconds(self, seconds: float) -> float:
        """The median call of about `seconds` of them."""
        times, start = [], time.perf_counter()
        while len(times) < 3 or time.perf_counter() - start < seconds:
            called = time.perf_counter()
            jax.block_until_ready(self.compiled(*self.arrays))
            times.append(time.perf_counter() - called)
        return statistics.median(times)


def measure(base: AttentionSpeed, folder: Path) -> dict[str, Any]:
    """The times of each case; the table is printed and written to report.html."""
    keep_freed_memory()  # as training does
    with contextlib.ExitStack() as stack:
        installed = base.torch and importlib.util.find_spec("torch") is not None
        command = [sys.executable, str(Path(__file__).parent / "baselines" / "torch_attention.py")]
        torch = stack.enter_context(Process(command)) if installed else None
        rows = [row for case in base.cases for row in measure_case(base, case, torch)]
    shown = [cells(row) for row in rows]
    table = Table(list(shown[0]), [list(row.values()) for row in shown])
    device, cores, load = jax.devices()[0].device_kind, os.cpu_count(), [row["load"] for row in rows]
    machine = f"{device}, {cores} cores, load average {min(load):.1f} to {max(load):.1f} while measuring"
    print(f"{table}\n{machine}")
    question = __doc__.splitlines()[0]
    write(folder, Page("Attention's speed", question, tables=[("Each case", table)], notes=[machine]))
    return {"device": device, "cores": cores, "rows": rows}


def measure_case(base: AttentionSpeed, case: Case, torch: Process | None) -> list[dict[str, Any]]:
    """A row for each way: seconds of each turn by what is computed, and bytes of the gradient."""
    compiled = {
        (name, gradient): Timed(way, case, gradient)
        for name, way in WAYS.items()
        for gradient in (False, True)
    }
    turns: dict[tuple[str, bool], list[float]] = {key: [] for key in compiled}
    question = dataclasses.asdict(case) | {"seconds": base.seconds}
    for _ in range(base.rounds):
        for key, timed in compiled.items():
            turns[key].append(timed.seconds(base.seconds))
        for gradient in (False, True) if torch is not None else ():
            answer = torch.ask(**question, gradient=gradient)["seconds"]
            turns.setdefault(("torch", gradient), []).append(answer)
    return [
        dataclasses.asdict(case)
        | {
            "way": name,
            "forward_seconds": turns[name, False],
            "gradient_seconds": turns[name, True],
            "torch_seconds": {"forward": turns.get(("torch", False)), "gradient": turns.get(("torch", True))},
            "memory_bytes": compiled[name, True].memory_bytes if name in WAYS else None,
            "load": os.getloadavg()[0],
        }
        for name in dict.fromkeys(name for name, _ in turns)
    ]


def cells(row: dict[str, Any]) -> dict[str, str]:
    """What the table shows of a row, by column."""
    shown = {"case": row["name"], "way": row["way"]}
    for what, title in (("forward", "forward"), ("gradient", "with gradients")):
        own, theirs = row[f"{what}_seconds"], row["torch_seconds"][what]
        shown[f"{title} ms"] = f"{1e3 * min(own):,.2f}"
        if theirs:
            ratios = [b / a for a, b in zip(own, theirs, strict=True)]
            shown[f"{title} x torch"] = (
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            )
    held = row["memory_bytes"]
    return shown | {"gradient's MB": "" if held is None else f"{held / 1e6:,.1f}"}
