"""Trunks and branches: the first steps that runs have in common are computed once.

Rows are a pure function of (seed, index), schedules are per-step tables, and neither decides the initial
state. So two runs that differ in tokens and schedule only are in one and the same state for as many steps as
the rows of their tables agree. Under WSD that is the part of constant rate: the longest run, the trunk,
serves every shorter one, which trains little more than its decay (Hägele et al. 2024, arXiv:2405.18392).

A branch has the identity of the unbroken run, since it computes the same, bit for bit where both are executed
alike. Where its state came from belongs to its execution, and is recorded.
"""

import dataclasses
import sys
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import config, files, manifest, optimizers, records
from llm_jax.checkpoints import Checkpoints
from llm_jax.config import UserError
from llm_jax.data import Source
from llm_jax.distributed import agreed
from llm_jax.run import Cell, Execution, NoSweep, Run
from llm_jax.schedules import Constant

# A start that would save less than this share of a run isn't worth waiting for another run.
WORTH = 0.1


def shared_steps(one: Run, other: Run) -> int:
    """After how many of their first steps two runs are still in the same state (0: they differ at once)."""
    return _agreeing(_tables(one), _tables(other)) if _beginning(one) == _beginning(other) else 0


# ---- the graph ----


@dataclasses.dataclass(frozen=True)
class Start:
    """A run starts from the state of run number `trunk` after `from_step` steps."""

    trunk: int
    from_step: int


def graph(
    runs: Sequence[Run],
    ranks: Sequence[int] | None = None,
    offer: Callable[[int, int], int] = lambda trunk, step: step,
    begun: Container[int] = (),
) -> dict[int, Start]:
    """What each run starts from, for those that start from another run's state; in an order to train them in.

    Each takes from the run before it with which it shares most: how much there is to compute in all doesn't
    depend on the order, as that is the size of the tree that the tables make up. Within a rank (default: one
    for all) comes first what shares most with all others, and then has the longest constant part, so that
    under WSD all others are branches of one trunk.

    offer(trunk, step): the last step up to `step` whose state run number `trunk` has or, if it trains all
    steps itself, will have. begun: the runs that keep the start they had.
    Runs that are executed differently share nothing, as their roundings differ.
    """
    groups: dict[Any, list[int]] = {}
    for number, run in enumerate(runs):
        groups.setdefault((_beginning(run), _rounding(run)), []).append(number)
    starts = {}
    for group in groups.values():
        if len(group) == 1:
            continue
        tables = {number: _tables(runs[number]) for number in group}
        shared = {(a, b): _agreeing(tables[a], tables[b]) for a in group for b in group}
        total = {a: sum(shared[a, b] for b in group if b != a) for a in group}
        constant = {number: extensible_steps(runs[number]) for number in group}
        order = sorted(group, key=lambda n: (ranks[n] if ranks else 0, -total[n], -constant[n]))
        for place, number in enumerate(order[1:], 1):
            if number in begun:
                continue
            offers = [(offer(trunk, shared[trunk, number]), trunk) for trunk in order[:place]]
            # A run that starts from another's state passes through later ones only.
            offers = [(step, at) for step, at in offers if at not in starts or step > starts[at].from_step]
            step, trunk = max(offers, key=lambda pair: pair[0], default=(0, 0))
            if step >= WORTH * runs[number].steps:
                starts[number] = Start(trunk, step)
    return starts


def extensible_steps(run: Run) -> int:
    """After how many steps a longer run of the same schedule could still start from this one."""
    return shared_steps(run, dataclasses.replace(run, tokens=2 * run.tokens))


def _tables(run: Run) -> dict[str, np.ndarray]:
    return optimizers.tables(run.optimizer, run.objective, run.steps)


def _agreeing(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> int:
    """The number of first rows that are equal in two sets of tables with the same columns."""
    steps = min(len(column) for tables in (one, other) for column in tables.values())
    differ = np.zeros(steps, bool)
    for name in one:
        differ |= one[name][:steps] != other[name][:steps]
    return int(differ.argmax()) if differ.any() else steps


def _beginning(run: Run) -> Run:
    """The run without what its first steps don't depend on, but for the tables."""
    optimizer = dataclasses.replace(run.optimizer, schedule=Constant())
    neutral = {"name": "", "cell": Cell(), "sweep": NoSweep(), "execution": Execution()}
    return dataclasses.replace(run, tokens=1, optimizer=optimizer, **neutral)


def _rounding(run: Run) -> tuple:
    execution = run.execution
    return execution.mesh, execution.layout, execution.micro_batches, execution.deterministic


# ---- a branch's start ----


@dataclasses.dataclass(frozen=True)
class Trunk:
    """A run whose first `steps` steps are those of a branch."""

    folder: Path
    identity: str
    steps: int

    def restore(self, abstract_state: Any, branch: Run) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, entry for the branch's record) from its last sound checkpoint that can serve.

        None, with a line on stderr that says why, if there is none: the branch trains all its steps itself.
        """
        checkpoints = Checkpoints(self.folder / "checkpoints")
        try:
            restored, why = checkpoints.restore(abstract_state, at_most=self.steps), "it left none"
        except UserError as error:
            restored, why = None, str(error)
        finally:
            checkpoints.close()
        if restored is None:
            line = (
                f"{self.folder}: no checkpoint of its first {self.steps} steps ({why}); training from step 0"
            )
            print(line, file=sys.stderr, flush=True)
            return None
        step, state = restored
        entry = {"folder": str(self.folder), "identity": self.identity, "from_step": step}
        return step, state, entry | {"decay_steps": branch.steps - step}


def find(run: Run, source: Source, folder: Path) -> Trunk | None:
    """The trunk that `run` names; None if it names none, or has a result or a checkpoint in `folder`.

    Raises UserError if the named folder has no run, or one that shares no step with this one.
    """
    if not run.execution.trunk:
        return None
    if agreed(lambda: (folder / "result.json").exists() or bool(manifest.steps(folder / "checkpoints"))):
        return None
    place = files.path(run.execution.trunk)
    there = records.load_run(place)
    trunk = config.from_json(Run, there["config"])
    # The identity tells of the contents of the corpus too, and of results that no longer count.
    steps = shared_steps(trunk, run) if trunk.identity() == there["identity"] else 0
    if not steps:
        raise UserError(
            f"execution.trunk: run {there['identity']} in {place} has no first step in common with this one; "
            "a trunk differs in tokens and schedule only, and its warm-up has as many steps"
        )
    records.check_tokenizer(place, there, {"data": files.plain(source.record)})
    return Trunk(place, there["identity"], steps)
