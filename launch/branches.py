"""The graph of a plan: which run starts from which other's state, by what stands on disk and what will.

A run that has begun keeps the start it had. Every other one may start from any run of its stage, or of an
earlier one, with which it has first steps in common (llm_jax/trunks.py); that one keeps the checkpoint.
Sharing changes no result, so it is not asked for: it is found.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from llm_jax import config, files, manifest, records, trunks
from llm_jax.run import Run

if TYPE_CHECKING:
    from launch.sweep import Planned

MOST_LINES = 12  # of a plan's trunks on the screen


def connect(stages: Sequence[Sequence["Planned"]]) -> list[tuple["Planned", ...]]:
    """The same runs, each with the trunk it starts from, and each trunk keeping the checkpoints it must."""
    items = [item for stage in stages for item in stage]
    place = items[0].folder
    complete = files.each(lambda item: item.complete, items, place)
    standing = files.each(lambda item: manifest.steps(item.folder / "checkpoints"), items, place)
    begun = [number for number in range(len(items)) if complete[number] or standing[number]]
    starts_at = files.each(lambda number: _begun_at(items[number]), begun, place)
    begun_at = dict(zip(begun, starts_at, strict=True))

    def offer(trunk: int, step: int) -> int:
        """What the trunk has passed already must stand; what is ahead of it, it will keep."""
        if not complete[trunk] and step > max(standing[trunk], default=0):
            return step
        return max((there for there in standing[trunk] if there <= step), default=0)

    # Complete runs come first, so that those to come start from them; then stage by stage.
    ranks = [number for number, stage in enumerate(stages) for _ in stage]
    ranks = [-1 if done else rank for done, rank in zip(complete, ranks, strict=True)]
    starts = trunks.graph([item.run for item in items], ranks, offer, set(begun))
    keep: dict[int, set[int]] = {}
    for start in starts.values():
        keep.setdefault(start.trunk, set()).add(start.from_step)

    connected: dict[int, Planned] = {}
    for number in sorted(range(len(items)), key=lambda number: _depth(number, starts)):
        item, start = items[number], starts.get(number)
        connected[number] = dataclasses.replace(
            item,
            run=_keeping(item.run, keep[number]) if number in keep else item.run,
            trunk=connected[start.trunk] if start else None,
            from_step=start.from_step if start else begun_at.get(number, 0),
        )
    numbers = iter(range(len(items)))
    return [tuple(connected[next(numbers)] for _ in stage) for stage in stages]


def _keeping(run: Run, steps: set[int]) -> Run:
    """The run with checkpoints of `steps` kept, and one from which a longer run could start some day."""
    steps = steps | {trunks.extensible_steps(run)} | set(run.execution.checkpoint.keep_steps)
    return config.replace(run, "execution.checkpoint.keep_steps", tuple(sorted(steps - {0})))


def _depth(number: int, starts: dict[int, trunks.Start]) -> int:
    return 1 + _depth(starts[number].trunk, starts) if number in starts else 0


def _begun_at(item: "Planned") -> int:
    """The step of another run's state with which a run began (0: it began anew)."""
    trunk = records.trunk(item.folder)
    return trunk["from_step"] if trunk else 0


def summary(items: Iterable["Planned"]) -> list[str]:
    """What a plan's trunks save, and a line for each of them; nothing where there is none."""
    items = list(items)
    saved = sum(item.flops - item.price for item in items)
    if not saved:
        return []
    flops = sum(item.flops for item in items)
    lines = [f"shared trunks leave {flops - saved:.2e} FLOPs of that to compute: {saved / flops:.0%} saved"]
    served: dict[Planned, list[Planned]] = {}
    for item in items:
        if item.trunk is not None:
            served.setdefault(item.trunk, []).append(item)
    for trunk, branches in served.items():
        ends = sorted((branch.from_step, branch.run.steps) for branch in branches)
        told = ", ".join(f"{start:,} to {end:,}" for start, end in ends)
        lines.append(f"  trunk {trunk.label} ({trunk.run.steps:,} steps), branches from steps {told}")
    more = len(lines) - 1 - MOST_LINES
    return [*lines[: MOST_LINES + 1], f"  and {more} trunks more"] if more > 0 else lines
