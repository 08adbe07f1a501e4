"""What an experiment asks for, whatever engine runs it: the plan, what it costs, what is missing of it.

Every run has a folder of its own, named by its identity, so a run is done once however often it is asked for:
twice in a plan, or by launching again. A folder may hold runs of other plans too (the base was overridden);
they stay, and plan.json says which ones belong to this plan, so that no law is fitted to the others.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import time
import types
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import branches
from llm_jax import claims, config, files, manifest, records
from llm_jax.command_line import Chosen
from llm_jax.config import UserError
from llm_jax.data import DataConfig, Source
from llm_jax.models import ModelConfig, counting
from llm_jax.program import Shape, shape_of
from llm_jax.run import Run, refuse_repeats

if TYPE_CHECKING:
    import pandas

LOG = "log.txt"
FAILURE = "failure.json"
ENDS = ("done", "diverged", "stopped")  # of what is complete


@dataclasses.dataclass(frozen=True, eq=False)
class Planned:
    """One run of a plan: its folder, its name on the screen, its FLOPs, the shape of its program, its start.

    Its first `from_step` steps are taken from the state of another run; from that of `trunk`, if it hasn't
    begun yet.
    """

    run: Run
    identity: str
    folder: Path
    label: str
    flops: float
    shape: Shape
    trunk: "Planned | None" = None
    from_step: int = 0

    @property
    def price(self) -> float:
        """The FLOPs of the steps that it trains itself."""
        return self.flops * (1 - self.from_step / self.run.steps)

    @property
    def begun(self) -> bool:
        """Its folder has a record: once at least, its configuration was accepted."""
        return (self.folder / "config.json").exists()

    @property
    def status(self) -> str:
        return status(self.folder, self.stops)

    @property
    def stops(self) -> bool:
        """Whether it may be stopped early: asked without the rule, a stopped run goes on."""
        return bool(self.run.execution.stopping.margin)

    @property
    def complete(self) -> bool:
        return self.status in ENDS

    @property
    def standing(self) -> int:
        """The step that it would go on from."""
        return max(manifest.steps(self.folder / "checkpoints"), default=self.from_step)

    @property
    def ready(self) -> bool:
        """It need not wait, any more: the state it starts from stands, or its trunk will not leave one."""
        return (
            self.trunk is None
            or self.from_step in manifest.steps(self.trunk.folder / "checkpoints")
            or self.trunk.complete
            or self.trunk.status == "failed"
        )

    def task(self) -> dict[str, Any]:
        """All that a worker needs to know, as JSON values."""
        run = self.run
        if self.trunk is not None and self.trunk.record():
            run = config.replace(run, "execution.trunk", str(self.trunk.folder))
        known = {"label": self.label, "folder": str(self.folder), "run": config.to_json(run)}
        return known | {"stale": claims.stale(self.folder)}

    def record(self) -> dict[str, Any] | None:
        """What its folder has of it, if it isn't damaged or another run's."""
        try:
            found = records.find_run(self.folder)
            return found if found and found["identity"] == self.identity else None
        except UserError:
            return None

    @property
    def failure(self) -> str:
        """Why it was given up; "" where it wasn't."""
        return failure(self.folder).get("reason", "")

    def record_failure(self, reason: str) -> None:
        """Says in the run's folder why it was given up, with its log's tail; the next launch tries again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"identity": self.identity, "reason": reason, "time": time.time(), "log": tail(self.folder)}
        files.write_atomically(self.folder / FAILURE, files.dumps(content, indent=1) + "\n")

    def forget_failure(self) -> None:
        forget_failure(self.folder)

    def clear(self) -> None:
        """Removes what a run leaves that was refused before its first record."""
        if self.folder.is_dir() and not self.begun:
            (self.folder / LOG).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # somebody put something else there
                self.folder.rmdir()


@dataclasses.dataclass(frozen=True)
class Plan:
    """The runs of an experiment: those that laws are fitted to, and those held out to check the forecast."""

    experiment: Chosen
    folder: Path
    sweep: tuple[Planned, ...]
    holdout: tuple[Planned, ...]

    @property
    def runs(self) -> tuple[Planned, ...]:
        return self.sweep + self.holdout

    def write(self) -> None:
        """plan.json: which of the folder's runs this plan is made of."""
        stages = {"sweep": self.sweep, "holdout": self.holdout}
        content = {
            "experiment": self.experiment.module.__file__,
            "scale": self.experiment.scale,
            "overrides": dict(self.experiment.overrides),
            "runs": [
                {"identity": item.identity, "label": item.label, "stage": stage, "flops": item.flops}
                | {"steps": item.run.steps, "price": item.price, "stops": item.stops}
                | {"trunk": item.trunk and item.trunk.identity, "from_step": item.from_step}
                | dataclasses.asdict(item.run.cell)
                for stage, items in stages.items()
                for item in items
            ],
        }
        make_folder(self.folder)
        files.write_atomically(self.folder / "plan.json", files.dumps(content, indent=1) + "\n")

    def table(self, runs: Sequence[Planned]) -> "pandas.DataFrame":
        """The records of `runs`, one row each as `records.load_sweep` gives them; those that exist."""
        table = records.load_sweep(self.folder)
        by_identity = {item.identity: item.run for item in runs}
        table = table[table["identity"].isin(by_identity)].reset_index(drop=True)
        # A run may have been trained for another plan, in which it had another place.
        planned = [by_identity[identity] for identity in table["identity"]]
        return table.assign(
            name=[run.name for run in planned],
            role=[run.cell.role for run in planned],
            budget_flops=[run.cell.budget_flops for run in planned],
        )


def missing(runs: Iterable[Planned]) -> list[Planned]:
    """Those that aren't complete."""
    runs = list(runs)
    return files.those(lambda run: not run.complete, runs, runs[0].folder if runs else "")


def status(folder: Path, stops: bool) -> str:
    """How a run stands, by its folder: one of ENDS, running (in some process), failed (given up) or missing.

    stops: whether it may be stopped early; otherwise it isn't at its end where it was.
    """
    return status_and_result(folder, stops)[0]


def status_and_result(folder: Path, stops: bool) -> tuple[str, dict[str, Any]]:
    """`status`, and what result.json says where the run is complete, else {}; each file is looked at once."""
    run = records.find_run(folder)
    if run and run["result"] and (run["status"] != "stopped" or stops):
        return run["status"], run["result"]
    known = run and not run["result"]  # whether a process has it
    found = run["status"] if known else "running" if claims.held(folder) else "missing"
    return "failed" if found == "missing" and failure(folder) else found, {}


def failure(folder: Path) -> dict[str, Any]:
    """Why the run in `folder` was given up: {"reason", "time", "log"}; {} where it wasn't."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return json.loads((folder / FAILURE).read_text())
    return {}


def forget_failure(folder: Path) -> None:
    """Lets the run be tried again, as often as a new one."""
    if failure(folder) or claims.deaths(folder)[0]:
        claims.forgive(folder)
        (folder / FAILURE).unlink(missing_ok=True)


def log_name(process: int | None) -> str:
    """What each of a run's processes has: log.txt, log.1.txt, log.2.txt ..."""
    return LOG.replace(".", f".{process}.") if process else LOG


def add_to_log(folder: Path, text: str, process: int | None = None) -> None:
    """Adds to the log of a run, as far as that can be done."""
    place = folder / log_name(process)
    with contextlib.suppress(OSError):
        if not files.in_bucket(folder):
            with place.open("a") as log:
                log.write(text)
        elif text:
            before = place.read_text(errors="replace") if place.exists() else ""
            place.write_text(before + text)


def tail(folder: Path, lines: int = 20) -> list[str]:
    """The last lines that a run's worker has printed."""
    with contextlib.suppress(OSError), (folder / LOG).open("rb") as log:
        log.seek(max(0, log.seek(0, 2) - (1 << 14)))
        return log.read().decode(errors="replace").splitlines()[-lines:]
    return []


def folder_of(experiment: Chosen) -> Path:
    """Where an experiment's runs go if nobody says otherwise: runs/<experiment>-<scale>."""
    return Path("runs") / f"{Path(experiment.module.__file__).stem}-{experiment.scale}"


def make_folder(folder: Path) -> None:
    """Makes an experiment's folder; raises UserError if it can't be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.check_writable(folder)
    except OSError as error:
        raise UserError(
            f"{folder} can't be an experiment's folder: {error.strerror}; name another by --folder"
        ) from None


def make_plan(experiment: Chosen, folder: Path) -> Plan:
    """The plan of an experiment that has `sweep`; raises UserError if one of its runs can't be done."""
    stages = asked_for(experiment.module, experiment.config)
    if not stages["sweep"]:
        raise UserError(f"{experiment.module.__file__}: sweep(base) returned no runs")
    unique: dict[str, tuple[str, Run]] = {}
    for stage, runs in stages.items():
        for run in runs:
            config.check(run)
            refuse_repeats(run, _source(run.data))
            unique.setdefault(run.identity(), (stage, run))
    names = Counter(run.name for _, run in unique.values())
    planned: dict[str, list[Planned]] = {stage: [] for stage in stages}
    for identity, (stage, run) in unique.items():
        label = run.name if run.name and names[run.name] == 1 else f"{run.name or 'run'} {identity}"
        planned[stage].append(
            Planned(run, identity, folder / identity, label, flops(run), shape_of(run, _source(run.data)))
        )
    items = list(itertools.chain(*planned.values()))
    for item, there in zip(items, files.each(Planned.record, items, folder), strict=True):
        if there:
            here = {"data": files.plain(_source(item.run.data).record)}
            records.check_tokenizer(item.folder, there, here)
    return Plan(experiment, folder, *branches.connect([planned["sweep"], planned["holdout"]]))


def asked_for(module: types.ModuleType, base: Any) -> dict[str, list[Run]]:
    """The runs of an experiment by stage: those that laws are fitted to, and those held out."""
    return {"sweep": module.sweep(base), "holdout": getattr(module, "holdout", lambda base: [])(base)}


def without_effect(plan: Plan) -> list[str]:
    """The overridden fields that change no run of the plan, since the experiment sets them in each.

    Only fields that have another value in every run can be such: for those, the runs are asked for again
    without the override.
    """
    module, overrides = plan.experiment.module, plan.experiment.overrides
    idle = []
    for path, text in overrides:
        given = _value(plan.experiment.config, path)
        if any(_value(item.run, path) == given for item in plan.runs):
            continue
        base = module.get_config(plan.experiment.scale)
        try:
            for other, value in overrides:
                base = base if other == path else config.override(base, other, value)
            stages = asked_for(module, base)
        except UserError:
            continue
        identities = {run.identity(content=False) for runs in stages.values() for run in runs}
        outside = base.identity(content=False) == plan.experiment.config.identity(content=False)
        if not outside and identities == {item.run.identity(content=False) for item in plan.runs}:
            idle.append(f"--config.{path}={text}")
    return idle


def _value(run: Run, path: str) -> Any:
    """What stands at a dotted path of the config (None: nothing)."""
    value: Any = run
    for part in path.removesuffix(".kind").split("."):
        items = dict(enumerate(value)) if isinstance(value, tuple) else {}
        value = items.get(int(part)) if items else getattr(value, part, None)
    return value


def flops(run: Run) -> float:
    """What training `run` costs, counted exactly."""
    per_step = _flops_per_token(run.resolved_model, run.data) * run.data.tokens_per_step
    return run.steps * per_step


@functools.cache
def _flops_per_token(model: ModelConfig, data: DataConfig) -> float:
    counted = counting.count(model, _source(data).spec, data.tokens_per_step)
    exact = counted["flops_exact_per_token"]
    return counted["flops_6n_per_token"] if exact is None else exact


@functools.cache
def _source(data: DataConfig) -> Source:
    """Opened here before any worker does, so that what must be prepared is prepared in the user's sight."""
    return data.open()


# ---- what a user sees of a plan ----


def summary(plan: Plan) -> str:
    """The plan as a text: runs by role and budget, what is shared and complete, the price of the rest."""
    import pandas

    open_ones = set(missing(plan.runs))
    rows = pandas.DataFrame(
        {
            "role": item.run.cell.role,
            "budget": item.run.cell.budget_flops,
            "tokens": item.run.steps * item.run.data.tokens_per_step,
            "flops": item.flops,
            "price": item.price,
            "complete": item not in open_ones,
        }
        for item in plan.runs
    )
    lines = [
        f"{'role':<12} {'budget':>9} {'runs':>5} {'complete':>8} {'tokens each':>21} {'exact FLOPs':>11}"
    ]
    for (role, budget), group in rows.groupby(["role", "budget"], dropna=False, sort=False):
        low, high = group["tokens"].min(), group["tokens"].max()
        tokens = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        shown = "" if pandas.isna(budget) else f"{budget:.3g}"
        lines.append(
            f"{role:<12} {shown:>9} {len(group):>5} {group['complete'].sum():>8} {tokens:>21} "
            f"{group['flops'].sum():>11.2e}"
        )
    left = rows["price"][~rows["complete"]].sum()
    total = f"{len(rows)} runs, {rows['flops'].sum():.2e} exact FLOPs"
    if left:
        total += f"; to do: {(~rows['complete']).sum()} runs, {left:.2e} FLOPs"
    return "\n".join([*lines, total, *branches.summary(plan.runs)])


def minutes(seconds: float) -> str:
    """40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
