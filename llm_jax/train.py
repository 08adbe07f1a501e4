"""Training a run.

python -m llm_jax.train --config=experiments/isoflop.py --config.model.layers=4

One run may have many processes, one on each host of a TPU slice or of a cluster: see distributed.py. On one
machine `python -m launch.together --processes=2 -- -m llm_jax.train --config=…` starts them.
"""

import contextlib
import os
import signal
import sys
import threading
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from llm_jax import claims, command_line, config, distributed, manifest, profiling
from llm_jax.config import UserError
from llm_jax.loop import train_together
from llm_jax.member import Hook, Member
from llm_jax.placement import mesh_of
from llm_jax.process import prepare_xla
from llm_jax.program import shape_of
from llm_jax.progress import Progress
from llm_jax.records import chosen_folder, how_it_ended, load_run
from llm_jax.run import Run


def train(run: Run, folder: str | Path, hooks: Sequence[Hook] = (), progress: Any = None) -> dict[str, Any]:
    """Trains `run` in `folder`, from its last checkpoint or its trunk's; returns what result.json holds.

    progress: an object with begin(steps done, lines about the data and, on many devices, where the run lies)
    and update(steps done, loss, tokens per second).
    Raises UserError before anything is written if the run can't be done. On SIGTERM the state is saved and
    SystemExit(143) raised, also if the run has come to its end in the meantime. A loss that isn't finite, or
    grows past what member.py says, ends the run as 'diverged'.
    """
    config.check(run)
    prepare_xla(run.execution.deterministic)
    mesh = mesh_of(run, width=1)
    source = run.data.open()
    member, shape = Member(run, source, folder, hooks, progress), shape_of(run, source)
    if member.result is None:
        train_together([member], shape, mesh)
    return member.result


# ---- the command ----


def hooks_of(experiment: types.ModuleType, run: Run) -> Sequence[Hook]:
    """What is measured at every evaluation of `run` by the experiment's file."""
    return experiment.hooks(run) if hasattr(experiment, "hooks") else ()


# What is printed of a result.
SHOWN = "status", "loss", "loss_standard_error", "bits_per_byte", "train_loss", "tokens_per_second", "records"


@distributed.together()
def main() -> None:
    picked = command_line.chosen()
    run = picked.config
    if not isinstance(run, Run):
        raise UserError(f"{picked.module.__file__} measures, it trains no single run: use launch.local")
    if flags.FLAGS.deterministic:
        run = config.replace(run, "execution.deterministic", True)
    if flags.FLAGS.profile_steps:
        run = config.replace(run, "execution.profile_steps", flags.FLAGS.profile_steps)
        if profiling.span(flags.FLAGS.profile_steps)[0] >= run.steps:
            raise UserError(f"--profile_steps={flags.FLAGS.profile_steps}: the run has {run.steps:,} steps")
    # Not among the runs of a sweep, runs/<experiment>-<scale>: it belongs to none.
    place = Path("runs") / Path(picked.module.__file__).stem
    folder = chosen_folder(flags.FLAGS.folder, place / run.identity())
    headline = f"{folder}: {run.steps:,} steps of {run.data.tokens_per_step:,} tokens"
    was_complete = (folder / "result.json").exists()
    interrupted = threading.Event()

    def interrupt(*_: Any) -> None:
        interrupted.set()
        os.kill(os.getpid(), signal.SIGTERM)

    if distributed.number() is not None:  # one that hangs keeps all, and nobody sees which it is
        claims.leave_when_still(claims.PATIENCE, distributed.ask_where)
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # until train() catches it
    try:
        with contextlib.ExitStack() as shown:
            progress = None
            if distributed.leads():
                progress = Progress(run.steps, run.name or run.identity(), headline=headline)
                shown.callback(progress.close)
            result = train(run, folder, hooks_of(picked.module, run), progress)
    except SystemExit:
        if not was_complete and (folder / "result.json").exists():  # asked to while it was scored
            return show(load_run(folder)["result"], folder)
        saved = manifest.steps(folder / "checkpoints")
        what = f"saved in {folder}" if saved else "nothing was saved yet"
        if distributed.leads():
            print(f"stopped, and {what}; the same command continues")
        raise SystemExit(130 if interrupted.is_set() else 143) from None
    if was_complete and distributed.leads():
        print(f"{folder} is complete; nothing was trained")
    show(result, folder)


def show(result: Mapping[str, Any], folder: Path) -> None:
    """Prints what most ask for of a result, in process 0."""
    if not distributed.leads():
        return
    shown = result | {"status": how_it_ended(result), "records": folder}
    if shown.get("held_out_documents") == 1:
        shown["loss_standard_error"] = "unknown: one document is held out"
    for key in SHOWN:
        if shown.get(key) is not None:
            print(f"{key:>22}  {shown[key]}")


if __name__ == "__main__":
    command_line.define_config()
    distributed.define_flags()
    flags.DEFINE_string("folder", None, "the run's folder; runs/<experiment>/<identity> if not given")
    flags.DEFINE_string("profile_steps", "", "10:15, say: traces these steps and says where their time goes")
    flags.DEFINE_bool("deterministic", False, "repeat bit for bit on a GPU too, at some cost in speed")
    command_line.run_main(
        main, dict.fromkeys(("workers", "dry_run", "pack"), "python -m launch.local, which runs a sweep")
    )
