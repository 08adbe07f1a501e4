"""The loop around the step: the same for a run alone and for a pack of them (pack.py).

A step is dispatched before the metrics of the one before it are fetched; evaluating, saving and ending wait
for the one in flight. With `execution.block_steps` above 1 all this holds for blocks of steps.
"""

import contextlib
import dataclasses
import time
from collections.abc import Sequence

import jax
import numpy as np

from llm_jax import facts, optimizers, profiling, sharding
from llm_jax.config import UserError
from llm_jax.distributed import Votes, agreed, meet
from llm_jax.held_out import score
from llm_jax.kernels.advice import explaining
from llm_jax.member import Member, stop_hopeless
from llm_jax.models import Batch
from llm_jax.process import catching_sigterm
from llm_jax.program import Shape, program

# The least steps of members that a program of its own has to save or to serve, so that it earns back the half
# minute that compiling may take.
LEAST_STEPS = 10_000


class InFlight:
    """The steps that were dispatched last; their metrics are fetched when the next have been, or before.

    block: how many steps are dispatched as one.
    """

    def __init__(self, members: Sequence[Member], block: int) -> None:
        self._members, self._block = members, block
        self._waiting: tuple[int, int, dict[str, jax.Array]] | None = None
        self.stopwatch = facts.Stopwatch(members[0].run.data.tokens_per_step)

    def put(self, clock: int, count: int, metrics: dict[str, jax.Array]) -> None:
        """`count` steps from `clock` on have been dispatched; those before them are settled."""
        self.settle()
        self._waiting = clock, count, metrics

    def settle(self) -> None:
        """Waits for what is in flight, and hands each running member its rows."""
        if self._waiting is None:
            return
        (clock, count, metrics), self._waiting = self._waiting, None
        metrics = jax.device_get(metrics)
        rate, axes = self.stopwatch.lap(count), (self._block, len(self._members))
        metrics = {name: np.reshape(x, axes).tolist() for name, x in metrics.items()}
        for ahead in range(count):
            for number, member in enumerate(self._members):
                if member.status == "running":
                    row = {name: x[ahead][number] for name, x in metrics.items()}
                    member.settle(member.first + clock + ahead + 1, row, rate)
            if self._members[0].run.execution.stopping.margin:
                stop_hopeless(member for member in self._members if member.status == "running")


def narrower_pays(running: Sequence[Member], width: int) -> bool:
    """Whether at most half of a pack is still `running`, and the idle places would cost many steps."""
    left = max((member.steps - member.done for member in running), default=0)
    return len(running) <= width // 2 and (width - len(running)) * left >= LEAST_STEPS


def train_together(members: Sequence[Member], shape: Shape, mesh: jax.sharding.Mesh) -> None:
    """Trains all members from where they are; then each has its `result`.

    Or those that are left are saved, where a narrower pack pays for them. shape: of their pack, or of a run
    alone. Raises UserError before anything is written if it can't be done. On SIGTERM all states are saved
    and SystemExit(143) raised.
    """
    one, alone = members[0], shape.members is None
    with jax.set_mesh(mesh), catching_sigterm() as terminated, contextlib.ExitStack() as folders:
        for member in members:
            folders.callback(member.close)

        # ---- the state, new or restored; if all have a checkpoint of one step, from the last such ----
        parts, held_out = program(shape, mesh), one.source.held_out()
        if held_out is not None and parts.model.unembed is None:
            raise UserError(
                "held-out documents are scored by their tokens, and this model predicts none (it has no "
                "unembed): set --config.data.held_out_fraction=0"
            )
        for member in members:  # or their owner would prune what is read here
            member.hold()
        saved = agreed(lambda: [member.checkpoints.steps() for member in members])
        common = set.intersection(*map(set, saved))
        # A state alone lies whole on every device of a pack: those of many wait in the host's memory.
        kept = (lambda state: state) if alone else jax.device_get
        restored = [kept(member.restore(parts, max(common, default=None))) for member in members]
        own_rows = len({(member.run.order, member.first) for member in members}) > 1
        parts = program(dataclasses.replace(shape, own_rows=own_rows), mesh)
        step = parts.step
        folders.enter_context(explaining(one.folder, parts.advice))
        for member in members:
            member.begin(parts)
        state = parts.start([(member.run.seed, member.run.initial_scale) for member in members], restored)
        del restored
        compile_seconds = parts.charge()

        # ---- what a block of steps takes, `ahead` of where this start began, and an evaluation ----
        longest = max(members, key=lambda member: member.steps)

        def load(ahead: np.ndarray) -> Batch:
            def rows(*numbers: np.ndarray) -> dict[str, np.ndarray]:
                readers = [members[number] for number in numbers[-2]] if own_rows else [longest]
                steps = ahead[numbers[0]] if shape.block > 1 else ahead
                found = [reader.rows(steps, numbers[-1]) for reader in readers]
                stacked = {name: np.stack([rows[name] for rows in found], axis=1) for name in found[0]}
                lead = tuple(map(len, numbers))
                return {name: x.reshape(*lead, *x.shape[3:]) for name, x in stacked.items()}

            return sharding.load_rows(rows, parts.batch, len(parts.shape.batch_axes) + 1)

        def hyper(ahead: np.ndarray, count: int) -> dict[str, np.ndarray]:
            rows = [member.hyper(ahead, count) for member in members]
            stacked = {name: np.stack([row[name] for row in rows], axis=1) for name in parts.hyper}
            return {name: x.reshape(shape.hyper_axes) for name, x in stacked.items()}

        def evaluate(chosen: Sequence[Member]) -> list[dict[str, float]]:
            params = optimizers.evaluation_params(state.optimizer, state.trained)
            params, numbers = state.frozen | params, [members.index(member) for member in chosen]
            rows: list[dict[str, float]] = [{} for _ in chosen]
            if held_out is not None:
                # One is cheaper, but doesn't divide over a mesh; any other number would have to be compiled.
                some = len(chosen) == 1 < len(members) and mesh.shape["member"] == 1
                scored = parts.pick(params, np.array(numbers)) if some else params
                rows = score(parts.scorer, scored, held_out, one.run.data.batch_size, mesh)
                rows = rows if some else [rows[number] for number in numbers]
            for member, number, row in zip(chosen, numbers, rows, strict=True):
                own = parts.pick(params, number) if member.hooks and not alone else params
                for hook in member.hooks:
                    row |= hook(member.first + clock, own)
            return rows

        # ---- steps, a block in flight ----
        in_flight = InFlight(members, shape.block)
        votes = Votes(mesh)
        meet()
        saved_at, clock = time.perf_counter(), 0
        profiled = profiling.span(one.run.execution.profile_steps)
        trace = folders.enter_context(
            profiling.Trace(one.folder, profiled, in_flight.settle, parts.compiled.as_text)
        )

        def end(member: Member, scores: dict[str, float]) -> None:
            rate = in_flight.stopwatch.tokens_per_second
            measured = {"members": len(members), "compile_seconds": compile_seconds}
            member.finish(scores, mesh, **measured, tokens_per_second=rate)

        while True:
            trace.at(one.first + clock)
            running = [member for member in members if member.status == "running"]
            ended = [member for member in running if member.first + clock == member.steps]
            evaluating = [member for member in running if member.evaluates(member.first + clock)]
            late = 0 < one.run.execution.checkpoint.every_seconds < time.perf_counter() - saved_at
            late, stopping = votes.of(late, terminated.is_set())
            if stopping and not clock:  # there is nothing that isn't on disk
                raise SystemExit(143)
            staying = [member for member in running if member not in ended]
            narrowing = narrower_pays(staying, len(members))
            saving = [
                member
                for member in running
                if late or stopping or (narrowing and member in staying) or member.saves(member.first + clock)
            ]
            if ended or evaluating or saving:
                in_flight.settle()
                in_flight.stopwatch.restart()
            for member in members:
                if member.status in ("diverged", "stopped") and member.result is None:
                    end(member, {})
            ended, evaluating, saving = (
                [member for member in due if member.result is None] for due in (ended, evaluating, saving)
            )
            if evaluating:
                for member, scores in zip(evaluating, evaluate(evaluating), strict=True):
                    if member.log_scores(member.first + clock, scores) and member not in saving:
                        saving.append(member)
            for member in saving:
                member.checkpoints.save(member.first + clock, parts.take(state, members.index(member)))
                saved_at = time.perf_counter()
            if stopping:
                raise SystemExit(143)
            if ended:
                for member, scores in zip(ended, evaluate(ended), strict=True):
                    end(member, scores)
            training = [member for member in members if member.status == "running"]
            if narrowing or not training:
                break
            count = min(shape.block, *(member.until_due(member.first + clock) for member in training))
            ahead = clock + np.arange(shape.block)
            state, metrics = step(state, load(ahead), hyper(ahead, count))
            in_flight.put(clock, count, metrics)
            clock += count
