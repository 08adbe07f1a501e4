"""Runs an experiment on this machine, in worker processes.

    python -m launch.local --config=experiments/isoflop.py:smoke --workers=2
    python -m launch.local --config=experiments/isoflop.py --config.optimizer.learning_rate=3e-3 --dry_run

Several hosts of a cluster or slice that run this command at once, and are told of each other as processes of
one run are (llm_jax/distributed.py), are one place: they train a run at a time together (hosts.py).

The same command again continues: what is complete is skipped. Exit code 0: all runs are complete; 1: some
failed, or there is no forecast or report, for the reasons printed; 2: something the user has to put right,
said in one line; 75: a host of its place has gone; 130: stopped by Ctrl-C; 143: by SIGTERM.
"""

import os
import subprocess
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from launch import engine as engines
from launch import hosts, order, packs, sweep
from launch.pool import Pool
from launch.processes import Share, gpus, on_cpus, one_core_each, shares
from launch.sweep import Plan, Planned
from llm_jax import claims, command_line, distributed, files, placement, records
from llm_jax.command_line import Chosen
from llm_jax.config import UserError
from llm_jax.distributed import Place, tpus
from llm_jax.kernels import devices
from llm_jax.pack import pack as pack_of
from llm_jax.placement import mesh_of
from llm_jax.program import Program

# What steps of small models reach of the speed of bare matrix products, and what every run costs besides.
CPU_EFFICIENCY, GPU_EFFICIENCY, SECONDS_PER_RUN = 0.25, 0.1, 3.0


def main() -> int:
    experiment = command_line.chosen()
    os.environ[claims.PLACE] = flags.FLAGS.place
    order.check(experiment)
    folder = engines.folder_of(experiment)
    measures = hasattr(experiment.module, "measure")
    place = distributed.here()
    if place is None or place.processes == 1:
        does = measure if measures else launch
        return engines.stoppable("local", lambda: does(experiment, folder))
    if measures:
        raise UserError(f"{experiment.module.__file__} measures, on one host; here are {place.processes}")
    if (flags.FLAGS.workers or 1) > 1:
        raise UserError(
            f"--workers={flags.FLAGS.workers}: {place.processes} hosts train one run at a time together"
        )
    if flags.FLAGS.dry_run:
        return launch(experiment, folder, place) if place.process == 0 else 0
    if place.process:
        return hosts.follow(place, Path(experiment.module.__file__))
    with hosts.leading(place, (folder / engines.STOP).exists) as others:
        return others.end(engines.stoppable("local", lambda: launch(experiment, folder, place, others)))


def measure(experiment: Chosen, folder: Path) -> int:
    if flags.FLAGS.dry_run:
        print(f"{folder}: {experiment.module.__file__}:{experiment.scale} measures, it trains no sweep")
        return 0
    return order.measure(experiment, folder)


def launch(
    experiment: Chosen, folder: Path, place: Place | None = None, others: hosts.Followers | None = None
) -> int:
    """The order, or what a place does of it; others: the hosts that this one leads, where it has many."""
    # This process plans and draws; devices are for the workers (a GPU's memory would be taken twice).
    jax.config.update("jax_platforms", "cpu")
    plan = engines.plan_of(experiment, folder)
    width, off = packs.width_of(flags.FLAGS.pack), "--pack=off"

    def parts_of(planned: int) -> list[Share]:
        return [hosts.share(place)] if place else shares(flags.FLAGS.workers, planned)

    parts = parts_of(len(plan.sweep))
    ways = len(parts)
    if place:
        width, off = 1, f"the {place.processes} hosts of this place train each run together"
    elif width is None and one_core_each(parts):
        width, off = 1, "a core for each worker, which one run fills; --pack=8, say, packs all the same"
    planned = [
        pack
        for stage in (plan.sweep, plan.holdout)
        for pack in packs.packed(sweep.missing(stage), ways, width)
    ]
    if not place:  # whose other hosts' devices aren't seen from here
        refuse_meshes(planned)
    notes = getattr(experiment.module, "plan_notes", lambda base: [])(experiment.config)
    if idle := sweep.without_effect(plan):
        notes.append(f"without effect, since the sweep sets these fields in every run: {' '.join(idle)}")
    stop, joins, again = folder / engines.STOP, flags.FLAGS.join, flags.FLAGS.again
    if flags.FLAGS.dry_run:
        notes += placed(planned) if not place else []
    elif not joins and not again:
        plan.write()
        stop.unlink(missing_ok=True)
    print(f"{folder}: the plan of {experiment.module.__file__}:{experiment.scale}")
    notes += filter(None, (packs.summary(planned, ways, width, off), packs.unstopped(planned)))
    print(sweep.summary(plan), expected_time(plan, ways, place), *notes, sep="\n", flush=True)
    if flags.FLAGS.dry_run:
        return 0

    def engine(runs: Sequence[Planned], planned: int, before: Callable[[], None]) -> Mapping[Planned, str]:
        parts = parts_of(planned)
        packed = packs.packed(runs, len(parts), width)
        file = Path(experiment.module.__file__)
        return Pool(packed, file, parts, planned, joins, again, stop.exists, others).run(before)

    if not joins:
        return order.carry_out(plan, engine)
    try:
        return order.join(plan, engine)
    except KeyboardInterrupt:
        if stop.exists():
            return 0  # to a cluster a failure, which this is not, is a reason to start it again
        raise


def refuse_meshes(planned: Sequence[packs.Pack]) -> None:
    """Raises UserError for packs that the CPUs can't be made up for; GPUs and TPUs only their workers see."""
    if on_cpus():
        for pack in planned:
            mesh_of(pack.runs[0].run, len(pack.runs))


def placed(planned: Sequence[packs.Pack]) -> list[str]:
    """How what costs most lies on the devices; of GPUs and TPUs only the workers know."""
    if not on_cpus() or not planned:
        return []
    pack = max(planned, key=lambda pack: pack.price / len(pack.runs))
    own_rows = len({item.run.order for item in pack.runs}) > 1
    where, *rest = placement.lines(Program(*pack_of(pack.runs[0].run, len(pack.runs), own_rows)))
    return [f"{pack.label}: {where}", *rest]


# ---- how long it will take ----


def expected_time(plan: Plan, workers: int, place: Place | None = None) -> str:
    """A line that says how long the rest of the plan will take `workers`, and how that is known."""
    missing = set(sweep.missing(plan.runs))
    if not missing:
        return "all of it is complete"
    workers = min(len(missing), workers)
    flops = sum(run.price for run in missing)
    complete = [run for run in plan.runs if run not in missing and run.price]
    ended = files.each(records.load_run, [run.folder for run in complete], plan.folder)
    done = [(run, end["result"]) for run, end in zip(complete, ended, strict=True) if end["status"] == "done"]
    if done:
        seconds = sum(result["wall_seconds"] / result.get("members", 1) for _, result in done)
        expected = flops * seconds / sum(run.price for run, _ in done) / workers
        return f"about {sweep.minutes(expected)} at the speed of the {len(done)} done"
    speed, source = (None, f"the speed of {place.processes} hosts") if place else expected_speed()
    if speed is None:
        return f"how long it takes isn't known before the first run: {source} is in no table"
    expected = flops / speed + SECONDS_PER_RUN * len(missing) / workers
    return f"about {sweep.minutes(expected)} at {speed:.1e} FLOP/s ({source})"


def expected_speed() -> tuple[float | None, str]:
    """FLOP/s that all workers together may reach (None: unknown), and where that number is from."""
    if tpus(os.environ):
        return None, "this TPU"
    if not gpus():
        return CPU_EFFICIENCY * matmul_speed(), f"{CPU_EFFICIENCY:.0%} of bare matrix products here"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        kind = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None, "this GPU"
    peak = devices.peak_flops(types.SimpleNamespace(device_kind=kind), "bfloat16")
    if peak is None:
        return None, kind
    return GPU_EFFICIENCY * peak * len(gpus()), f"{GPU_EFFICIENCY:.0%} of the data sheet of {kind}"


def matmul_speed(size: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s of float32 matrix products on all cores: the best of several."""
    matrix, best, end = np.ones((size, size), np.float32), float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


if __name__ == "__main__":
    command_line.define_config()
    distributed.define_flags()
    flags.DEFINE_integer("workers", None, "processes that train at once", lower_bound=1)
    flags.DEFINE_bool("dry_run", False, "print the plan and its price, and do nothing")
    flags.DEFINE_string(
        "pack", "auto", "runs trained as one program: auto, off, or how many at most, such as --pack=8"
    )
    flags.DEFINE_string("folder", None, "where the runs go; runs/<experiment>-<scale> if not given")
    flags.DEFINE_bool("join", False, "take part in a launch: train what is free, end when nothing is")
    flags.DEFINE_string("place", "", "what the launch calls this part of it")
    flags.DEFINE_bool("again", False, "go on with a launch: what it has given up stays so")
    elsewhere = "python -m llm_jax.train; here it is --config.execution.deterministic=true"
    command_line.run_main(main, {"deterministic": elsewhere})
