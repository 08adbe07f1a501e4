"""One process of experiments/packing.py: it trains what standard input asks for and answers how fast.

    python -m experiments.baselines.trainer --devices=2

Questions and answers are JSON lines. {"shape": {...}, "members", "block", "diverged", "seconds"} is answered
with tokens_per_second over all members, compile_seconds and memory_bytes; {"product": [n, k, m]} with the
FLOP/s of bare products of matrices n x k and k x m, and the device's name.
"""

import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments.throughput import Shape, Trainer
from llm_jax.kernels.memory import keep_freed_memory
from llm_jax.models import Layout


def product(n: int, k: int, m: int, seconds: float = 0.3) -> float:
    """FLOP/s: the best of several, each of many products, so that dispatching doesn't count."""
    times = 1 + int(2e9 / (2 * n * k * m))

    @jax.jit
    def many(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda _, a: a + 1e-3 * (a @ b) @ b.T, a)

    a, b, best = jnp.ones((n, k)), jnp.full((k, m), 1e-3), float("inf")
    many(a, b).block_until_ready()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        many(a, b).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 4 * n * k * m * times / best


def main() -> None:
    jax.config.update("jax_num_cpu_devices", int(sys.argv[1].partition("=")[2]))
    keep_freed_memory()
    trainers: dict[Any, Trainer] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "product" in question:
            answer = {
                "flops_per_second": product(*question["product"]),
                "device": jax.devices()[0].device_kind,
            }
        else:
            key = json.dumps({name: x for name, x in question.items() if name != "seconds"})
            if key not in trainers:
                shape = Shape(**question["shape"])
                trainers = {k: trainer for k, trainer in trainers.items() if trainer.shape == shape}
                trainers[key] = Trainer(
                    shape, Layout(), question["members"], question["block"], question["diverged"]
                )
            trainer = trainers[key]
            answer = {
                "tokens_per_second": trainer.rate(question["seconds"]),
                "compile_seconds": trainer.program.compile_seconds,
                "memory_bytes": trainer.program.memory_bytes,
            }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
