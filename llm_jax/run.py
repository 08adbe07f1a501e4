"""A run: the join of the rooms' configs, and its identity.

The scientific part (model, data, optimizer, objective, tokens, seed) decides the result and makes up the
identity. The rest says where the run stands in its sweep and how it is executed; it is recorded only.
"""

import dataclasses
import math
from typing import Literal

from llm_jax import config, profiling
from llm_jax.config import Tagged, UserError, outside_identity
from llm_jax.data import DataConfig, Source, Text
from llm_jax.inference import pretrained  # noqa: F401 (kinds of models and tokenizers)
from llm_jax.losses import NextToken, Objective
from llm_jax.models import Layout, ModelConfig
from llm_jax.models.transformer import Transformer
from llm_jax.optimizers import AdamW, Optimizer
from llm_jax.sharding import MeshConfig
from llm_jax.values import check_least

# Raised when the meaning of an unchanged config changes, so that old results are not taken for new ones.
SCHEMA = 2
MOST_STEPS = 10**8  # every step's hyperparameters are in memory


@dataclasses.dataclass(frozen=True)
class Cell:
    """Where a run stands in its sweep: what it is for, and the budget it belongs to."""

    role: str = "run"
    budget_flops: float | None = None


class Sweep(Tagged):
    """Root of the experiments' own settings (budgets, ladders, seeds): one member in each experiment file."""


@dataclasses.dataclass(frozen=True)
class NoSweep(Sweep, kind="none"):
    """A single run."""


@dataclasses.dataclass(frozen=True)
class Checkpointing:
    """When the state is saved: every so many seconds or steps (0: not by that clock), and at the end.

    keep_best: a metric of the evaluations, such as loss; the state for which it was best is saved and kept,
    and the run is opened with it. best_is: for a metric that doesn't say so itself.
    """

    every_seconds: float = 60.0
    every_steps: int = 0
    keep_last: int = 2
    keep_steps: tuple[int, ...] = ()
    at_end: bool = True
    keep_best: str = ""
    best_is: Literal["", "lowest", "highest"] = ""

    def validate(self) -> None:
        check_least(self, "execution.checkpoint.", keep_last=1, every_steps=0, every_seconds=0)
        if min(self.keep_steps, default=1) < 1:
            raise UserError(f"execution.checkpoint.keep_steps has {min(self.keep_steps)}; steps count from 1")


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """A member ends when its training loss lies more than `margin` nats above the best one's (0: never).

    Losses are means over a twentieth of the run; none ends before `after_fraction` of its steps.
    """

    margin: float = 0.0
    after_fraction: float = 0.25

    def validate(self) -> None:
        if not self.margin >= 0 or not 0 <= self.after_fraction <= 1:
            raise UserError(
                "execution.stopping.margin is at least 0 (0: off), execution.stopping.after_fraction lies "
                "between 0 and 1"
            )


@dataclasses.dataclass(frozen=True)
class Tasks:
    """What every evaluation asks: tasks by the names that `python -m llm_jax.evaluate` knows, or files.

    limit: items of each. chat: in turns. data: the folder of published ones.
    """

    names: tuple[str, ...] = ()
    limit: int = 100
    chat: bool = False
    data: str = ""

    def validate(self) -> None:
        check_least(self, "execution.tasks.", limit=1)


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a run is executed: nothing here changes what it computes beyond rounding.

    trunk: the folder of a run whose first steps are this one's too; they are taken from there (trunks.py).
    block_steps: steps that are dispatched as one; more than one pays where a step takes about a millisecond.
    profile_steps: 10:15, say, traces these steps and says where their time went (profiling.py).
    wandb: the project at Weights & Biases that metrics go to as well.
    """

    mesh: MeshConfig = MeshConfig()
    layout: Layout = Layout()
    micro_batches: int = 1
    block_steps: int = 1
    checkpoint: Checkpointing = Checkpointing()
    stopping: EarlyStopping = EarlyStopping()
    trunk: str = ""
    evaluate_every_steps: int = 0
    tasks: Tasks = Tasks()
    log_every_steps: int = 1
    deterministic: bool = False
    profile_steps: str = ""
    wandb: str = ""

    def validate(self) -> None:
        profiling.span(self.profile_steps)
        check_least(
            self, "execution.", micro_batches=1, block_steps=1, log_every_steps=1, evaluate_every_steps=0
        )
        if self.checkpoint.keep_best and not self.evaluate_every_steps:
            raise UserError(
                f"execution.checkpoint.keep_best={self.checkpoint.keep_best} compares evaluations: say how "
                "often, --config.execution.evaluate_every_steps=100"
            )


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run. `tokens` is D, what it trains on; its last step ends the schedule.

    seed decides how parameters start and, unless data_seed does, in which order the rows come. initial_scale:
    what matrices are multiplied by at the start, beside the model's own initialisation.
    """

    model: ModelConfig = Transformer()
    data: DataConfig = Text()
    optimizer: Optimizer = AdamW()
    objective: Objective = NextToken()
    tokens: int = 2**20
    seed: int = 0
    data_seed: int | None = None
    initial_scale: float = 1.0
    name: str = outside_identity("")
    cell: Cell = outside_identity(Cell())
    sweep: Sweep = outside_identity(NoSweep())
    execution: Execution = outside_identity(Execution())

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.data.tokens_per_step)

    @property
    def order(self) -> int:
        """The seed of the order of its rows."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def resolved_model(self) -> ModelConfig:
        """The model's config with what it takes from the data (the vocabulary) filled in."""
        return self.model.resolve(self.data)

    def validate(self) -> None:
        if self.tokens < 1:
            raise UserError(f"tokens is {self.tokens}; it must be at least 1")
        if self.steps > MOST_STEPS:
            steps = f"{self.steps:.6g} steps of {self.data.tokens_per_step:,}"
            raise UserError(f"tokens is {self.tokens:.6g}, {steps}; a run has at most {MOST_STEPS:,}")
        for name in ("seed", "data_seed"):
            if not 0 <= (getattr(self, name) or 0) < 1 << 32:
                raise UserError(f"{name} is {getattr(self, name)}; it lies in 0 .. 4294967295")
        check_least(self, "", ("initial_scale",))
        self.optimizer.schedule.check_length(self.steps)
        model = self.resolved_model
        config.check(model, "config.model")
        if self.execution.micro_batches > 1 and getattr(model.merged, "dropout", 0):
            raise UserError(
                "model.dropout draws anew in each micro-batch: set --config.execution.micro_batches=1"
            )
        if hasattr(model, "parametrization"):
            model.parametrization.check_optimizer(self.optimizer)
        if self.initial_scale != 1 and self.model.record(self.data):
            raise UserError("initial_scale multiplies drawn parameters, and model.path gives them: drop it")

    def identity(self, content: bool = True) -> str:
        return config.identity(self, SCHEMA, content)


def refuse_repeats(run: Run, source: Source) -> None:
    """Raises UserError if the run needs more tokens than one epoch has, unless repeating was asked for."""
    needed = run.steps * run.data.tokens_per_step
    if source.available_tokens is not None and needed > source.available_tokens:
        raise UserError(
            f"{needed:,} tokens are more than the {source.available_tokens:,} of one epoch; ask for fewer "
            "(--config.tokens) or for repetition (--config.data.repeat=true)"
        )
