"""The command line of all commands: `--config=FILE.py[:scale]`, `--config.a.b=value`, errors in one line.

    python -m launch.local --config=experiments/isoflop.py:smoke --config.optimizer.learning_rate=3e-3

`--config` picks an experiment file, and an override sets any field of what its `get_config(scale)` returns.
"""

import dataclasses
import errno
import os
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app, flags, logging

from llm_jax import values
from llm_jax.config import check, listing, override
from llm_jax.experiment_file import load_experiment
from llm_jax.values import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What the command line asked for: the experiment's module, its scale, and the overridden config."""

    module: types.ModuleType
    scale: str
    config: Any
    overrides: tuple[tuple[str, str], ...]


# What Python says of a write without the file's name, and which is never the program's fault.
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
_overrides: list[tuple[str, str]] = []
_help: list[str] = []


def define_config() -> None:
    """The flags of a command that an experiment is given to: --config, --config.a.b=value."""
    flags.DEFINE_string(
        "config",
        None,
        "experiment FILE.py[:scale], for example experiments/isoflop.py:smoke; --config.a.b=value sets a "
        "field, --config.help lists all fields and what they may be, --config.a.help those of a",
    )


def chosen() -> Chosen:
    """The experiment and config that `--config` and `--config.a.b=value` name.

    With --config.help their fields are printed instead, as they stand after the overrides.
    """
    if flags.FLAGS.config is None:
        raise UserError("--config is missing, for example --config=experiments/isoflop.py:smoke")
    module, scale = load_experiment(flags.FLAGS.config)
    config = module.get_config(scale)
    if not dataclasses.is_dataclass(config):
        raise UserError(f"{module.__file__}: get_config({scale!r}) returned {config!r}, not a config")
    for number, (path, text) in enumerate(_overrides):
        changed = path.removesuffix(".kind")
        if late := next((early for early, _ in _overrides[:number] if early.startswith(f"{changed}.")), None):
            raise UserError(f"--config.{path}={text} comes before --config.{late}, which is a field of it")
        try:
            config = override(config, path, text)
        except UserError as error:
            raise UserError(f"{error}{_out_of_order(path)}") from None
    if _help:
        for place in _help:
            _print_fields(config, place)
        sys.exit(0)
    check(config)
    return Chosen(module, scale, config, tuple(_overrides))


def _out_of_order(path: str) -> str:
    """A hint where the kind that may have the field at `path` is chosen only after it."""
    places = [place for place, _ in _overrides]
    for place, text in _overrides[places.index(path) + 1 :]:
        if path.startswith(f"{place.removesuffix('.kind')}."):
            return f" (--config.{place}={text} comes first, then its fields)"
    return ""


def _print_fields(config: Any, place: str) -> None:
    """The listing of `config`, or of what stands at `place` in it."""
    start = f"--config.{place}".rstrip(".")
    rows = [row for row in listing(config) if row[0].startswith((f"{start}=", f"{start}."))]
    if not rows:
        known = [flag.partition("=")[0].removeprefix("--config.") for flag, _ in listing(config)]
        raise UserError(f"no field {place!r}; {nearest(place, known)}")
    width = min(60, max(len(flag) for flag, _ in rows))
    for flag, words in rows:
        print(f"{flag:<{width}}  {words}")


def parse_flags(argv: Sequence[str], elsewhere: Mapping[str, str]) -> list[str]:
    """absl's parser, with `--config.a.b=value` (or `--config.a.b value`) taken out first."""
    rest, items = [], iter(argv)
    for item in items:
        if "config" not in flags.FLAGS or not re.match("--?config[.]", item):
            rest.append(item)
            continue
        path, given, text = item.lstrip("-").removeprefix("config.").partition("=")
        if not given and path.rpartition(".")[2] == "help":
            _help.append(path.rpartition(".")[0])
            continue
        if not given:
            text = next(items, "--")
            if text.startswith("-") and values.number(text) is None:  # the flag behind it
                raise UserError(f"{item} needs a value: {item}=VALUE")
        _overrides.append((path, text))
    try:
        left = flags.FLAGS(rest)
    except SystemExit:  # --help has been printed, which absl takes for a failure
        sys.exit(0)
    except flags.Error as error:
        raise UserError(_plainly(error, elsewhere)) from None
    if len(left) > 1:
        raise UserError(f"unexpected argument {left[1]!r}; flags are written --name=value")
    return left


def _plainly(error: flags.Error, elsewhere: Mapping[str, str]) -> str:
    """absl's complaint in plain words."""
    if isinstance(error, flags.UnrecognizedFlagError):
        name = error.flagname
        if name in elsewhere:
            return f"no flag --{name} here; it belongs to {elsewhere[name]}"
        if "." in name and "config" in flags.FLAGS:
            field = name.partition(".")[2] if name.startswith("con") else name
            return f"no flag --{name}; did you mean '--config.{field}'?"
        return f"no flag --{name}; {nearest(name, [f'--{flag.name}' for flag in _own_flags()])}"
    text = " ".join(str(error).split())
    if missing := re.fullmatch(r"Missing value for flag (--\w+)", text):
        return f"{missing[1]} needs a value: {missing[1]}=VALUE"
    given, _, why = text.removeprefix("flag ").partition(": ")
    if not given.startswith("--"):
        return text
    if "Non-boolean" in why:
        return f"{given} is neither true nor false"
    number = "invalid literal" in why or "could not convert" in why
    wanted = "an integer" if "int()" in why else "a number"
    return f"{given} is not {wanted}" if number else f"{given}: {why}"


def _own_flags() -> list[flags.Flag]:
    """The flags of this command, without those of libraries."""
    ours, modules = (sys.argv[0], "llm_jax.", "launch."), flags.FLAGS.flags_by_module_dict().items()
    return [flag for module, defined in modules if module.startswith(ours) for flag in defined]


def run_main(main: Callable[[], int | None], elsewhere: Mapping[str, str] | None = None) -> None:
    """Runs a command: parses the flags, and turns a UserError into one line and exit code 2.

    elsewhere: flags that a user may take for this command's, and which command has them.
    """

    def guarded(function: Callable, *args: Any) -> Any:
        try:
            result = function(*args)
            sys.stdout.flush()
            return result
        except BrokenPipeError:  # whoever read the output has left, as head does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        except OSError as error:
            if error.filename is None and error.errno not in _OF_DISKS:
                raise
            print(f"error: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:  # while modules load, llm_jax/__init__.py says it
            print("stopped", file=sys.stderr)
            sys.exit(130)

    for flag in _own_flags():  # or --help leaves out those that other files define
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    logging.set_verbosity(logging.WARNING)  # JAX tells of every kind of device that it did not find
    app.run(lambda _: guarded(main), flags_parser=lambda argv: guarded(parse_flags, argv, elsewhere or {}))
