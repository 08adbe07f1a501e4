"""Experiment files: Python files outside of any package that define SCALES and get_config(scale)."""

import importlib.util
import pathlib
import sys
import traceback
import types

from llm_jax.values import UserError, nearest


def load_experiment(place: str) -> tuple[types.ModuleType, str]:
    """The module at `FILE.py[:scale]` and its scale (the first of its `SCALES` if none is named)."""
    name, _, scale = place.partition(":")
    path = pathlib.Path(name)
    if not path.is_file() or path.suffix != ".py":
        folder = path if path.is_dir() else path.parent
        near = [str(found) for found in sorted(folder.glob("*.py"))]
        hint = nearest(name, near) if near else "name one such as experiments/isoflop.py"
        raise UserError(f"no experiment file {name!r}; {hint}")
    unique = f"{path.stem} ({path.resolve()})"
    spec = importlib.util.spec_from_file_location(unique, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module  # dataclasses look up their module's names there
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_mistake(error, path)) from error
    for needed in ("SCALES", "get_config"):
        if not hasattr(module, needed):
            raise UserError(f"{name}: an experiment file defines {needed}; see experiments/isoflop.py")
    if not module.SCALES:
        raise UserError(f"{name}: SCALES is empty; it names the scales that get_config(scale) knows")
    scale = scale or next(iter(module.SCALES))
    if scale not in module.SCALES:
        raise UserError(f"{name}: no scale {scale!r}; {nearest(scale, module.SCALES)}")
    return module, scale


def _mistake(error: Exception, path: pathlib.Path) -> str:
    """What went wrong while the file at `path` was read, and in which line of it."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if pathlib.Path(frame.filename).absolute() == path.absolute()]
    place = f"{path}, line {lines[-1]}" if lines else str(path)
    return f"{place}: {type(error).__name__}: {error}"
