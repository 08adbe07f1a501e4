"""The order of an experiment, whatever engine trains its runs.

    the plan, with its price -> what is missing of the sweep -> a forecast of every hold-out run, on disk
    -> the hold-out runs -> what shared trunks saved -> the report

An experiment file has `SCALES`, `get_config(scale) -> base`, and

    sweep(base) -> list[Run]                the runs that laws are fitted to
    holdout(base) -> list[Run]              optional: larger runs that check the law
    forecast(base, runs, run) -> Forecast   with holdout: what `run` will reach, from the sweep's table
    report(base, folder, runs, forecasts)   optional: writes and prints the result, and returns a dict for
                                            result.json; forecasts are found by their run's identity
    plan_notes(base) -> list[str]           optional: lines to print with the plan
    hooks(run) -> list[Hook]                optional: what else every evaluation of `run` measures and logs

or, where it measures instead of training a sweep, `measure(base, folder) -> dict`, which goes to result.json.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import sweep
from launch.sweep import Plan, Planned, make_folder
from llm_jax import config, files
from llm_jax.command_line import Chosen
from llm_jax.config import UserError
from llm_jax.scaling import forecast
from llm_jax.scaling.trunks import savings

# engine(missing, planned, before): trains the missing of the `planned` runs of a stage until each is complete
# or has failed, and returns the reasons of those that failed. First, as workers start, it calls `before`.
Engine = Callable[[Sequence[Planned], int, Callable[[], None]], Mapping[Planned, str]]


class ForecastError(UserError):
    """A hold-out for which no forecast can be made."""


def check(experiment: Chosen) -> None:
    """Raises UserError if the experiment's file lacks a part."""
    module = experiment.module
    if not hasattr(module, "sweep") and not hasattr(module, "measure"):
        raise UserError(f"{module.__file__}: an experiment defines sweep(base) or measure(base, folder)")
    wanted = getattr(module.get_config(experiment.scale), "sweep", None)
    if (given := getattr(experiment.config, "sweep", None)) is not None and type(given) is not type(wanted):
        raise UserError(
            f"sweep is {given.kind}; {module.__file__} plans by {wanted.kind}: --config.sweep={wanted.kind}"
        )
    if hasattr(module, "holdout") and not hasattr(module, "forecast"):
        raise UserError(f"{module.__file__}: holdout(base) comes with forecast(base, runs, run), its check")


def carry_out(plan: Plan, engine: Engine) -> int:
    """All that follows the written plan; the exit code, 1 if a run, a forecast or the report failed."""
    module = plan.experiment.module
    failures = train_missing(plan.sweep, engine)
    forecasts, unable = {}, []
    if plan.holdout and failures:
        print("the hold-out waits: a forecast is made once, from a whole sweep")
    elif plan.holdout:
        try:
            failures |= train_missing(plan.holdout, engine, lambda: forecasts.update(write_forecasts(plan)))
        except ForecastError as error:
            unable = [f"forecast: {error}; the hold-out waits"]
    for line in [*troubles(plan, failures), *unable]:
        print(line, flush=True)
    saved = savings(plan.table(plan.runs)) if any(item.begun for item in plan.runs) else None
    if saved:
        print(f"trunks: {saved}", flush=True)
    if hasattr(module, "report"):
        try:
            result = module.report(plan.experiment.config, plan.folder, plan.table(plan.runs), forecasts)
            costs = {"savings": dataclasses.asdict(saved)} if saved else {}
            write_result(plan.folder, plan.experiment, (result or {}) | costs)
        except UserError as error:
            print(f"report: {error}")
            return 1
    return 1 if failures or unable else 0


def join(plan: Plan, engine: Engine) -> int:
    """What one of several places does of the order: it trains what it can, and says nothing of the whole."""
    train_missing(plan.sweep, engine)
    if plan.holdout and all((item.folder / "forecast.json").exists() for item in plan.holdout):
        train_missing(plan.holdout, engine)
    return 0


def write_forecasts(plan: Plan) -> dict[str, forecast.Forecast]:
    """Makes the forecast of every hold-out run, or finds it on disk; by the runs' identities."""
    forecasts: dict[str, forecast.Forecast] = {}
    try:
        table = plan.table(plan.sweep)
        for item in plan.holdout:
            made = plan.experiment.module.forecast(plan.experiment.config, table, item.run)
            forecasts[item.identity] = forecast.write(made, item.folder / "forecast.json", item.folder)
    except UserError as error:
        raise ForecastError(str(error)) from None
    return forecasts


def troubles(plan: Plan, failures: Mapping[Planned, str]) -> list[str]:
    """A line for each run that failed, and for each hold-out that diverged."""
    lines = [f"failed: {item.label}: {reason}" for item, reason in failures.items()]
    diverged = [item.label for item in plan.holdout if item.status == "diverged"]
    return lines + [f"diverged: {label}: its forecast can't be checked" for label in diverged]


def train_missing(
    runs: Sequence[Planned], engine: Engine, before: Callable[[], None] = lambda: None
) -> dict[Planned, str]:
    if missing := sweep.missing(runs):
        return dict(engine(missing, len(runs), before))
    before()
    return {}


def measure(experiment: Chosen, folder: Path) -> int:
    """Runs an experiment that measures; raises UserError before if `folder` can't be written, is a bucket's,
    or holds what another config measured.
    """
    if files.in_bucket(folder):
        raise UserError(f"{folder}: what an experiment measures is written on a disk; name a folder there")
    make_folder(folder)
    refuse_another(folder, config.to_json(experiment.config))
    write_result(folder, experiment, experiment.module.measure(experiment.config, folder))
    return 0


def refuse_another(folder: Path, asked: Mapping[str, Any]) -> None:
    """Raises UserError if the folder's result is of another config than what is asked."""
    try:
        there = json.loads((folder / "result.json").read_text())["config"]
    except (FileNotFoundError, ValueError, KeyError):
        return
    if other := [name for name in asked if json.loads(json.dumps(asked[name])) != there.get(name)]:
        raise UserError(
            f"{folder} holds a result with another {', '.join(other)}; name another folder by --folder, "
            "or remove this one"
        )


def write_result(folder: Path, experiment: Chosen, result: Mapping[str, Any]) -> None:
    """result.json of a whole experiment; its numbers that aren't finite are null."""
    content = {
        "scale": experiment.scale,
        "config": config.to_json(experiment.config),
        **files.with_nulls(result),
    }
    files.write_atomically(folder / "result.json", files.dumps(content, indent=1) + "\n")
