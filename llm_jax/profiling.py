"""Where a step's time goes: a trace of some steps by JAX's profiler, and a table of it.

    profile/                the trace; `tensorboard --logdir` draws it where the plugin xprof is installed
    profile/summary.txt     the operations that took longest, by what they belong to

An operation is named by the primitive that it came from and by its part of the step: the forward pass, the
backward pass (what JAX transposed), or the rest (the optimizer, metrics). What contains others counts without
them. With several threads or devices, shares are of all their time at work.
"""

import collections
import contextlib
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from llm_jax import files
from llm_jax.config import UserError

MOST_LINES = 15
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*\bop_name="([^"]+)"', re.MULTILINE)


def span(text: str) -> tuple[int, int]:
    """10:15 as (10, 15): from when 10 steps are done until 15 are; (0, 0) for nothing. Raises UserError."""
    found = re.fullmatch(r"(\d+):(\d+)", text or "0:0")
    if found is None or (text and int(found[1]) >= int(found[2])):
        raise UserError(f"profile_steps is {text!r}; it is FROM:TO, the steps to trace, such as 10:15")
    return int(found[1]), int(found[2])


class Trace:
    """Traces the steps of `span`, as a context: `at` is called with the steps done, before each next one.

    quiet: makes the devices quiet, so that a trace is of whole steps. hlo: the text of the compiled step.
    """

    def __init__(
        self, folder: Path, steps: tuple[int, int], quiet: Callable[[], None], hlo: Callable[[], str | None]
    ) -> None:
        self._folder, self._quiet, self._hlo = folder / "profile", quiet, hlo
        self._first, self._last = steps
        self._began: tuple[int, float] | None = None
        self._open = contextlib.ExitStack()

    def at(self, done: int) -> None:
        if self._began is None and self._first <= done < self._last:
            self._quiet()
            self._place = self._open.enter_context(files.filled(self._folder))
            jax.profiler.start_trace(str(self._place))
            self._began = done, time.perf_counter()
        elif self._began is not None and done >= self._last:
            self._stop(done)

    def _stop(self, done: int) -> None:
        self._quiet()
        (first, began), self._began, self._last = self._began, None, 0
        seconds = time.perf_counter() - began
        jax.profiler.stop_trace()
        trace = max(self._place.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        text = table(planes, names(self._hlo() or ""), done - first, seconds)
        (self._place / "summary.txt").write_text(text + "\n")
        self._open.close()
        print(text, flush=True)

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: Any) -> None:
        """A run that ends meanwhile leaves the trace without its summary."""
        if self._began is not None:
            jax.profiler.stop_trace()
        self._open.close()


def names(hlo: str) -> dict[str, str]:
    """What each instruction of a compiled step is called in the table."""
    return {name: _called(origin) for name, origin in _INSTRUCTION.findall(hlo)}


def _called(origin: str) -> str:
    """jit(step)/transpose(jvp(...))/while/body/dot_general is "backward dot_general"."""
    part = "backward" if "transpose(" in origin else "forward" if "jvp(" in origin else "rest"
    return f"{part} {origin.rpartition('/')[2]}"


def table(planes: Iterable[Any], called: dict[str, str], steps: int, seconds: float) -> str:
    """The summary of `steps` steps that took `seconds`; planes: of ProfileData."""
    spent: collections.Counter[str] = collections.Counter()
    for plane in planes:
        for line in plane.lines:
            for name, own in _own_times(line.events):
                spent[called.get(name, f"rest {name.rstrip('.0123456789')}")] += own
    total = sum(spent.values())
    lines = [
        f"{steps} steps, {1e3 * seconds / steps:.2f} ms each",
        f"{'share':>6} {'ms a step':>10}  operation",
    ]
    for name, own in spent.most_common(MOST_LINES):
        lines.append(f"{own / total:>6.1%} {own / 1e6 / steps:>10.3f}  {name}")
    if rest := sum(own for _, own in spent.most_common()[MOST_LINES:]):
        lines.append(f"{rest / total:>6.1%} {rest / 1e6 / steps:>10.3f}  all others")
    parts = collections.Counter()
    for name, own in spent.items():
        parts[name.partition(" ")[0]] += own
    return "\n".join([*lines, ", ".join(f"{part} {own / total:.0%}" for part, own in parts.most_common())])


def _own_times(events: Iterable[Any]) -> Iterable[tuple[str, float]]:
    """(instruction, nanoseconds without those of what it contains) of one thread's or device's events."""
    found = []
    for event in events:
        stats = dict(event.stats)
        if "hlo_op" in stats:
            found.append((event.start_ns, -event.duration_ns, str(stats["hlo_op"])))
    open_ones: list[tuple[float, int]] = []  # (end, index) of those around the present one
    own = []
    for start, minus, name in sorted(found):
        while open_ones and open_ones[-1][0] <= start:
            open_ones.pop()
        if open_ones:
            own[open_ones[-1][1]][1] += minus
        open_ones.append((start - minus, len(own)))
        own.append([name, -minus])
    return [(name, max(nanoseconds, 0.0)) for name, nanoseconds in own]
