"""Runs an experiment on this machine, in worker processes.

    python -m launch.local --config=experiments/isoflop.py:smoke --workers=2
    python -m launch.local --config=experiments/isoflop.py --config.optimizer.learning_rate=3e-3 --dry_run

The same command again continues: what is complete is skipped. Exit code 0: all runs are complete; 1: some
failed, as the last lines say; 2: something the user has to put right, said in one line.
"""

import shlex
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

from launch import order, sweep
from launch.pool import Pool, shares
from launch.sweep import Plan
from llm_jax import config, records
from llm_jax.config import UserError

USUAL_EFFICIENCY = 0.25  # what whole steps of small models reach of the speed of bare matrix products


def main() -> int:
    experiment = config.chosen()
    order.check(experiment)
    folder = Path(flags.FLAGS.folder or sweep.folder_of(experiment))
    if hasattr(experiment.module, "measure"):
        print(f"{experiment.module.__file__}:{experiment.scale} measures; its result goes to {folder}")
        return 0 if flags.FLAGS.dry_run else order.measure(experiment, folder)
    # This process plans and draws; devices are for the workers (a GPU's memory would be taken twice).
    jax.config.update("jax_platforms", "cpu")
    plan = sweep.make_plan(experiment, folder)
    print(f"{folder}: the plan of {experiment.module.__file__}:{experiment.scale}")
    print(sweep.summary(plan, *expected_speed(plan)))
    for note in getattr(experiment.module, "plan_notes", lambda base: [])(experiment.config):
        print(note)
    sys.stdout.flush()
    if flags.FLAGS.dry_run:
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    experiment_file = Path(experiment.module.__file__)
    try:
        return order.carry_out(
            plan, lambda runs: Pool(runs, experiment_file, shares(flags.FLAGS.workers, len(runs))).run()
        )
    except KeyboardInterrupt:
        print(f"\nstopped; to continue: {shlex.join([sys.executable, '-m', 'launch.local', *sys.argv[1:]])}")
        return 130


def expected_speed(plan: Plan) -> tuple[float, str]:
    """FLOP/s of the whole sweep, and what that expectation rests on."""
    done = [run for run in plan.runs if run.status == "done"]
    if done:
        seconds = sum(records.load_run(run.folder)["result"]["wall_seconds"] for run in done)
        workers = len(shares(flags.FLAGS.workers, len(plan.runs)))
        return workers * sum(run.flops for run in done) / seconds, f"as the {len(done)} complete runs did"
    return USUAL_EFFICIENCY * matmul_speed(), "a quarter of this machine's matrix products"


def matmul_speed(size: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s of a float32 matrix product on all cores: the best of several."""
    matrix, best, end = np.ones((size, size), np.float32), float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


if __name__ == "__main__":
    flags.DEFINE_integer("workers", None, "processes that train at once", lower_bound=1)
    flags.DEFINE_bool("dry_run", False, "print the plan and its price, and do nothing")
    flags.DEFINE_string("folder", None, "where the runs go; runs/<experiment>-<scale> if not given")
    config.run_main(main)
