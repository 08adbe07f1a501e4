"""What a run's records say of it: what it is, how this start executes it, and how it ended."""

import dataclasses
import os
import time
from typing import Any

import jax

from llm_jax import config, placement, sharding
from llm_jax.data import Source
from llm_jax.environment import environment
from llm_jax.kernels import devices
from llm_jax.models import counting
from llm_jax.program import Program
from llm_jax.run import SCHEMA, Run


def described(run: Run, source: Source) -> dict[str, Any]:
    """What config.json says of a run wherever and however it is executed."""
    return {
        "identity": run.identity(),
        "schema": SCHEMA,
        "scientific": config.scientific(run),
        "config": config.to_json(run),
        "model": config.to_json(run.resolved_model),
        "start": dict(run.model.record(run.data)),
        "cell": dataclasses.asdict(run.cell),
        "data": dict(source.record),
    }


def counts(run: Run, source: Source) -> dict[str, Any]:
    """N by every counting, D, and FLOPs by every convention, per token and of the run (6ND, exact ...)."""
    tokens = run.steps * run.data.tokens_per_step
    facts = counting.count(run.resolved_model, source.spec, run.data.tokens_per_step)
    whole = {
        name.removesuffix("_per_token").replace("flops_6n", "flops_6nd"): value and value * tokens
        for name, value in facts.items()
        if name.endswith("_per_token")
    }
    return facts | whole | {"D": tokens}


def spent(steps: int, done: int, trunk: dict[str, Any] | None, numbers: dict[str, Any]) -> dict[str, Any]:
    """How far a run came, and what was computed for it alone; other counts are those of the unbroken run."""
    shared = trunk["from_step"] if trunk else 0
    flops = numbers["flops_6nd"] if numbers["flops_exact"] is None else numbers["flops_exact"]
    return {
        "trunk": trunk and trunk["identity"],
        "steps_shared": shared,
        "steps_done": done,
        "steps_trained": done - shared,
        "flops_spent": flops * (done - shared) / steps,
    }


def execution_facts(run: Run, program: Program) -> dict[str, Any]:
    """What this start's execution was: layout, pack and mesh, devices, versions, git revision."""
    axes = jax.tree.map(lambda role: role.axes, program.roles)
    pack = {"members": program.shape.members or 1, "own_rows": program.shape.own_rows}
    return {
        "layout": config.to_json(run.execution) | {"mesh": dict(program.mesh.shape)} | pack,
        "bytes_per_device": placement.state_bytes(program) | {"program": program.memory_bytes},
        "kept_whole": sharding.describe(program.params, axes, program.mesh),
        "cores": cores(),
        "environment": environment(),
    }


def outcome(
    run: Run, source: Source, mesh: jax.sharding.Mesh, status: str, **measured: Any
) -> dict[str, Any]:
    """What result.json holds. measured: losses, counts, seconds and speed."""
    facts = {
        "identity": run.identity(),
        "name": run.name,
        "status": status,
        **dataclasses.asdict(run.cell),
        **measured,
        "epochs": dict(source.epochs(run.steps * run.data.batch_size)),
        "steps": run.steps,
        "seed": run.seed,
        "resumes": resumes(run, mesh, measured["members"]),
        "cores": cores(),
    }
    return facts | speeds(facts, run, mesh) | environment()


def speeds(facts: dict[str, Any], run: Run, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """FLOP/s of the run by the exact count, and what share of the devices' peak all that run with it reach.

    None where that isn't known.
    """
    if facts["flops_exact_per_token"] is None:
        return {"flops_per_second": None, "mfu": None}
    achieved = facts["tokens_per_second"] * facts["flops_exact_per_token"]
    dtype = getattr(run.model, "dtype", "float32")
    peak = devices.peak_flops(mesh.devices.flat[0], dtype)
    mfu = None if peak is None else facts["members"] * achieved / (peak * mesh.size)
    return {"flops_per_second": achieved, "mfu": mfu}


def resumes(run: Run, mesh: jax.sharding.Mesh, members: int) -> str:
    """How closely a killed run that continues repeats the one that wasn't killed.

    On a CPU the number of cores decides how sums are split between threads; so does that of a pack's members.
    """
    rest = f" in a pack of {members}, else to 1e-5 over 20 steps" if members > 1 else ""
    if mesh.devices.flat[0].platform == "cpu":
        return f"bit for bit with as many cores{rest}"
    return f"bit for bit{rest}" if run.execution.deterministic else "to 1e-5 over 20 steps"


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class Stopwatch:
    """Tokens per second over the steps of this process; compiling, evaluating and saving don't count."""

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.steps, self.seconds = 0, 0.0
        self.last: float | None = None

    def lap(self, steps: int = 1) -> float:
        """Called when the metrics of `steps` steps have arrived; returns the rate so far (0 at first)."""
        now = time.perf_counter()
        if self.last is not None:
            self.steps, self.seconds = self.steps + steps, self.seconds + now - self.last
        self.last = now
        return self.tokens_per_second

    def restart(self) -> None:
        self.last = None

    @property
    def tokens_per_second(self) -> float:
        return self.steps * self.tokens_per_step / self.seconds if self.steps else 0.0
