"""How much longer do steps take while a state is being saved?

    python -m launch.local --config=experiments/saving.py            (the quickstart's largest model)
    python -m launch.local --config=experiments/saving.py:smoke      (seconds)

One run saves its state every so many steps and logs twice as often, so that blocks of steps which begin with
a save and blocks without one take turns, in one process and on one machine. The stall is by how much a block
with a save takes longer than the one behind it: the median over all pairs, with its 90% interval by
bootstrap. The first pair, in which much happens once, isn't counted.

Result (quickstart, 2026-11-22, 2 idle cores): 14.6% (13.3% to 15.3%), 47 ms a save; the goal is missed.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import config, experiment_file, records
from llm_jax.run import Cell, NoSweep, Run
from llm_jax.scaling.page import Answer, Page, Table, show
from llm_jax.train import train

isoflop, _ = experiment_file.load_experiment(str(Path(__file__).parent / "isoflop.py"))

GOAL = 0.05  # what a save may cost

# Steps of a block, which those of a dispatch (8) divide, and pairs of blocks.
SCALES = {"quickstart": (48, 41), "smoke": (16, 4)}


def get_config(scale: str) -> Run:
    """The sweep's largest model, for as many steps as are measured."""
    block, pairs = SCALES[scale]
    largest = max(isoflop.sweep(isoflop.get_config(scale)), key=lambda run: run.model.width)
    run = config.replace(largest, "execution.checkpoint.every_steps", 2 * block)
    run = config.replace(run, "execution.log_every_steps", block)
    tokens = 2 * block * pairs * run.data.tokens_per_step
    return dataclasses.replace(run, tokens=tokens, name=f"saving-{scale}", cell=Cell(), sweep=NoSweep())


def measure(base: Run, folder: Path) -> dict[str, Any]:
    """The stall with its interval, the median seconds of either kind of block, and the size of a state."""
    load = os.getloadavg()[0]
    train(base, folder / "run")
    block, saves = base.execution.log_every_steps, base.execution.checkpoint.every_steps
    ends = records.metrics(folder / "run").set_index("step").loc[saves:, "seconds"]
    with_save, without = np.diff(ends).reshape(-1, 2).T
    stalls = with_save / without - 1
    draws = np.random.default_rng(0).choice(stalls, (2000, len(stalls)))
    low, high = np.quantile(np.median(draws, axis=1), (0.05, 0.95))
    state = folder / "run" / "checkpoints" / f"{base.steps:08d}"
    result = {
        "steps": block,
        "stall": np.median(stalls),
        "interval": [low, high],
        "seconds_with_save": np.median(with_save),
        "seconds_without": np.median(without),
        "state_bytes": sum(path.stat().st_size for path in state.rglob("*") if path.is_file()),
        "stalls": stalls.tolist(),
        "load": [load, os.getloadavg()[0]],
    }
    show(folder, report(result))
    return result


def report(result: dict[str, Any]) -> Page:
    low, high = result["interval"]
    cells = {
        "pairs": f"{len(result['stalls'])}",
        "with a save": f"{result['seconds_with_save']:.3f} s",
        "without": f"{result['seconds_without']:.3f} s",
        "state": f"{result['state_bytes'] / 1e6:.2f} MB",
        "load": " to ".join(f"{load:.1f}" for load in result["load"]),
    }
    stall = f"A save makes {result['steps']} steps {result['stall']:.1%} longer"
    answer = Answer(stall, f"90% interval {low:.1%} to {high:.1%}", result["stall"] < GOAL)
    table = Table(list(cells), [list(cells.values())])
    tables = [("Blocks of steps, medians", table)]
    return Page("Saving", __doc__.splitlines()[0], answers=[answer], tables=tables)
