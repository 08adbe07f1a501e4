"""The order of an experiment, whatever engine trains its runs.

    the plan, with its price -> what is missing of the sweep -> a forecast of every hold-out run, on disk
    -> the hold-out runs -> the report

An experiment file has `SCALES`, `get_config(scale) -> base`, and

    sweep(base) -> list[Run]                the runs that laws are fitted to
    holdout(base) -> list[Run]              optional: larger runs that check the law
    forecast(base, runs, run) -> Forecast   with holdout: what `run` will reach, from the sweep's table
    report(base, folder, runs, forecasts)   optional: writes and prints the result, and returns a dict for
                                            result.json; forecasts are found by their run's identity
    plan_notes(base) -> list[str]           optional: lines to print with the plan

or, where it measures instead of training a sweep, `measure(base, folder) -> dict`, which goes to result.json.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.sweep import Plan, Planned
from llm_jax import config, records
from llm_jax.config import Chosen, UserError
from llm_jax.scaling import forecast

# Trains runs until each is complete or has failed, and returns the reasons of those that failed.
Engine = Callable[[Sequence[Planned]], Mapping[Planned, str]]


def check(experiment: Chosen) -> None:
    """Raises UserError if the experiment's file lacks a part."""
    module = experiment.module
    if not hasattr(module, "sweep") and not hasattr(module, "measure"):
        raise UserError(f"{module.__file__}: an experiment defines sweep(base) or measure(base, folder)")
    if hasattr(module, "holdout") and not hasattr(module, "forecast"):
        raise UserError(f"{module.__file__}: holdout(base) comes with forecast(base, runs, run), its check")


def carry_out(plan: Plan, engine: Engine) -> int:
    """All that follows the plan; returns the exit code: 0, or 1 if runs failed."""
    experiment, module = plan.experiment, plan.experiment.module
    plan.write()
    failures = train_missing(plan.sweep, engine)
    forecasts = {}
    if plan.holdout and failures:
        print("the hold-out waits: a forecast is made once, from a whole sweep")
    elif plan.holdout:
        table = plan.table(plan.sweep)
        for item in plan.holdout:
            made = module.forecast(experiment.config, table, item.run)
            forecasts[item.identity] = forecast.write(made, item.folder / "forecast.json", item.folder)
        failures |= train_missing(plan.holdout, engine)
    if hasattr(module, "report"):
        result = module.report(experiment.config, plan.folder, plan.table(plan.runs), forecasts)
        write_result(plan.folder, plan.experiment, result or {})
    for run, reason in failures.items():
        print(f"failed: {run.label}: {reason}")
    return 1 if failures else 0


def train_missing(runs: Sequence[Planned], engine: Engine) -> dict[Planned, str]:
    missing = [run for run in runs if not run.complete]
    return dict(engine(missing)) if missing else {}


def measure(experiment: Chosen, folder: Path) -> int:
    """Runs an experiment that measures."""
    write_result(folder, experiment, experiment.module.measure(experiment.config, folder))
    return 0


def write_result(folder: Path, experiment: Chosen, result: Mapping[str, Any]) -> None:
    """result.json of a whole experiment."""
    content = {"scale": experiment.scale, "config": config.to_json(experiment.config), **result}
    folder.mkdir(parents=True, exist_ok=True)
    records.write_atomically(folder / "result.json", records.dumps(content, indent=1) + "\n")
