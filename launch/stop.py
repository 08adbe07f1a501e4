"""Stops a sweep, wherever its workers are: they save what they are at and end. To launch again continues.

    python -m launch.stop --folder=runs/isoflop-cpu

All launchers and places that see the folder stop by themselves, by a file in it. Jobs that wait for a place,
and machines that cost money, are given back through the engine that the launch used.
"""

import importlib
import time
from pathlib import Path

from absl import flags

from launch import engine, status
from llm_jax import config

SECONDS_TO_SAVE = 150.0


def stop(folder: Path) -> None:
    """Leaves word for all who see the folder, and gives places back once what ran there has been saved.

    Raises UserError where no sweep is.
    """
    status.rows(folder)
    (folder / engine.STOP).touch()
    launched, deadline = status.launched(folder), time.monotonic() + SECONDS_TO_SAVE
    while any(row.state == "running" for row in status.rows(folder)) and time.monotonic() < deadline:
        time.sleep(1)
    if launched.get("jobs"):
        importlib.import_module(f"launch.{launched['engine']}").give_back(launched["jobs"])


def main() -> None:
    folder = status.named()
    stop(folder)
    print(f"{folder}: {status.line(status.rows(folder))}; to launch again continues")


if __name__ == "__main__":
    flags.DEFINE_string("folder", None, "the folder of a sweep")
    config.run_main(main)
