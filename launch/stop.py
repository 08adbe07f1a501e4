"""Stops a sweep, wherever its workers are: they save what they are at and end. To launch again continues.

    python -m launch.stop --folder=runs/isoflop-cpu

All launchers and places that see the folder stop by themselves, by a file in it. Jobs that wait for a place,
and machines that cost money, are given back through their engines, of whatever launcher. Where that
fails, a line says so, and the exit code is 1.
"""

import importlib
import time
from pathlib import Path

from absl import flags

from launch import engine, jobs, status
from llm_jax import command_line


def stop(folder: Path) -> list[str]:
    """Leaves word for all who see the folder, and gives places back once what ran there has been saved.

    Returns the jobs whose places could not be given back. Raises UserError where no sweep is.
    """
    status.rows(folder)
    (folder / engine.STOP).touch()
    deadline = time.monotonic() + engine.SECONDS_TO_STOP
    while any(row.state == "running" for row in status.rows(folder)) and time.monotonic() < deadline:
        time.sleep(1)
    left = []
    for engine_name, asked_for in jobs.listed(folder).items():
        given_back = importlib.import_module(f"launch.{engine_name}").give_back(asked_for)
        jobs.strike(folder, given_back)
        left += [job for job in asked_for if job not in given_back]
    return left


def main() -> int:
    folder = status.named()
    left = stop(folder)
    print(f"{folder}: {status.line(status.rows(folder))}; to launch again continues")
    return 1 if left else 0


if __name__ == "__main__":
    flags.DEFINE_string("folder", None, "the folder of a sweep")
    command_line.run_main(main)
