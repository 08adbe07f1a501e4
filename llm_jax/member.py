"""A run while it trains, as the host sees it: its folder, how far it is, what is due, how it ended."""

import collections
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax import facts, files, optimizers, placement, profiling, records, trunks
from llm_jax.checkpoints import Checkpoints
from llm_jax.config import UserError, nearest
from llm_jax.data import Source
from llm_jax.distributed import agreed, leads
from llm_jax.evaluation.during import Asking
from llm_jax.models import Params
from llm_jax.program import Program
from llm_jax.records import Record, load_run, metrics
from llm_jax.run import Run, refuse_repeats
from llm_jax.step import State

# What counts as divergence: a training loss of so many times the first one, and that of guessing evenly, in
# the median of so many steps; a held-out loss of so many times that of guessing evenly.
DIVERGED, DIVERGED_STEPS, WORSE_THAN_GUESSING = 3.0, 5, 1.5

# Called with (steps done, parameters to evaluate) at every evaluation; what it returns is logged.
Hook = Callable[[int, Params], dict[str, float]]


class Member:
    """One run of those that train together, or the only one.

    Raises UserError if it can't be done, before anything is written. Steps are counted from the run's first;
    `first` is where this start goes on. status: "running", and then what its result says. result: what
    result.json holds, if it stands. recent_loss: the mean over a twentieth of its steps, the last that were
    logged.
    """

    def __init__(
        self, run: Run, source: Source, folder: str | Path, hooks: Sequence[Hook] = (), progress: Any = None
    ) -> None:
        self._started = time.perf_counter()
        refuse_repeats(run, source)
        self.run, self.source, self.folder = run, source, files.path(folder)
        self.hooks, self._progress = hooks, progress
        self.steps, self.first, self.done, self.status = run.steps, 0, 0, "running"
        self._why: dict[str, Any] = {}
        sizes = run.data.vocabulary, getattr(run.resolved_model, "vocabulary", None) or 0
        self._guessing = math.log(max(*sizes, 2))
        self.tables = optimizers.tables(run.optimizer, run.objective, self.steps)
        self._counts = facts.counts(run, source)
        self._trunk = trunks.find(run, source, self.folder)
        self._record = Record(self.folder, writes=leads(), wandb=run.execution.wandb)
        keeps = run.execution.checkpoint
        kept, whose = (keeps.keep_last, keeps.keep_steps), self._record.confirm
        self.checkpoints = Checkpoints(self.folder / "checkpoints", *kept, confirm=whose)
        self.result: dict[str, Any] | None = agreed(self._found)
        if self.result is None and run.execution.tasks.names:
            self.hooks = [*hooks, Asking(run, source)]
        self._best_is = self._which_is_best()

    def _which_is_best(self) -> str:
        """Whether `keep_best` is to be "highest" or "lowest"; raises UserError for what no evaluation has."""
        keeps = self.run.execution.checkpoint
        if not keeps.keep_best or self.result is not None:
            return ""
        held_out, known = self.source.held_out(), {}
        if held_out is not None:
            losses = ["loss", "bits_per_byte", *(f"loss/{name}" for name, _ in held_out.sources)]
            known = dict.fromkeys(losses, "lowest")
        for hook in self.hooks:
            known |= getattr(hook, "metrics", {})
        if keeps.keep_best not in known and all(hasattr(hook, "metrics") for hook in self.hooks):
            raise _no_metric(keeps.keep_best, known)
        best = keeps.best_is or known.get(keeps.keep_best, "")
        if not best:
            raise UserError(
                f"execution.checkpoint.keep_best={keeps.keep_best}: nothing says which value is best; add "
                "--config.execution.checkpoint.best_is=highest (or lowest)"
            )
        return best

    def _found(self) -> dict[str, Any] | None:
        """The result that stands; raises UserError if it is another run's."""
        if (self.folder / "result.json").exists():
            records.check_folder(self.folder, facts.described(self.run, self.source))
        return self._ended()

    def _ended(self) -> dict[str, Any] | None:
        """What result.json says; a run that was stopped early goes on where that is no longer asked for."""
        if not (self.folder / "result.json").exists():
            return None
        result = load_run(self.folder)["result"]
        return None if result["status"] == "stopped" and not self.run.execution.stopping.margin else result

    # ---- the start ----

    def hold(self) -> None:
        """Takes the folder of a run that has been begun; raises UserError where another process has it."""
        agreed(lambda: self._record.hold(self.checkpoints.latest() or 0))

    def restore(self, parts: Program, at_most: int | None = None) -> State | None:
        """The state of its last checkpoint (up to step `at_most`), its trunk's, or what its model begins as.

        None: all is drawn.
        """
        restored = self.checkpoints.restore(parts.one, at_most=at_most)
        restored = restored or (self._trunk and self._trunk.restore(parts.one, self.run))
        if restored is None:
            read = self.run.model.beginning(self.run.data, getattr(self.source, "codec", None))
            restored = read and (0, parts.begin(self.run.seed, read))
        self.first, state, *self._origin = restored or (0, None)
        return state

    def begin(self, parts: Program) -> None:
        """Takes the folder; raises UserError if that can't be."""
        self.result = agreed(lambda: self._take(parts))
        if self.result is not None:  # by another launcher, in the meantime
            self.status = self.result["status"]
            return
        if self._progress is not None:
            placed = placement.lines(parts, True) if parts.mesh.size > 1 else ()
            self._progress.begin(self.first, (*self.source.notes, *placed))
        self._branched = records.trunk(self.folder)
        shared = self._branched["from_step"] if self._branched else 0
        earlier = metrics(self.folder)
        losses = earlier["loss"].dropna().tolist() if len(earlier) else []
        self._first_loss = losses[0] if losses else None
        self._latest = collections.deque(losses, maxlen=DIVERGED_STEPS)
        twentieth = self.steps // (20 * self.run.execution.log_every_steps)
        self._recent = collections.deque(losses, maxlen=max(1, twentieth))
        self._find_best(earlier)
        self._seconds_shared, self._seconds_before = (
            float(rows["seconds"].max()) if len(rows) else 0.0
            for rows in (earlier[earlier["step"] <= shared], earlier)
        )

    def _take(self, parts: Program) -> dict[str, Any] | None:
        """What process 0 does of it; what is written from then on waits for a step that all make."""
        try:
            self._record.start(facts.described(self.run, self.source), facts.execution_facts(self.run, parts))
        except OSError as error:
            if (self.folder / "config.json").exists():  # it has been one
                raise
            raise UserError(
                f"{self.folder} can't be a run's folder: {error.strerror}; name another by --folder"
            ) from None
        if hasattr(self.run.data, "tokenizer"):
            self.run.data.tokenizer.keep(self.run.data, self.source, self.folder)
        result = self._ended()
        if result is None:
            self._say_if_roundings_differ(parts.mesh)
            self._record.resume_at(self.first, *self._origin)
        return result

    def _say_if_roundings_differ(self, mesh: jax.sharding.Mesh) -> None:
        """A line on stderr where the state was computed on another number of cores than are here."""
        place = files.path(self._origin[0]["folder"]) if self._origin else self.folder
        starts = records.starts(place) if self.first else []
        before, now = starts[-1]["facts"].get("cores") if starts else None, facts.cores()
        if before not in (None, now) and mesh.devices.flat[0].platform == "cpu":
            line = f"its state is of {before} cores, and here are {now}: sums are rounded in another order"
            print(f"{self.folder}: {line}, so it won't be repeated bit for bit", file=sys.stderr, flush=True)

    def seconds(self) -> float:
        """Wall-clock time of this start and those before it, the trunk's too, as far as steps count."""
        return self._seconds_before + time.perf_counter() - self._started

    # ---- its part of a step; `clock` counts the steps since this start began ----

    def rows(self, clock: np.ndarray, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Rows `numbers` of the batches of some steps, [steps, rows, ...]; past the end the last one's."""
        steps = np.minimum(self.first + clock, self.steps - 1)
        indices = steps[:, None] * self.run.data.batch_size + numbers
        found = self.source.rows(self.run.order, indices.ravel())
        return {name: x.reshape(*indices.shape, *x.shape[1:]) for name, x in found.items()}

    def hyper(self, clock: np.ndarray, count: int) -> dict[str, np.ndarray]:
        """Rows of the tables; in the first `count` it is active, unless it has ended."""
        steps = np.minimum(self.first + clock, self.steps - 1)
        active = (np.arange(len(clock)) < count) & (self.status == "running")
        return {name: table[steps] for name, table in self.tables.items()} | {"active": np.float32(active)}

    # ---- what is due ----

    def until_due(self, step: int) -> int:
        """How many steps after `step` something is due, the end at last."""
        keeps, execution = self.run.execution.checkpoint, self.run.execution
        intervals = (execution.evaluate_every_steps, keeps.every_steps)
        profiled = profiling.span(execution.profile_steps)
        stops = [kept for kept in (*keeps.keep_steps, *profiled) if kept > step]
        return min([(step // n + 1) * n for n in intervals if n] + stops + [self.steps]) - step

    def evaluates(self, step: int) -> bool:
        return self.first < step < self.steps and _every(self.run.execution.evaluate_every_steps, step)

    def saves(self, step: int) -> bool:
        keeps = self.run.execution.checkpoint
        if step == self.steps and (keeps.at_end or keeps.keep_best):
            return True
        return self.first < step and (step in keeps.keep_steps or _every(keeps.every_steps, step))

    # ---- what is known ----

    def settle(self, step: int, row: Mapping[str, float], tokens_per_second: float) -> None:
        """Takes the metrics of its step number `step`, which may say that it has diverged."""
        loss, self.done = row["loss"], step
        self._record.move(step)
        logged = step in (1, self.steps) or _every(self.run.execution.log_every_steps, step)
        if logged:  # what a continued run finds, and so what it is judged by
            self._recent.append(loss)
            self._latest.append(loss)
        self._first_loss = loss if self._first_loss is None else self._first_loss
        level = max(self._first_loss, self._guessing)
        if not math.isfinite(loss) or (self._latest and has_diverged(self._latest, level)):
            self.status = "diverged"
        if logged or self.status == "diverged":
            row = {**row, "tokens_per_second": tokens_per_second, "seconds": self.seconds()}
            self._record.log(step, row)
        if self._progress is not None:
            self._progress.update(step, loss, tokens_per_second)

    @property
    def recent_loss(self) -> float:
        return float(np.mean(self._recent))

    def stop(self, best: "Member") -> None:
        """Ends it early, as it is worse than `best` by more than the rule allows."""
        self.status = "stopped"
        better = {"identity": best.run.identity(), "recent_loss": best.recent_loss}
        rule = dataclasses.asdict(self.run.execution.stopping)
        self._why = {"stopped": {"recent_loss": self.recent_loss, "better": better, "rule": rule}}

    def log_scores(self, step: int, scores: Mapping[str, float]) -> bool:
        """Records an evaluation; whether it is the best so far, where that is asked for."""
        self._record.log(step, {f"held_out/{name}": value for name, value in scores.items()})
        return self._is_best(step, scores)

    def _is_best(self, step: int, scores: Mapping[str, float]) -> bool:
        """Whether an evaluation is the best so far; it is from now on, and so the state of `step` is kept."""
        keeps = self.run.execution.checkpoint
        if not keeps.keep_best:
            return False
        if keeps.keep_best not in scores:
            raise _no_metric(keeps.keep_best, scores)
        value = scores[keeps.keep_best]
        if not math.isfinite(value):
            return False
        if self._best is not None:
            before = self._best["value"]
            if value >= before if self._best_is == "lowest" else value <= before:
                return False
        self._best = {"metric": keeps.keep_best, "step": step, "value": value}
        self.checkpoints.best = step
        return True

    def _find_best(self, earlier: Any) -> None:
        """The best of the evaluations up to here whose state stands, by the records."""
        self._best: dict[str, Any] | None = None
        metric, stand = self.run.execution.checkpoint.keep_best, self.checkpoints.steps()
        if metric and f"held_out/{metric}" in earlier:
            for step, value in earlier[["step", f"held_out/{metric}"]].dropna().itertuples(index=False):
                if step in stand and step <= self.first:
                    self._is_best(int(step), {metric: float(value)})

    def finish(self, scores: Mapping[str, float], mesh: jax.sharding.Mesh, **measured: Any) -> None:
        """Writes the result: that of the last evaluation, unless the run has diverged."""
        broken = scores.get("loss", 0.0) > WORSE_THAN_GUESSING * self._guessing
        if self.status == "running":
            finite = math.isfinite(scores.get("loss", 0.0))
            self.status = "diverged" if broken or not finite else "done"
        if self.status == "done":
            self._is_best(self.steps, scores)
        self.checkpoints.close()
        self.result = agreed(lambda: self._write_result(scores, mesh, measured))
        self._record.close()

    def _write_result(
        self, scores: dict[str, float], mesh: jax.sharding.Mesh, measured: dict[str, Any]
    ) -> dict[str, Any]:
        self._record.confirm()
        logged = metrics(self.folder).set_index("step")
        last_steps = logged.index > self.steps - max(1, self.steps // 20)
        if (
            not measured["tokens_per_second"] and "tokens_per_second" in logged
        ):  # nothing was trained just now
            measured["tokens_per_second"] = float(logged["tokens_per_second"].iloc[-1])
        result = facts.outcome(
            self.run,
            self.source,
            mesh,
            self.status,
            **(scores if self.status == "done" else {}),
            **self._counts,
            **facts.spent(self.steps, int(logged.index[-1]), self._branched, self._counts),
            train_loss=float(logged["loss"][last_steps].mean()),
            **self._why,
            **({"best": self._best} if self._best else {}),
            wall_seconds=self.seconds() - self._seconds_shared,
            **measured,
        )
        self._record.finish(result)
        return result

    def close(self) -> None:
        """Gives the folder free, when what is being saved has been."""
        try:
            self.checkpoints.close()
        finally:
            self._record.close()


def _no_metric(name: str, known: Iterable[str]) -> UserError:
    where = "execution.checkpoint.keep_best"
    return UserError(f"{where}: no metric {name!r} in this run's evaluations; {nearest(name, known)}")


def has_diverged(latest: Sequence[float], level: float) -> bool:
    """Whether the latest losses are beyond repair, seen from the `level` at the start.

    Any that isn't a number is; of those too high it takes three, as one may be an odd batch's.
    """
    return not math.isfinite(latest[-1]) or statistics.median_low(latest) > DIVERGED * level


def stop_hopeless(members: Iterable[Member]) -> None:
    """Applies the rule of early stopping to members that have just made a step.

    Compared are those of one objective, one order of rows and one length that began together: their losses
    say the same of equal rows, and their schedules are equally far. The rule of Golovin et al. 2017 (Google
    Vizier, section 3.2.2) with the best instead of the median: most rates of a sweep are known to lose long
    before the end.
    """
    groups: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        key = member.run.objective, member.run.order, member.steps, member.first
        groups.setdefault(key, []).append(member)
    for group in groups.values():
        best = min(group, key=lambda member: member.recent_loss)
        for member in group:
            rule = member.run.execution.stopping
            late = member.done >= rule.after_fraction * member.steps
            if rule.margin and late and member.recent_loss > best.recent_loss + rule.margin:
                member.stop(best)


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0
