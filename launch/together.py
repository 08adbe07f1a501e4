"""One command as several processes of this machine, which train one run together.

python -m launch.together --processes=2 -- -m llm_jax.train --config=experiments/isoflop.py:smoke

What stands behind `--` is given to Python. Each process learns of the others by its environment
(llm_jax/distributed.py). If one dies, the others are ended and a line says which it was; what was saved
stands, and the same command continues. SIGTERM and Ctrl-C are handed on, so that all save their state.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from absl import flags

from llm_jax import command_line, distributed
from llm_jax.config import UserError
from llm_jax.values import AGAIN

SECONDS_TO_SPEAK = 30.0  # after one has died the others notice, and say so
SECONDS_TO_SAVE = 120.0


def together(command: Sequence[str], processes: int) -> int:
    """Runs `python *command` as many processes at once; returns the first exit code that isn't 0."""
    address = distributed.address()
    started = [_start(command, distributed.Place(address, processes, i)) for i in range(processes)]
    asked = threading.Event()
    before = {n: signal.signal(n, lambda *_: asked.set()) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        return _watch(started, asked)
    finally:
        for process in started:
            process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(command: Sequence[str], place: distributed.Place) -> subprocess.Popen:
    """One of them, in a session of its own: Ctrl-C reaches this process only."""
    return subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | distributed.variables(place) | {distributed.LAUNCHER: str(os.getpid())},
        start_new_session=True,
    )


def _watch(started: Sequence[subprocess.Popen], asked: threading.Event) -> int:
    codes: list[int | None] = [None] * len(started)
    first, deadline = None, float("inf")
    while None in codes:
        if asked.is_set() and deadline == float("inf"):
            deadline = _end(started, SECONDS_TO_SAVE)
        codes = [process.poll() for process in started]
        if first is None and (failed := [i for i, code in enumerate(codes) if code]):
            first = min(failed, key=lambda i: codes[i] == AGAIN)  # those only lost another
            if not asked.is_set():
                deadline = time.monotonic() + SECONDS_TO_SPEAK
        if time.monotonic() > deadline:
            for process in started:
                process.kill()
        time.sleep(0.05)
    if first is None:
        return 0
    code = codes[first]
    if code not in (2, 128 + signal.SIGTERM, 128 + signal.SIGINT):
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        print(
            f"process {first} of {len(started)} {how}, and the others with it: what was saved stands, and "
            "the same command continues",
            file=sys.stderr,
        )
    return AGAIN if code < 0 else code


def _end(started: Sequence[subprocess.Popen], seconds: float) -> float:
    """Asks all to save and end; until when they have time."""
    for process in started:
        process.terminate()
    return time.monotonic() + seconds


def main(command: Sequence[str]) -> Callable[[], int]:
    def run() -> int:
        if flags.FLAGS.processes < 1:
            raise UserError(f"--processes={flags.FLAGS.processes}: at least 1")
        if not command:
            wanted = "python -m launch.together --processes=2 -- -m llm_jax.train --config=FILE.py"
            raise UserError(f"no command: {wanted}")
        return together(command, flags.FLAGS.processes)

    return run


if __name__ == "__main__":
    flags.DEFINE_integer("processes", 2, "how many processes run the command")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    sys.argv, behind = sys.argv[:cut], sys.argv[cut + 1 :]
    command_line.run_main(main(behind))
