"""Runs that differ from a given one, for tests."""

from typing import Any

from llm_jax import config
from llm_jax.run import Run


def changed(run: Run, **fields: Any) -> Run:
    """`run` with other fields, named as their path with __ for a dot: optimizer__schedule=Constant()."""
    for path, value in fields.items():
        run = config.replace(run, path.replace("__", "."), value)
    return run
