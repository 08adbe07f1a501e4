"""Training: the loop around the step.

python -m llm_jax.train --config=experiments/isoflop.py --config.model.layers=4
"""

import contextlib
import math
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax._src import xla_bridge  # no public way to ask whether devices are in use yet

from llm_jax import config, facts, manifest, optimizers, records, sharding, trunks
from llm_jax.checkpoints import Checkpoints
from llm_jax.config import UserError
from llm_jax.data import cache_folder
from llm_jax.held_out import score
from llm_jax.kernels.memory import keep_freed_memory
from llm_jax.models import Batch, Params
from llm_jax.program import program, shape_of
from llm_jax.progress import Progress
from llm_jax.records import Record, how_it_ended, load_run, metrics
from llm_jax.run import Run, refuse_repeats

# What counts as divergence: a training loss of so many times the first one, and a held-out loss of so many
# times that of guessing evenly.
DIVERGED, WORSE_THAN_GUESSING = 3.0, 1.5

# Called with (steps done, parameters to evaluate) at every evaluation; what it returns is logged.
Hook = Callable[[int, Params], dict[str, float]]


def train(run: Run, folder: str | Path, hooks: Sequence[Hook] = (), progress: Any = None) -> dict[str, Any]:
    """Trains `run` in `folder`, from its last checkpoint or its trunk's; returns what result.json holds.

    progress: an object with begin(steps done) and update(steps done, loss, tokens per second).
    Raises UserError before anything is written if the run can't be done. On SIGTERM the state is saved and
    SystemExit(143) raised. A loss that isn't finite, or grows past `DIVERGED`, ends the run as 'diverged'.
    """
    started = time.perf_counter()
    config.check(run)
    execution, steps = run.execution, run.steps
    prepare_xla(execution.deterministic)

    # ---- the parts, and what can't be done ----
    mesh = sharding.make_mesh(execution.mesh)
    sharding.check_batch(run.data.batch_size, execution.micro_batches, mesh)
    source = run.data.open()
    refuse_repeats(run, source)
    shape = shape_of(run, source)
    tables = optimizers.tables(run.optimizer, run.objective, steps)
    held_out = source.held_out()
    numbers = facts.counts(run, source)
    folder = Path(folder)
    trunk = trunks.find(run, folder)

    record = Record(folder, writes=jax.process_index() == 0)
    closing = contextlib.ExitStack()
    with record, jax.set_mesh(mesh), catching_sigterm() as terminated, closing:
        if (folder / "result.json").exists():
            record.start(facts.described(run, source), {})  # refuses the result of another run
            return load_run(folder)["result"]
        compiled = program.cache_info().misses
        parts = program(shape, mesh)
        compile_seconds = parts.compile_seconds if program.cache_info().misses > compiled else 0.0
        if held_out is not None and not parts.predicts_tokens:
            raise UserError(
                "held-out documents are scored by their tokens, and this model predicts none (it has no "
                "unembed): set --config.data.held_out_fraction=0"
            )
        try:
            record.start(facts.described(run, source), facts.execution_facts(run, parts, mesh))
        except OSError as error:
            raise UserError(
                f"{folder} can't be a run's folder: {error.strerror}; name another by --folder"
            ) from None
        if (folder / "result.json").exists():  # another process ended it while this one compiled
            return load_run(folder)["result"]

        # ---- the state, new or restored ----
        kept = execution.checkpoint
        checkpoints = Checkpoints(folder / "checkpoints", kept.keep_last, kept.keep_steps)
        closing.callback(checkpoints.close)
        restored = checkpoints.restore(parts.state) or (trunk and trunk.restore(parts.state, run))
        first, state, *origin = restored or (0, parts.init(jax.random.PRNGKey(run.seed)))
        record.resume_at(first, *origin)
        if progress is not None:
            progress.begin(first)
        branched = records.trunk(folder)
        shared = branched["from_step"] if branched else 0
        earlier = metrics(folder)
        first_loss = float(earlier["loss"].dropna().iloc[0]) if len(earlier) else None
        seconds_shared, seconds_before = (
            float(rows["seconds"].max()) if len(rows) else 0.0
            for rows in (earlier[earlier["step"] <= shared], earlier)
        )

        def seconds() -> float:
            """Wall-clock time of this start and those before it, the trunk's too, as far as steps count."""
            return seconds_before + time.perf_counter() - started

        def load(step: int) -> Batch:
            start = step * run.data.batch_size
            return sharding.load_rows(lambda rows: source.rows(run.seed, start + rows), source.spec, mesh)

        def hyper(step: int) -> dict[str, np.ndarray]:
            return {name: table[step] for name, table in tables.items()}

        def evaluate(step: int) -> dict[str, float]:
            params = optimizers.evaluation_params(run.optimizer, state.optimizer, state.trained)
            params = state.frozen | params
            row = {} if held_out is None else score(parts.scorer, params, held_out, run.data.batch_size, mesh)
            for hook in hooks:
                row |= hook(step, params)
            return row

        # ---- steps, one in flight: a step's metrics are fetched after the next one is dispatched ----
        stopwatch = facts.Stopwatch(run.data.tokens_per_step)
        saved_at = time.perf_counter()
        in_flight: tuple[int, dict[str, jax.Array]] | None = None
        status = "done"

        def settle() -> None:
            nonlocal in_flight, status, first_loss
            if in_flight is None:
                return
            step, row = in_flight
            in_flight = None
            row = {name: float(value) for name, value in jax.device_get(row).items()}
            rate = stopwatch.lap()
            first_loss = row["loss"] if first_loss is None else first_loss
            if not math.isfinite(row["loss"]) or row["loss"] > DIVERGED * first_loss > 0:
                status = "diverged"
            last = step + 1 == steps or status == "diverged"
            if step == 0 or last or _every(execution.log_every_steps, step + 1):
                record.log(step + 1, row | {"tokens_per_second": rate, "seconds": seconds()})
            if progress is not None:
                progress.update(step + 1, row["loss"], rate)

        for step in range(first, steps):
            state, row = parts.step(state, load(step), hyper(step))
            settle()
            in_flight = step, row
            done = step + 1
            evaluating = done < steps and _every(execution.evaluate_every_steps, done)
            saving = done in execution.checkpoint.keep_steps or _every(execution.checkpoint.every_steps, done)
            saving |= 0 < execution.checkpoint.every_seconds < time.perf_counter() - saved_at
            stopping = terminated.is_set()
            if evaluating or saving or stopping:
                settle()
            if status == "diverged":
                break
            if evaluating:
                record.log(done, {f"held_out/{name}": value for name, value in evaluate(done).items()})
            if saving or stopping:
                checkpoints.save(done, state, wait=stopping)
                saved_at = time.perf_counter()
            if stopping:
                raise SystemExit(143)
            if evaluating or saving:
                stopwatch.restart()
        settle()

        # ---- the end ----
        if status == "done" and execution.checkpoint.at_end and checkpoints.latest() != steps:
            checkpoints.save(steps, state, wait=True)
        checkpoints.close()
        scores = evaluate(steps) if status == "done" else {}
        guessing = math.log(max(run.data.vocabulary, 2))
        broken = scores.get("loss", 0.0) > WORSE_THAN_GUESSING * guessing
        if broken or not math.isfinite(scores.get("loss", 0.0)):
            status, scores = "diverged", {}
        logged = metrics(folder).set_index("step")
        result = facts.outcome(
            run,
            source,
            mesh,
            status,
            **scores,
            **numbers,
            **facts.spent(steps, int(logged.index[-1]), branched, numbers),
            train_loss=float(logged["loss"][logged.index > steps - max(1, steps // 20)].mean()),
            wall_seconds=seconds() - seconds_shared,
            compile_seconds=compile_seconds,
            tokens_per_second=stopwatch.tokens_per_second or float(logged["tokens_per_second"].iloc[-1]),
        )
        record.finish(result)
    return result


def prepare_xla(deterministic: bool) -> None:
    """The compilation cache, shared by all runs, and XLA's deterministic operations on GPUs if asked for.

    The autotuner picks kernels by timing them, so its choices are kept too, or a restart may pick others.
    """
    keep_freed_memory()
    place = Path(jax.config.jax_compilation_cache_dir or cache_folder() / "xla")
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    wanted = f"--xla_gpu_deterministic_ops=true --xla_gpu_per_fusion_autotune_cache_dir={place / 'autotune'}"
    if deterministic and wanted not in os.environ.get("XLA_FLAGS", ""):
        if xla_bridge.backends_are_initialized() and jax.default_backend() == "gpu":
            raise UserError(f"--deterministic comes before the first computation: set XLA_FLAGS='{wanted}'")
        (place / "autotune").mkdir(parents=True, exist_ok=True)
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {wanted}".strip()


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


@contextlib.contextmanager
def catching_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; the process then ends with 143 when the block does.

    Outside the main thread, where Python allows no handler, nothing sets it.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
    if asked.is_set():
        raise SystemExit(143)


# ---- the command ----


def hooks_of(experiment: types.ModuleType, run: Run) -> Sequence[Hook]:
    """What an experiment's file measures at every evaluation of `run`."""
    return experiment.hooks(run) if hasattr(experiment, "hooks") else ()


# What is printed of a result.
SHOWN = "status", "loss", "loss_standard_error", "bits_per_byte", "train_loss", "tokens_per_second", "records"


def main() -> None:
    picked = config.chosen()
    run = picked.config
    if not isinstance(run, Run):
        raise UserError(f"{picked.module.__file__} measures, it trains no single run: use launch.local")
    if flags.FLAGS.deterministic:
        run = config.replace(run, "execution.deterministic", True)
    # Not among the runs of a sweep, runs/<experiment>-<scale>: it belongs to none.
    place = Path("runs") / Path(picked.module.__file__).stem
    folder = Path(flags.FLAGS.folder or place / run.identity())
    headline = f"{folder}: {run.steps:,} steps of {run.data.tokens_per_step:,} tokens"
    was_complete = (folder / "result.json").exists()
    interrupted = threading.Event()

    def interrupt(*_: Any) -> None:
        interrupted.set()
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # until train() catches it
    try:
        with contextlib.closing(
            Progress(run.steps, run.name or run.identity(), headline=headline)
        ) as progress:
            result = train(run, folder, hooks_of(picked.module, run), progress)
    except SystemExit:
        saved = manifest.steps(folder / "checkpoints")
        what = f"saved in {folder}" if saved else "nothing was saved yet"
        print(f"stopped, and {what}; the same command continues")
        raise SystemExit(130 if interrupted.is_set() else 143) from None
    if was_complete:
        print(f"{folder} is complete; nothing was trained")
    shown = result | {"status": how_it_ended(result), "records": folder}
    if shown.get("held_out_documents") == 1:
        shown["loss_standard_error"] = "unknown: one document is held out"
    for key in SHOWN:
        if shown.get(key) is not None:
            print(f"{key:>22}  {shown[key]}")


if __name__ == "__main__":
    flags.adopt_module_key_flags(config)
    flags.DEFINE_string("folder", None, "the run's folder; runs/<experiment>/<identity> if not given")
    flags.DEFINE_bool("deterministic", False, "repeat bit for bit on a GPU too, at some cost in speed")
    config.run_main(main, dict.fromkeys(("workers", "dry_run"), "python -m launch.local, which runs a sweep"))
