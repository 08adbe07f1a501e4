"""Packed sweeps: runs that differ in numbers only, trained as one program.

Small models leave an accelerator idle, and sweeps are made of small models. The members of a pack are the
same step under `jax.vmap`, over a leading member axis of state and hyperparameters, which may be spread over
a mesh axis of its own. They share their batches if they have one order of rows (one seed, or one
data_seed), else each has its own. Where most have ended, the others go on in a narrower pack. In its records
each is a run like any other: it can be continued alone, as a run begun alone can be in a pack.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from llm_jax import config, facts, files, optimizers, sharding
from llm_jax.config import UserError
from llm_jax.kernels import memory
from llm_jax.loop import train_together
from llm_jax.member import Hook, Member
from llm_jax.placement import mesh_of
from llm_jax.process import prepare_xla
from llm_jax.program import Shape, program, shape_of, widest
from llm_jax.run import Cell, NoSweep, Run
from llm_jax.sharding import MeshConfig


def train_packed(
    runs: Sequence[Run],
    folders: Sequence[str | Path],
    hooks: Sequence[Sequence[Hook]] = (),
    progress: Sequence[Any] = (),
) -> list[dict[str, Any]]:
    """`train` for many runs at once, each in its folder; returns what their result.json hold.

    Members may differ in seeds, initial scale, tokens, labels, schedule, numbers of optimizer and objective;
    those that are complete stay as they are. hooks, progress: of each run, where given. Raises UserError,
    before anything is written, for other differences, and for a pack that devices can't hold or divide.
    """
    for run in runs:
        config.check(run)
    refuse_differences(runs)
    if jax.process_count() > 1 and len(runs) > 1:
        raise UserError(
            f"a pack is for one process, and jax.distributed has joined {jax.process_count()}: train its "
            "runs one by one"
        )
    places = [files.path(folder) for folder in folders]
    if len({place.absolute() for place in places}) < len(runs):
        raise UserError(f"{len(runs)} members need as many folders, each its own")
    prepare_xla(runs[0].execution.deterministic)
    source, whole = runs[0].data.open(), mesh_of(runs[0], len(runs))
    hooks, progress = hooks or [()] * len(runs), progress or [None] * len(runs)
    wanted = list(zip(runs, places, hooks, progress, strict=True))
    members = [Member(run, source, *rest) for run, *rest in wanted]
    while waiting := [number for number, member in enumerate(members) if member.result is None]:
        width, own_rows = len(waiting), len({runs[number].order for number in waiting}) > 1
        ways = math.gcd(width, whole.shape["member"])
        mesh = sharding.make_mesh(MeshConfig(**{**whole.shape, "member": ways}))
        train_together([members[number] for number in waiting], pack_shape(runs[0], width, own_rows), mesh)
        for number in waiting:  # those that a narrower pack goes on with start where this one left them
            if members[number].result is None:
                run, *rest = wanted[number]
                members[number] = Member(run, source, *rest)
    return [member.result for member in members]


def pack(run: Run, width: int, own_rows: bool = False) -> tuple[Shape, jax.sharding.Mesh]:
    """The shape of a pack of `width` runs like this one, and the mesh that it goes on."""
    return pack_shape(run, width, own_rows), mesh_of(run, width)


def pack_shape(run: Run, width: int, own_rows: bool) -> Shape:
    """The shape of a pack of `width` runs like this one; one needs no axis."""
    members = width if width > 1 else None
    return dataclasses.replace(shape_of(run, run.data.open()), members=members, own_rows=own_rows)


def fitting(runs: Sequence[Run]) -> tuple[int, str]:
    """How many of `runs`, from the first on, fit into memory by what their compiled programs need, and why.

    At least one. Of a host's memory this process takes no more than the part that it has of the cores.
    """
    prepare_xla(runs[0].execution.deterministic)
    shape, mesh = pack(runs[0], len(runs), len({run.order for run in runs}) > 1)
    room = memory.room(mesh)
    if room is not None and mesh.devices.flat[0].platform == "cpu":
        room *= facts.cores() / os.cpu_count()
    needs = f"{len(runs)} runs as one program need {program(shape, mesh).memory_bytes / 1e9:,.3g} GB"
    if room is None:
        return len(runs), f"{needs}; how much there is isn't known"
    fits = max(1, widest(shape, mesh, room))
    return fits, f"{needs} of {room / 1e9:,.3g} GB" + (f": {fits} fit" if fits < len(runs) else "")


def alike(run: Run) -> Run:
    """What runs have in common that can be packed together."""
    checkpoint = dataclasses.replace(run.execution.checkpoint, keep_steps=())
    return dataclasses.replace(
        run,
        optimizer=optimizers.structure(run.optimizer),
        objective=run.objective.structure(),
        execution=dataclasses.replace(run.execution, trunk="", checkpoint=checkpoint),
        tokens=1,
        seed=0,
        data_seed=None,
        initial_scale=1.0,
        name="",
        cell=Cell(),
        sweep=NoSweep(),
    )


def refuse_differences(runs: Sequence[Run]) -> None:
    """Raises UserError, naming the first field, if the runs can't be packed together."""
    if not runs:
        raise UserError("a pack needs at least one run")
    fields = [[flag for flag, _ in config.listing(alike(run))] for run in runs]
    for number, flags in enumerate(fields[1:], 1):
        for one, other in zip(fields[0], flags, strict=False):
            if one != other:
                raise UserError(
                    f"member {number} of the pack has {other} where member 0 has {one}: members differ in "
                    "seeds, initial_scale, tokens, schedule and the numbers of optimizer and objective only"
                )
