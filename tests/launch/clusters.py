"""A sweep for real clusters: runs of a second or two on bits; at the scale `branches` some share a trunk.

At the scale `pair` each run is spread over two devices.
"""

import dataclasses
from pathlib import Path

from llm_jax import config, experiment_file
from llm_jax.schedules import WSD

bits, _ = experiment_file.load_experiment(str(Path(__file__).parent / "bits.py"))
SCALES = {"branches": 2, "twelve": 12, "pair": 2}
STEPS = 100


def get_config(scale):
    base = config.replace(bits.get_config("slow"), "data.seconds", 0.03)
    if scale == "branches":
        base = config.replace(base, "optimizer.schedule", WSD(warmup_steps=10))
    if scale == "pair":
        base = config.replace(base, "execution.mesh.data", 2)
    return dataclasses.replace(base, name=scale, tokens=16 * STEPS)


def sweep(base):
    seeds = [dataclasses.replace(base, seed=seed, name=f"seed-{seed}") for seed in range(SCALES[base.name])]
    if base.name != "branches":
        return seeds
    return [*seeds, *(dataclasses.replace(one, tokens=16 * 60, name=f"{one.name}-60") for one in seeds)]
