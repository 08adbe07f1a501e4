"""What does it take to train Llama 3 of 1B to 405B on TPU slices?

    python -m llm_jax.aot --config=experiments/llama3.py:1b --topology=v5e:4x4
    python -m llm_jax.aot --config=experiments/llama3.py:8b --topology=v5e:16x16
    python -m llm_jax.aot --config=experiments/llama3.py:70b --topology=v5p:4x8x8
    python -m llm_jax.aot --config=experiments/llama3.py:405b --topology=v5p:8x8x8
    python -m launch.local --config=experiments/llama3.py:smoke      (a few seconds: a tiny one is trained)

Sizes are those of the Llama 3 and 3.2 releases; AdamW with float32 parameters and moments, products in
bfloat16, blocks computed again in the backward pass. The larger scales are for slices: here they are compiled
ahead of time, by libtpu on a CPU, which tells whether they fit and what they exchange. Nothing is run, so
nothing is said of speed. Results: analysis/slices.md.
"""

import dataclasses

from llm_jax.data import Text
from llm_jax.models import Layout, ModelConfig
from llm_jax.models.presets import PRESETS
from llm_jax.optimizers import AdamW
from llm_jax.run import Execution, Run
from llm_jax.schedules import Cosine
from llm_jax.sharding import MeshConfig

_1B = dataclasses.replace(
    PRESETS["llama3-8b"], layers=16, width=2048, heads=32, kv_heads=8, mlp_width=8192, tied=True
)
_TINY = dataclasses.replace(_1B, layers=2, width=32, heads=4, kv_heads=2, mlp_width=64, vocabulary=None)


@dataclasses.dataclass(frozen=True)
class Scale:
    """A model, the rows and tokens of a step, the ways of the mesh's `tensor` axis, D, and a step's parts."""

    model: ModelConfig
    rows: int
    length: int
    tensor: int
    tokens: int
    micro_batches: int = 1


SCALES = {
    "smoke": Scale(dataclasses.replace(_TINY, dtype="float32"), 8, 64, 1, 20 * 8 * 64),
    "1b": Scale(_1B, 32, 4096, 1, 20 * 10**9),
    "8b": Scale(PRESETS["llama3-8b"], 256, 8192, 1, 160 * 10**9),
    "70b": Scale(PRESETS["llama3-70b"], 256, 8192, 4, 1400 * 10**9),
    "405b": Scale(PRESETS["llama3-405b"], 256, 8192, 4, 8100 * 10**9, micro_batches=2),
}


def get_config(scale: str) -> Run:
    chosen = SCALES[scale]
    data = Text(sequence_length=chosen.length, batch_size=chosen.rows, repeat=True)
    spread = MeshConfig() if scale == "smoke" else MeshConfig(data=1, fsdp=-1, tensor=chosen.tensor)
    optimizer = AdamW(learning_rate=3e-4, schedule=Cosine())
    execution = Execution(spread, Layout(remat="full"), chosen.micro_batches)
    return Run(chosen.model, data, optimizer, tokens=chosen.tokens, execution=execution)


def sweep(base: Run) -> list[Run]:
    """The run itself."""
    return [base]
