"""A user's own law: one class in a file, tried out before any fit stumbles over it."""

import importlib.util
import pathlib

import numpy as np

from llm_jax.config import UserError, nearest
from llm_jax.scaling.law import Law, Parameter


def load(path: pathlib.Path, name: str) -> Law:
    """The law `name` of the file at `path`; UserError for whatever a fit would stumble over."""
    if not path.is_file():
        raise UserError(f"--law: no file {str(path)!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"--law: {path} can't be imported ({_said(error)})") from None
    found = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Law)
    }
    if name not in found:
        raise UserError(f"--law: {path} has no law {name!r}; {nearest(name, found)}")
    cls = found[name]
    lacking = [part for part in ("formula", "inputs", "parameters") if not hasattr(cls, part)]
    if lacking:
        raise UserError(
            f"--law: {name} of {path} has no {', '.join(lacking)}; see CONTRIBUTING.md, Add a law"
        )
    if not (cls.parameters and all(isinstance(parameter, Parameter) for parameter in cls.parameters)):
        raise UserError(f"--law: parameters of {name} are a tuple of Parameter(NAME, STARTS), one or more")
    try:
        own = cls()
        _try(own)
    except Exception as error:
        raise UserError(f"--law: {name} of {path} can't be evaluated ({_said(error)})") from None
    return own


def _try(own: Law) -> None:
    """Evaluates a user's law as fits do, at its first and last starts; raises for what no fit can use."""
    theta = np.array([[parameter.grid[at] for parameter in own.parameters] for at in (0, -1)], float)
    x = {name: np.log([1e8, 1e9, 1e10]) if name != "loss" else np.log([2.0, 3.0, 4.0]) for name in own.inputs}
    with np.errstate(all="ignore"):
        value, jacobian = own.with_jacobian(theta, x)
        own.derived({p.name: p.natural(theta[:, i]) for i, p in enumerate(own.parameters)})
    shapes = np.shape(value), np.shape(jacobian)
    wanted = (2, 3), (2, len(own.parameters), 3)
    if shapes != wanted:
        raise ValueError(f"log_loss of theta {theta.shape} at 3 points has the shape {shapes[0]}, not (2, 3)")
    if not np.isfinite(value).any():
        raise ValueError("log_loss is finite at none of its starts")
    if np.isfinite(value).all() and not np.any(jacobian):
        raise ValueError("log_loss changes with no parameter; complex steps see nothing through abs or real")


def _said(error: BaseException) -> str:
    """An exception in a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
