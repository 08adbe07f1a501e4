"""The ladder of a sweep: one model at several sizes, the rate that goes with each, the text of each scale.

Experiments that ask how loss goes with size and tokens share these, so that their points can be compared.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llm_jax.config import UserError
from llm_jax.data import Python, SentencePiece, Text
from llm_jax.models import counting
from llm_jax.models.transformer import Transformer
from llm_jax.optimizers import AdamW
from llm_jax.run import Cell, Execution, Run
from llm_jax.schedules import Cosine
from llm_jax.values import write

if TYPE_CHECKING:
    import pandas

COUNTING = "matrices of the body and of the logits (norms and the input table don't count)"
MULTIPLES, RATE = (0.5, 1.0, 2.0), "optimizer.learning_rate"

# The rate is that of width 64; `rate` says what other widths get.
OPTIMIZER = AdamW(learning_rate=6e-3, schedule=Cosine(warmup_fraction=0.05, final_fraction=0.0))

SMALL = Text(Python(), sequence_length=128, batch_size=4, held_out_bytes=2**18)
DATA = {
    "smoke": dataclasses.replace(SMALL, held_out_bytes=2**15),
    "gpu": Text(Python(packages=True), sequence_length=256, batch_size=32),
    # Name a corpus of some 20 billion tokens: --config.data.corpus=FOLDER.
    "full": Text(tokenizer=SentencePiece(vocabulary=32768), sequence_length=1024, batch_size=256),
}

# (width, layers) of each size.
Shapes = tuple[tuple[int, int], ...]


def text(scale: str) -> Text:
    """Python's own source, cut as suits a scale; at `full` a corpus that the user names."""
    return DATA.get(scale, SMALL)


def execution(scale: str, **fields: Any) -> Execution:
    """Where a step takes milliseconds eight are dispatched at once: each dispatch costs the host two."""
    return Execution(block_steps=1 if scale in ("gpu", "full") else 8, **fields)


def shapes(widths: Sequence[int], layers: int) -> Shapes:
    return tuple((width, layers) for width in widths)


def check_shapes(sizes: Shapes, least: int = 1) -> None:
    """Raises UserError where sweep.shapes has fewer than `least` sizes, or one that can't be built."""
    if len(sizes) < least:
        raise UserError(f"sweep.shapes is {write(sizes)}; it needs {least} (width, layers) or more")
    for size in sizes:
        if min(size) < 1:
            raise UserError(f"sweep.shapes has {write(size)}; width and layers are at least 1")


def model_of(base: Run, width: int, layers: int) -> Transformer:
    """The base's model at a size, with as many heads as leave each an even width (rotary) of at least 16."""
    heads = max((h for h in range(1, width // 16 + 1) if width % (2 * h) == 0), default=1)
    return dataclasses.replace(base.model, width=width, layers=layers, heads=heads)


def rate(base: Run, width: float, tokens: float) -> float:
    """The learning rate that the rule gives: the base's at width 64 and at the base's tokens.

    It goes as width^`rate_exponent` and as tokens^-`horizon_exponent` (the paper's is in transfer.py).
    """
    horizon = (tokens / base.tokens) ** -base.sweep.horizon_exponent
    return base.optimizer.learning_rate * (width / 64) ** base.sweep.rate_exponent * horizon


def candidates(base: Run, sizes: Shapes) -> "pandas.DataFrame":
    """A row a size, as grids.py needs them: N, flops_per_token = 6 N, tokens_per_step, width, layers."""
    import pandas

    rows = []
    for width, layers in sizes:
        model = model_of(base, width, layers).resolve(base.data)
        N = counting.closed_form(model, base.data.sequence_length)["N_matmul"]
        rows.append({"N": N, "flops_per_token": 6 * N, "width": width, "layers": layers})
    return pandas.DataFrame(rows).assign(tokens_per_step=base.data.tokens_per_step)


@functools.cache
def epoch_tokens(base: Run) -> int:
    """Tokens of one epoch; raises UserError for data without an end, or without held-out documents."""
    source = base.data.open()
    if source.available_tokens is None:
        raise UserError("this sweep sees no token twice: set data.repeat=false, name a finite corpus")
    if source.held_out() is None:
        raise UserError("this sweep is scored on held-out documents: set data.held_out_fraction=0.05")
    return source.available_tokens


def epoch_note(base: Run, longest_tokens: int) -> str:
    """A line for the plan: how much of the corpus the longest run sees."""
    available = epoch_tokens(base)
    return (
        f"vocabulary {base.data.vocabulary:,}; one epoch has {available:,} tokens, the longest run takes "
        f"{longest_tokens:,} ({longest_tokens / available:.0%})"
    )


def run_of(base: Run, cell: Mapping[str, Any], multiple: float = 1.0, seed: int | None = None) -> Run:
    """The run of a planned cell (name, role, width, layers, N, D, budget_flops).

    With `seed` it is one that checks the rate, at a multiple of what the rule gives.
    """
    checks = seed is not None
    return dataclasses.replace(
        base,
        model=model_of(base, cell["width"], cell["layers"]),
        optimizer=dataclasses.replace(
            base.optimizer, learning_rate=multiple * rate(base, cell["width"], cell["D"])
        ),
        tokens=cell["D"],
        seed=seed if checks else base.seed,
        name=f"rate-{cell['name']}-{multiple:g}x-seed{seed}" if checks else cell["name"],
        cell=Cell("rate" if checks else cell["role"], cell["budget_flops"]),
    )


def rectangle(base: Run, tokens: Sequence[int], name: str = "") -> list[Run]:
    """Every shape of the sweep on every number of tokens."""
    return [
        run_of(base, cell | {"name": f"{name}{width}x{layers}-{D}", "role": "grid", "budget_flops": None})
        for (width, layers), D in itertools.product(base.sweep.shapes, tokens)
        for cell in [{"width": width, "layers": layers, "D": D}]
    ]


def octaves(first: int, last: int) -> tuple[int, ...]:
    """2^first, 2^(first+1) .. 2^last tokens."""
    return tuple(2**n for n in range(first, last + 1))


def rate_runs(base: Run, cell: Mapping[str, Any]) -> list[Run]:
    """The runs that check the rule's rate at a cell, beside the cell's own."""
    return [
        run_of(base, cell, multiple, base.seed + extra)
        for extra in range(base.sweep.rate_seeds)
        for multiple in MULTIPLES
        if (multiple, extra) != (1.0, 0)
    ]


def points(runs: "pandas.DataFrame") -> "pandas.DataFrame":
    """The runs' table with N, D and C by this counting, and width, layers and rate under short names."""
    if not (runs["status"] == "done").any():
        raise UserError("no run of this sweep is done: there is nothing to fit")
    shown = {name.rpartition(".")[2]: runs[name] for name in ("model.width", "model.layers", RATE)}
    return runs.assign(N=runs["N_matmul"], C=runs["flops_6nd_matmul"], **shown)
