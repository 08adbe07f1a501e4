"""Packs of a plan: runs with one program, which one worker trains at once (llm_jax/pack.py).

A pack takes as long as its longest member, so runs are packed with those that have about as many steps to
make; and every worker gets its part of them. Whether a pack fits into memory is known when its program has
been compiled: the worker that gets it then trains as many as fit, says so, and hands the others back.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from launch.sweep import Planned
from llm_jax.config import UserError
from llm_jax.loop import LEAST_STEPS
from llm_jax.pack import alike

# The least part of a pack's longest member that any other has to make: the rest of its place would be idle.
LEAST_PART = 0.75


@dataclasses.dataclass(frozen=True, eq=False)
class Pack:
    """Runs that are trained at once."""

    runs: tuple[Planned, ...]

    @property
    def price(self) -> float:
        return sum(run.price for run in self.runs)

    @property
    def ready(self) -> bool:
        return all(run.ready for run in self.runs)

    @property
    def label(self) -> str:
        first, *others = self.runs
        return f"{first.label} and {len(others)} packed with it" if others else first.label

    def task(self) -> dict[str, Any]:
        """All that a worker needs to know, as JSON values."""
        return {"runs": [run.task() for run in self.runs]}

    def of(self, runs: Iterable[Planned]) -> "Pack":
        """Those of its runs."""
        chosen = set(runs)
        return dataclasses.replace(self, runs=tuple(run for run in self.runs if run in chosen))


def width_of(text: str) -> int | None:
    """What --pack says: the most members of a pack, None for as many as suit."""
    if text in ("auto", "off"):
        return None if text == "auto" else 1
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise UserError(f"--pack={text}: it is auto, off, or the most members of a pack, such as 8")


def packed(runs: Sequence[Planned], workers: int, width: int | None) -> list[Pack]:
    """`runs` as packs of at most `width`; None: as wide as leaves each of `workers` a part, where it pays."""
    groups: dict[Any, list[Planned]] = {}
    for run in runs if width != 1 else ():
        groups.setdefault((alike(run.run), run.from_step), []).append(run)
    packs = [Pack((run,)) for run in runs] if width == 1 else []
    for group in groups.values():
        most = -(-len(group) // workers) if width is None else width
        waiting = sorted(group, key=lambda run: -run.price)
        while waiting:
            least = LEAST_PART * waiting[0].price
            chosen = [run for run in waiting if run.price >= least][:most]
            if width is None and sum(one.run.steps - one.from_step for one in chosen) < LEAST_STEPS:
                packs += [Pack((one,)) for one in chosen]
            else:
                packs.append(Pack(tuple(chosen)))
            waiting = [run for run in waiting if run not in chosen]
    return packs


def unstopped(packs: Sequence[Pack]) -> str:
    """A line on the runs that early stopping is asked for in vain; "" if there are none."""
    alone = [pack for pack in packs if len(pack.runs) == 1 and pack.runs[0].run.execution.stopping.margin]
    if not alone:
        return ""
    return (
        f"early stopping compares the members of a pack: it can't stop {len(alone)} runs that train alone; "
        "--pack=8, say, packs what can be packed"
    )


def summary(packs: Sequence[Pack], workers: int, width: int | None, off: str = "--pack=off") -> str:
    """A line on how the plan's runs are packed, and why so; "" if there are none. off: why width is 1."""
    if not packs:
        return ""
    widths = sorted((len(pack.runs) for pack in packs if len(pack.runs) > 1), reverse=True)
    if not widths:
        runs = [run for pack in packs for run in pack.runs]
        if width == 1:
            why = off
        elif all(len(pack.runs) == 1 for pack in packed(runs, workers, len(runs))):
            why = "no runs with one program and about as many steps"
        else:
            why = (
                f"with --workers={workers} no pack has {LEAST_STEPS:,} steps in all, which pay for compiling "
                "it; --pack=8, say, packs all the same"
            )
        return f"packs: none ({why})"
    shown = ", ".join(map(str, widths[:8])) + (" ..." if len(widths) > 8 else "")
    alone = sum(len(pack.runs) == 1 for pack in packs)
    why = (
        f"runs with one program and about as many steps, over {workers} worker{'s' * (workers != 1)}; "
        "narrower if the compiled program needs more memory than there is"
        if width is None
        else f"--pack={width}"
    )
    return f"packs of {shown} runs, {alone} runs alone ({why})"
