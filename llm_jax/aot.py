"""Compiling a run's train step for a TPU slice that isn't there: does it fit, and what could it reach?

python -m llm_jax.aot --config=experiments/isoflop.py:cpu --config.model=llama3-8b --topology=v5e:16x16
python -m llm_jax.aot --config=… --topology=v5p:4x8x8 --search     (batch, remat and mesh: the best that fits)

The step is the trainer's own, compiled by libtpu as on the slice. Memory and exchanges are the compiler's
numbers. Times are a roofline: products at the peak of the data sheet, memory, links inside a slice and the
network between slices at full rate, all at once. Nothing is run, so no speed is measured; a real step takes
longer. Results are kept on disk, by the program's text.
"""

import dataclasses
import importlib.metadata
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags

from llm_jax import command_line, config, sharding
from llm_jax.config import UserError
from llm_jax.data import cache_folder
from llm_jax.data.cache import digest
from llm_jax.files import dumps, write_atomically
from llm_jax.kernels import devices, hlo, memory, slices
from llm_jax.models import counting
from llm_jax.placement import mesh_of
from llm_jax.program import Program, shape_of
from llm_jax.run import Run

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
REMATS = ("none", "dots", "full")


def compiled_for(run: Run, topology: str, count: int = 1) -> dict[str, Any]:
    """What the compiler says of the train step of `run` on `count` slices of that name; see `--json`.

    fits; peak_bytes and hbm_bytes of a device (a chip, or half of one: `devices.py`); flops of a step by the
    exact count, executed_flops those of the trace (with what remat repeats; None where it can't tell);
    collectives inside a slice and between_slices: {kind: count, bytes a device receives (`hlo.Exchange`)};
    compile_seconds; estimated_step_seconds and what bounds it; estimated_mfu. Where it doesn't fit,
    peak_bytes is what the compiler asked for. Raises UserError for what can't be compiled at all.
    """
    found = slices.describe(topology, count)
    mesh = mesh_of(run, 1, found)
    shape = dataclasses.replace(shape_of(run, run.data), block=1)
    with devices.compiling_for("tpu"), jax.set_mesh(mesh):
        step = Program(shape, mesh)
        text = step.lowered.as_text()
        libtpu = importlib.metadata.version("libtpu")
        place = cache_folder() / "aot" / f"{digest([text, topology, count, libtpu, hlo.VERSION])}.json"
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, dumps(_compile(step) | {"libtpu": libtpu}))
        compiled = json.loads(place.read_text())
    chip = devices.find(found[0])
    facts = {
        "topology": topology,
        "slices": count,
        "chips": count * math.prod(map(int, topology.partition(":")[2].split("x"))),
        "devices": mesh.size,
        "device": found[0].device_kind,
        "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
        "remat": run.execution.layout.remat,
        "batch_size": run.data.batch_size,
        "tokens_per_step": run.data.tokens_per_step,
        "hbm_bytes": chip.memory_bytes,
    }
    facts |= _flops(run, step) | compiled
    return facts | (_roofline(run, facts, chip, slices.generation(topology)) if facts["fits"] else {})


def _compile(step: Program) -> dict[str, Any]:
    """What the compiler says, which takes it minutes."""
    started = time.perf_counter()
    try:
        compiled = step.compiled
    except jax.errors.JaxRuntimeError as error:
        whole = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", str(error))
        between = re.search(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds", str(error))  # beside the state
        asked = whole or between
        if asked is None:
            raise UserError(f"it can't be compiled: {' '.join(str(error).split())[:300]}") from None
        needed = float(asked[1]) * UNITS[asked[2]] + (0 if whole else memory.bytes_of_a_device(step.state))
        return {"fits": False, "peak_bytes": int(needed), "compile_seconds": time.perf_counter() - started}
    seconds, plan, text = time.perf_counter() - started, compiled.memory_analysis(), compiled.as_text()
    return {
        "fits": True,
        "peak_bytes": step.memory_bytes,
        "state_bytes": plan.argument_size_in_bytes,
        "temporary_bytes": plan.temp_size_in_bytes,
        "collectives": hlo.collectives(text),
        "between_slices": hlo.collectives(text, between_slices=True),
        "attention": "splash" if "tpu_custom_call" in text else "chunked",
        "compile_seconds": seconds,
    }


def _flops(run: Run, step: Program) -> dict[str, Any]:
    tokens = run.data.tokens_per_step
    exact = counting.count(run.resolved_model, run.data.spec, tokens)["flops_exact_per_token"]
    try:
        executed = counting.matmul_flops(step.traced.jaxpr.jaxpr)
    except ValueError:
        executed = None
    return {"flops": exact and exact * tokens, "executed_flops": executed}


def _roofline(
    run: Run, facts: dict[str, Any], chip: devices.Device, generation: slices.Generation
) -> dict[str, Any]:
    """The least time of a step if products, memory, links and network all go at full rate and at once.

    Memory: the state read and written once, and every temporary byte as well. Williams et al. 2009.
    """
    flops = facts["executed_flops"] or facts["flops"]
    peak = getattr(chip, getattr(run.model, "dtype", "float32"))
    inside, between = (
        sum(entry["bytes"] for entry in facts[where].values()) for where in ("collectives", "between_slices")
    )
    seconds = {
        "products": flops / facts["devices"] / peak,
        "memory": 2 * (facts["state_bytes"] + facts["temporary_bytes"]) / chip.bandwidth,
        "exchange": inside / generation.links,
        "network": between / generation.network,
    }
    slowest = max(seconds, key=seconds.__getitem__)
    mfu = facts["flops"] and facts["flops"] / (facts["devices"] * peak * seconds[slowest])
    return {
        "estimated_step_seconds": seconds[slowest],
        "estimated_seconds": seconds,
        "bound_by": slowest,
        "estimated_mfu": mfu,
    }


# ---- search ----


def candidates(run: Run, chips: int, count: int = 1) -> Iterator[Run]:
    """`run` on other meshes, with other remat and batches: from the least that is computed again to the most.

    Meshes spread parameters over all `chips` of a slice (fsdp), or over groups of them with 2 to 8 chips of
    `tensor` each, and with experts shared out as far as they can be; batches are half to four times the run's
    own, the largest first.
    """
    heads = getattr(run.resolved_model, "key_value_heads", 1)
    experts = getattr(run.resolved_model.merged, "experts", None)
    meshes = [
        sharding.MeshConfig(count, 1, 1, chips // (tensor * expert), expert, 1, tensor)
        for tensor in (1, 2, 4, 8)
        if heads % tensor == 0 and chips % tensor == 0
        for expert in sorted({1, math.gcd(chips // tensor, experts.count if experts else 1)})
    ]
    batches = [max(1, int(run.data.batch_size * factor)) for factor in (4, 2, 1, 0.5)]
    for mesh, remat, rows in itertools.product(meshes, REMATS, batches):
        if rows % (count * mesh.fsdp * mesh.expert * run.execution.micro_batches) == 0:
            changed = config.replace(run, "execution.mesh", mesh)
            changed = config.replace(changed, "execution.layout.remat", remat)
            yield config.replace(changed, "data.batch_size", rows)


def search(run: Run, topology: str, count: int = 1) -> list[dict[str, Any]]:
    """All that was tried, the best first: what fits, by the most tokens a second that the roofline allows.

    A batch that fits stands for all smaller ones of its mesh and remat, and no mesh's dearer remat is tried
    where a cheaper one holds the largest batch. What can't be compiled is told and passed over; where nothing
    can, raises the UserError of the last.
    """
    chips = len(slices.describe(topology, count)) // count
    found: list[dict[str, Any]] = []
    refused: UserError | None = None
    for one in candidates(run, chips, count):
        mesh, remat, rows = one.execution.mesh, one.execution.layout.remat, one.data.batch_size
        same = [old for old in found if old["fits"] and old["asked"] == dataclasses.asdict(mesh)]
        if any(old["batch_size"] >= rows for old in same):
            continue
        spread = " x ".join(f"{size} {name}" for name, size in dataclasses.asdict(mesh).items() if size > 1)
        try:
            facts = compiled_for(one, topology, count) | {"asked": dataclasses.asdict(mesh)}
            found.append(facts)
            said = _said(facts)
        except UserError as error:
            said = refused = error
        print(f"{spread}, remat {remat}, {rows} rows: {said}", file=sys.stderr)
    if refused and not found:
        raise refused
    return sorted(found, key=lambda facts: -tokens_per_second(facts))


def tokens_per_second(facts: dict[str, Any]) -> float:
    """By the roofline; 0 for what doesn't fit."""
    return facts["tokens_per_step"] / facts["estimated_step_seconds"] if facts["fits"] else 0.0


def _said(facts: dict[str, Any]) -> str:
    peak, there = (facts[name] / 2**30 for name in ("peak_bytes", "hbm_bytes"))
    if not facts["fits"]:
        return f"doesn't fit: {peak:.2f} of {there:.0f} GiB a device"
    return (
        f"fits: {peak:.2f} of {there:.0f} GiB a device; at best {facts['estimated_step_seconds']:.3f} s a "
        f"step, bound by {facts['bound_by']}"
    )


# ---- the command ----


def main() -> None:
    f, run = flags.FLAGS, command_line.chosen().config
    if not isinstance(run, Run):
        raise UserError("this experiment measures, it has no single run with a train step")
    if f.topology is None:
        raise UserError(f"--topology is missing, for example --topology=v5e:4x4; there are {slices.NAMES}")
    tried = search(run, f.topology, f.slices) if f.search else [compiled_for(run, f.topology, f.slices)]
    if not tried:
        raise UserError(
            f"no mesh of {f.topology} divides a batch of {run.data.batch_size} rows or its multiples"
        )
    best = tried[0] | ({"tried": tried} if f.search else {})
    if f.json:
        print(dumps(best))
        return
    print(f"{f.topology}, {best['chips']} chips; compiled, not run: {_said(best)}")
    for name, value in best.items():
        if name not in ("tried", "asked"):
            print(f"{name:>24}  {value}")


if __name__ == "__main__":
    command_line.define_config()
    flags.DEFINE_string(
        "topology", None, "the slice, by generation and shape of its chips: v5e:4x4, v5p:4x8x8"
    )
    flags.DEFINE_integer("slices", 1, "how many such slices, over the data centre's network", lower_bound=1)
    flags.DEFINE_bool("json", False, "one JSON object instead of lines")
    flags.DEFINE_bool("search", False, "try batches, remat and meshes, and give the best that fits")
    command_line.run_main(main)
