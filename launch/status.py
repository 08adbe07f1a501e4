"""How a sweep stands, wherever its workers are: from its folder alone.

    python -m launch.status --folder=runs/isoflop-cpu --watch=5

done, running, waiting and failed runs, these with the reason, and the time and money left at the speed of the
runs done so far. Money is known where the launcher was told --dollars_per_hour.
"""

import collections
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch import jobs, sweep
from llm_jax import claims, command_line, files, manifest
from llm_jax.config import UserError
from llm_jax.progress import clock

MOST_ROWS = 20  # of each kind on the screen


@dataclasses.dataclass(frozen=True)
class Row:
    """One run of a plan. state: done (or how else it ended), running, waiting or failed.

    price: the FLOPs that it trains itself; of these `part` is done, in `seconds` of one worker.
    """

    label: str
    state: str
    detail: str
    price: float
    part: float
    seconds: float

    @property
    def complete(self) -> bool:
        return self.state not in ("running", "waiting", "failed")


def rows(folder: Path) -> list[Row]:
    """A row for each run of the plan in `folder`; raises UserError where none is, OSError out of reach."""
    try:
        runs = json.loads((folder / "plan.json").read_text())["runs"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        raise UserError(f"{folder}: no plan here; name the folder of a sweep by --folder") from None
    labels = {run["identity"]: run["label"] for run in runs}
    return files.each(lambda run: _row(folder / run["identity"], run, labels), runs, folder)


def _row(folder: Path, run: dict, labels: dict[str, str]) -> Row:
    def row(state: str, detail: str, part: float, seconds: float = 0.0) -> Row:
        return Row(run["label"], state, detail, run["price"], part, seconds)

    try:
        state, result = sweep.status_and_result(folder, run.get("stops", True))
    except UserError as error:  # something in its folder is damaged
        return row("failed", str(error), 0.0)
    if result:
        loss = result.get("loss")
        detail = f"loss {loss:.4f}" if isinstance(loss, float) else ""
        return row(state, detail, 1.0, result["wall_seconds"] / result.get("members", 1))
    if state == "failed":
        return row("failed", sweep.failure(folder).get("reason", ""), 0.0)
    own = run["steps"] - run["from_step"]
    if state == "running":
        owner = claims.owner(folder)
        step = owner.get("step", 0)
        where = f"step {step:,} of {run['steps']:,}, process {owner.get('pid')} of {owner.get('host')}"
        if (silence := time.time() - owner.get("time", time.time())) > claims.LEASE:
            where += f", no sign for {sweep.minutes(silence)}"  # it is dead, or a clock is wrong
        begun = max(owner.get("from") or 0, run["from_step"])
        seconds = owner.get("time", 0.0) - owner.get("begun", 0.0)
        return row("running", where, max(step - begun, 0) / own, seconds)
    step = max(manifest.steps(folder / "checkpoints"), default=0)
    waits = (
        f"from step {step:,}" if step else f"for {labels[run['trunk']]}" if run.get("trunk") in labels else ""
    )
    return row("waiting", waits, max(step - run["from_step"], 0) / own)


def seconds_left(found: Sequence[Row]) -> float | None:
    """Of one worker, at the speed of what is done; None where nothing is yet."""
    worked = sum(row.price * row.part for row in found if row.seconds)
    if not worked:
        return None
    left = sum(row.price * (1 - row.part) for row in found if row.state in ("running", "waiting"))
    return left * sum(row.seconds for row in found) / worked


def line(found: Sequence[Row], dollars_per_hour: float = 0.0) -> str:
    """3/12 runs done, 2 running, 7 waiting, 0:40 left, $1.20 left."""
    states = collections.Counter("done" if row.complete else row.state for row in found)
    counts = [f"{states[state]} {state}" for state in ("running", "waiting", "failed") if states[state]]
    parts = [f"{states['done']}/{len(found)} runs done", *counts]
    left = seconds_left(found)
    if states["running"] + states["waiting"]:
        parts.append(f"{clock(left and left / max(1, states['running']))} left")
        if dollars_per_hour and left is not None:
            parts.append(f"${left / 3600 * dollars_per_hour:.2f} left")
    return ", ".join(parts)


def table(found: Sequence[Row], dollars_per_hour: float = 0.0) -> str:
    """What a user sees: the runs that failed, are running and wait, some of each, and `line`."""
    width = max((len(row.label) for row in found), default=0)
    lines = []
    for state in ("failed", "running", "waiting"):
        chosen = [row for row in found if row.state == state]
        lines += [f"{state:<8} {row.label:<{width}}  {row.detail}".rstrip() for row in chosen[:MOST_ROWS]]
        lines += [f"{state:<8} and {len(chosen) - MOST_ROWS} more"] if len(chosen) > MOST_ROWS else []
    return "\n".join([*lines, line(found, dollars_per_hour)])


def named() -> Path:
    """The folder of --folder; raises UserError where that isn't given."""
    if flags.FLAGS.folder is None:
        raise UserError("of which sweep? --folder=runs/NAME names its folder")
    return files.path(flags.FLAGS.folder)


def main() -> None:
    folder = named()
    while True:
        found = rows(folder)
        if flags.FLAGS.watch and sys.stdout.isatty():
            print("\x1b[H\x1b[2J", end="")
        print(table(found, jobs.dollars_per_hour(folder)), flush=True)
        if not flags.FLAGS.watch or all(row.complete or row.state == "failed" for row in found):
            return
        time.sleep(flags.FLAGS.watch)


if __name__ == "__main__":
    flags.DEFINE_string("folder", None, "the folder of a sweep")
    again = "draw it again every so many seconds, until nothing runs or waits"
    flags.DEFINE_float("watch", None, again, lower_bound=0)
    command_line.run_main(main)
