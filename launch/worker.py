"""A worker: one process that trains one pack of runs after another, so that imports are paid for once.

    python -m launch.worker --experiment=FILE.py --messages=FD

A task is a JSON line on standard input: {"runs": [{"label", "folder", "run", "stale"}, ...]}. When the input
ends (the launcher is done, or dead) or SIGTERM comes, runs in flight save their state and the process ends.
One whose run doesn't move for half an hour ends too, and its log says where it hung. Answers are JSON lines
on the file descriptor FD; a run is told by its number in the task:

    {"kind": "ready"}                       at the start, and when a task is done
    {"kind": "alive"}                       every ten seconds
    {"kind": "progress", "status": [...]}   progress.Status, a few times a second
    {"kind": "continues", "run", "step"}    from a checkpoint
    {"kind": "placed", "lines"}             on many devices: what is spread how, and the bytes of each
    {"kind": "packed", "members", "why"}    so many of the runs, the first ones, fit and are trained at once
    {"kind": "finished", "run", "status", "loss", "steps_shared"}
    {"kind": "refused", "message": ...}     a UserError; the process ends
    {"kind": "taken", "message": ...}       another process has the run; the process ends
    {"kind": "broken", "message": ...}      a disk's or a device's error, which may pass; the process ends
    {"kind": "failed", "message": ...}      any other error; the process ends

What is printed, and the traceback of an error, goes to log.txt in the folder of the first run.

Where the environment says so (distributed.py) it is one of many that train together, all told the same.
Number 0 speaks for all of them, and what the others print goes to log.1.txt ...
"""

import contextlib
import io
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from launch import sweep
from launch.sweep import LOG
from llm_jax import claims, command_line, config, distributed, experiment_file, files
from llm_jax.config import UserError
from llm_jax.pack import fitting, train_packed
from llm_jax.progress import Progress
from llm_jax.records import how_it_ended
from llm_jax.run import Run
from llm_jax.train import hooks_of, train

Say = Callable[..., None]


class Reporter(Progress):
    """A run's progress as messages."""

    def __init__(self, run: Run, number: int, label: str, say: Say) -> None:
        self._say, self._number = say, number
        super().__init__(run.steps, label, write=lambda status: say(kind="progress", status=status))

    def begin(self, step: int, placed: Sequence[str] = ()) -> None:
        super().begin(step)
        if placed:
            self._say(kind="placed", lines=placed)
        if step:
            self._say(kind="continues", run=self._number, step=step)


def attempt(task: dict[str, Any], say: Say, experiment: types.ModuleType) -> bool:
    """Trains the runs of a task and says how they ended; False if this process should take no other."""
    folders = [files.path(item["folder"]) for item in task["runs"]]
    try:
        for folder, item in zip(folders, task["runs"], strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            if item["stale"]:
                claims.bury(folder, *item["stale"])
        with logging_in(folders):
            runs = [config.from_json(Run, item["run"]) for item in task["runs"]]
            if len(runs) > 1:
                width, why = fitting(runs)
                say(kind="packed", members=width, why=why)
                runs = runs[:width]
            reporters = [
                Reporter(run, number, task["runs"][number]["label"], say) for number, run in enumerate(runs)
            ]
            hooks = [hooks_of(experiment, run) for run in runs]
            if len(runs) == 1:
                results = [train(runs[0], folders[0], hooks[0], reporters[0])]
            else:
                results = train_packed(runs, folders[: len(runs)], hooks, reporters)
    except UserError as error:
        say(kind="taken" if isinstance(error, claims.TakenError) else "refused", message=str(error))
        return False
    except Exception as error:
        kind = "broken" if isinstance(error, (OSError, jax.errors.JaxRuntimeError)) else "failed"
        say(kind=kind, message=" ".join(f"{type(error).__name__}: {error}".split())[:300])
        return False
    for number, result in enumerate(results):
        facts = {"loss": result.get("loss"), "steps_shared": result["steps_shared"]}
        say(kind="finished", run=number, status=how_it_ended(result), **facts)
    say(kind="ready")
    return True


@contextlib.contextmanager
def logging_in(folders: Sequence[Path]) -> Iterator[None]:
    """What is printed inside goes to the log of the first folder, and how it failed.

    A bucket gets it in the end; until then it is where this process printed before, kept by its launcher.
    """
    number = distributed.number()
    if files.in_bucket(folders[0]):
        _forget_printed()
    else:
        with (folders[0] / sweep.log_name(number)).open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
    for folder in folders[1:]:
        sweep.add_to_log(folder, f"packed with {folders[0]}, whose {LOG} goes on\n")
    try:
        yield
    except UserError as error:
        with contextlib.suppress(OSError):  # the log's disk is full, say
            print(f"error: {error}", flush=True)
        raise
    except Exception:
        with contextlib.suppress(OSError):
            traceback.print_exc()
        raise
    finally:
        if files.in_bucket(folders[0]):
            sys.stdout.flush()
            printed = os.pread(1, os.fstat(1).st_size, 0).decode(errors="replace")
            sweep.add_to_log(folders[0], printed, number)
            _forget_printed()


def _forget_printed() -> None:
    """Empties what this process prints to; what it prints next stands at the beginning, not behind a hole."""
    os.ftruncate(1, 0)
    os.lseek(1, 0, os.SEEK_SET)


def listen(tasks: queue.SimpleQueue) -> None:
    """Passes tasks on; the end of the input is treated like SIGTERM, which ends a run in flight too."""
    # Unbuffered: a buffered reader's lock, held by this thread, would break the interpreter's exit.
    with io.FileIO(0, closefd=False) as lines:
        for line in lines:
            tasks.put(json.loads(line))
    os.kill(os.getpid(), signal.SIGTERM)


def end(*_: Any) -> None:
    """What SIGTERM does between runs; during one, train() catches it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if distributed.number() is None:
        os._exit(143)  # without the second that Python's own way takes
    sys.exit(143)  # all of them do, and part in peace


def main() -> int:
    # Its kinds of models, data, sweeps ... are registered by this too.
    experiment, _ = experiment_file.load_experiment(flags.FLAGS.experiment)

    def say(**message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # the launcher has died: SIGTERM is on its way
            os.write(flags.FLAGS.messages, json.dumps(message).encode() + b"\n")

    def live() -> None:
        while True:
            time.sleep(claims.BEAT)
            say(kind="alive")

    tasks: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=live, daemon=True).start()
    threading.Thread(target=listen, args=(tasks,), daemon=True).start()
    claims.leave_when_still(flags.FLAGS.patience, distributed.ask_where)
    with distributed.together():  # until then SIGTERM just kills
        signal.signal(signal.SIGTERM, end)
        say(kind="ready")
        while attempt(tasks.get(), say, experiment):
            pass
        if distributed.number() is not None:
            distributed.leave(1, "it takes no other run")
    return 1


if __name__ == "__main__":
    flags.DEFINE_string("experiment", None, "the experiment's file", required=True)
    flags.DEFINE_integer("messages", None, "file descriptor of the pipe for messages", required=True)
    flags.DEFINE_float("patience", claims.PATIENCE, "seconds after which a run that doesn't move hangs")
    command_line.run_main(main)
