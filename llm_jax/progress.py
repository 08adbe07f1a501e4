"""What a user sees while runs train: a bar for each run, and a line for the whole sweep.

A run reports through `Progress`; alone, it draws its own bar. In a sweep the parent draws: it gives each
worker a way to send (`Progress(..., write=connection.send)`, each on a pipe of its own, so that a killed
worker breaks nobody else's) and feeds what arrives to `SweepProgress.show`. Where the output is no terminal
(a log file, CI) plain lines are printed now and then instead.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_DRAWS = 0.2
KNOWN = 0.05  # the part of a sweep's cost whose time foretells the rest's; or a run that has ended
SECONDS_BETWEEN_LINES = 10.0  # of one run, where the output is no terminal


class Status(NamedTuple):
    """Where a run is. Plain values: it can be pickled, or sent as a JSON list."""

    run: str
    step: int
    total_steps: int
    loss: float = math.nan
    tokens_per_second: float = 0.0
    seconds_left: float | None = None

    def __str__(self) -> str:
        if math.isnan(self.loss) and self.tokens_per_second == 0:
            return f"step {self.step:,}/{self.total_steps:,}, compiling"
        return (
            f"step {self.step:,}/{self.total_steps:,}, loss {self.loss:.4f}, "
            f"{self.tokens_per_second:,.0f} tokens/s, {clock(self.seconds_left)} left"
        )


class Progress:
    """The reporting side: `update` is called at every step and passes on a few statuses a second.

    write: takes a `Status`; by default the run's own bar on stderr. If whoever listens has gone (an OSError),
    the run goes on silently. headline: printed above that bar when the run begins, which it may never do.
    """

    def __init__(
        self,
        total_steps: int,
        label: str,
        write: Callable[[Status], None] | None = None,
        headline: str = "",
    ) -> None:
        self._display = Display() if write is None else None
        self._write, self._headline = write or self._display.show, headline
        self._start: tuple[float, int] | None = None
        self._last = -math.inf
        self._status = Status(label, 0, total_steps)
        if write is not None or self._display.terminal:
            self._send()

    def begin(self, step: int, notes: Sequence[str] = ()) -> None:
        """Says that nothing stands in the way of the run any more, and that it goes on from `step`.

        notes: lines about its data, and about where it lies, if that is on many devices.
        """
        self._status = self._status._replace(step=step)
        if self._display is not None:
            headline = self._headline + (f", continued from step {step:,}" if step else "")
            for line in (headline, *notes):
                self._display.say(line)
        if self._display is None or self._display.terminal:
            self._send()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Says that `step` steps are done (those before a restart count); `loss` is the last one's."""
        now, total = time.monotonic(), self._status.total_steps
        self._start = self._start or (now, step)
        done = step - self._start[1]
        left = (now - self._start[0]) / done * (total - step) if done else None
        self._status = Status(self._status.run, step, total, loss, tokens_per_second, left)
        if step >= total or now - self._last >= SECONDS_BETWEEN_DRAWS:
            self._last = now
            self._send()

    def close(self) -> None:
        """Sends the last status, if there was any, and leaves the bar as it is, or none without a step."""
        if self._start is not None:
            self._send()
        elif self._display is not None:
            self._display.remove(self._status.run)
        if self._display is not None:
            self._display.close()

    def _send(self) -> None:
        try:
            self._write(self._status)
        except OSError:
            self._write = lambda status: None


class Display:
    """Bars of the runs in flight on a terminal; elsewhere a line for each run every ten seconds."""

    def __init__(self, stream: TextIO | None = None, name_width: int = 0) -> None:
        self.stream, self._name_width = stream or sys.stderr, name_width
        # A pseudo-terminal that nobody has given a size can't show bars.
        self.terminal = self.stream.isatty() and os.get_terminal_size(self.stream.fileno()).lines > 0
        self._bars: dict[str, tqdm] = {}
        self._printed: dict[str, tuple[float, Status]] = {}

    def show(self, status: Status) -> None:
        """Draws or prints `status`, now or not at all."""
        if not self.terminal:
            when, before = self._printed.get(status.run, (-math.inf, None))
            due = status.step >= status.total_steps or time.monotonic() - when >= SECONDS_BETWEEN_LINES
            if due and status != before:
                self._printed[status.run] = time.monotonic(), status
                self.say(f"{status.run}: {status}")
            return
        if status.run not in self._bars:
            self._bars[status.run] = self.bar(status.run, status.total_steps)
        self.draw(self._bars[status.run], status.step, str(status))

    def bar(self, name: str, total: float) -> tqdm:
        """A new bar on the first free line, to be drawn by `draw`."""
        return tqdm(
            desc=name.ljust(self._name_width),
            total=total,
            file=self.stream,
            bar_format="{desc} {percentage:3.0f}%|{bar:20}| {unit}",
            unit="",
            dynamic_ncols=True,
            leave=False,
        )

    @staticmethod
    def draw(bar: tqdm, done: float, text: str) -> None:
        """Moves a bar to `done`, with `text` behind it (as its unit: tqdm's postfix begins with a comma)."""
        bar.n, bar.unit = done, text
        bar.refresh()

    def remove(self, run: str) -> None:
        """Takes away a run that has ended."""
        self._printed.pop(run, None)
        if bar := self._bars.pop(run, None):
            bar.close()

    def say(self, line: str) -> None:
        """Prints a line above the bars."""
        if self.terminal:
            tqdm.write(line, file=self.stream)
        else:
            print(line, file=self.stream, flush=True)

    def close(self) -> None:
        for bar in self._bars.values():
            bar.leave = True
            bar.close()
        self._bars.clear()


class SweepProgress:
    """The parent's side: bars of the runs in flight, and one line for all of them.

    costs: {run: cost}, in any unit, of the runs to be done; they weigh the runs in the time left. planned:
    how many runs there are with those that were complete before (0: these are all).
    """

    def __init__(self, costs: Mapping[str, float], stream: TextIO | None = None, planned: int = 0) -> None:
        self._complete = max(planned - len(costs), 0)
        self._costs, self._started = dict(costs), time.monotonic()
        self._fractions = dict.fromkeys(costs, 0.0)
        self._ended: dict[str, bool] = {}
        self._display = Display(stream, max(map(len, ["sweep", *costs])))
        self._line = self._display.bar("sweep", 1.0) if self._display.terminal else None
        self._printed = -math.inf
        self._draw()

    def show(self, status: Status) -> None:
        """What a run has sent."""
        if status.run not in self._ended:
            self._fractions[status.run] = status.step / max(status.total_steps, 1)
            self._display.show(status)
            self._draw()

    def end(self, run: str, note: str, good: bool = True) -> None:
        """A run has ended, well or not; `note` is printed after its name."""
        self._ended[run], self._fractions[run] = good, 1.0
        self._display.remove(run)
        self._display.say(f"{run}: {note}")
        self._draw(now=True)

    def say(self, line: str) -> None:
        """Prints a line above the bars."""
        self._display.say(line)

    def close(self) -> None:
        """Leaves the sweep's line as the last one (it is already where the last run's end was printed)."""
        if self._line is not None or len(self._ended) < len(self._costs):
            self._draw(now=True)
        self._display.close()
        if self._line is not None:
            self._line.leave = True
            self._line.close()

    def __str__(self) -> str:
        failed = sum(not good for good in self._ended.values())
        elapsed, fraction = time.monotonic() - self._started, self.fraction
        known = self._ended or fraction >= KNOWN
        left = elapsed * (1 - fraction) / fraction if known and fraction else None
        return (
            f"{self._complete + len(self._ended) - failed}/{self._complete + len(self._costs)} runs done"
            + (f", {failed} failed" if failed else "")
            + f", {clock(elapsed)} elapsed, {clock(left)} left"
        )

    @property
    def fraction(self) -> float:
        """The part of the cost that is done."""
        done = sum(cost * self._fractions[run] for run, cost in self._costs.items())
        return done / (sum(self._costs.values()) or 1.0)

    def _draw(self, now: bool = False) -> None:
        if self._line is not None:
            self._display.draw(self._line, self.fraction, str(self))
        elif now or time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            self._display.say(f"sweep: {self}")


def clock(seconds: float | None) -> str:
    """90 -> 1:30; ? where it isn't known."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
