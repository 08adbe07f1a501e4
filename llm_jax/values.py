"""Values of typed fields: which values are of a type, and how they are read from and written as text."""

import ast
import dataclasses
import difflib
import functools
import itertools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

# The exit code that asks to be started again: it ended for a reason that isn't the run's (EX_TEMPFAIL).
AGAIN = 75

LEASE = 60.0  # seconds without a sign after which a process is taken for dead: claims.py


class UserError(ValueError):
    """What a user got wrong, in one line that names it and says what would be right (exit code 2)."""


def nearest(name: str, names: Sequence[str] | Mapping[str, Any]) -> str:
    """What to say of a `name` that doesn't exist: the nearest of `names`, or all of them."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names) or 'none'}"


def check_least(config: Any, room: str, positive: Sequence[str] = (), **least: float) -> None:
    """Raises UserError at the first field below its `least`, or of `positive` ones not positive and finite.

    room: where `config` stands, as it is typed (with its dot). A field that is None has no such rule.
    """
    rules = {name: (f"at least {low}", low, math.inf) for name, low in least.items()}
    rules |= {
        name: ("a positive number", math.nextafter(0, 1), math.nextafter(math.inf, 0)) for name in positive
    }
    for name, (words, low, high) in rules.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"{room}{name} is {write(value)}; it is {words}")


# ---- types ----


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields, also where its file postpones them to strings."""
    found = typing.get_type_hints(cls)
    return {field.name: found[field.name] for field in dataclasses.fields(cls)}


def options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def items(annotation: Any, value: Sequence) -> tuple[Any, ...]:
    """The type of each item of a tuple field."""
    args = typing.get_args(annotation)
    return (args[0],) * len(value) if len(args) == 2 and args[1] is Ellipsis else args


def say(annotation: Any) -> str:
    """A type in words."""
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(annotation)))
    if len(options(annotation)) > 1:
        return " or ".join(say(option) for option in options(annotation))
    if typing.get_origin(annotation) is tuple:
        return _say_tuple(typing.get_args(annotation))
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "none"}
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _say_tuple(items_: tuple[Any, ...]) -> str:
    """A tuple in words: how many of what."""
    if len(items_) == 2 and items_[1] is Ellipsis:
        return f"a tuple such as (a, b), each {say(items_[0])}"
    return f"a tuple ({', '.join(map(say, items_))})"


def coerce(annotation: Any, value: Any, path: str) -> Any:
    """`value` if it is of the type `annotation` (an integer where a float is asked for becomes one)."""
    for option in options(annotation):
        origin = typing.get_origin(option)
        if origin is Literal and value in typing.get_args(option):
            return value
        if origin is tuple and isinstance(value, tuple):
            types_ = items(option, value)
            if len(types_) == len(value):
                return tuple(coerce(t, v, path) for t, v in zip(types_, value, strict=True))
        if option is float and type(value) is int:
            return float(value)
        if type(value) is bool and option is not bool:
            continue
        if isinstance(option, type) and isinstance(value, option):
            return value
    raise UserError(f"{path}: {value!r} is not {say(annotation)}")


# ---- text ----


def parse(annotation: Any, text: str, path: str) -> Any:
    """`text` as a value of the type `annotation`, typed at `path`; a class may have its own `parse`."""
    for option in options(annotation):
        if option is type(None) and text.lower() == "none":
            return None
        if option is bool and text.lower() in ("true", "false", "1", "0"):
            return text.lower() in ("true", "1")
        if option in (int, float):
            value = number(text)
            if value is not None and (option is float or (math.isfinite(value) and value == int(value))):
                return option(value)
        if typing.get_origin(option) is Literal:
            for choice in typing.get_args(option):
                if str(choice) == text:
                    return choice
        if typing.get_origin(option) is tuple:
            parts = _parts(text)
            kinds = items(option, parts)
            if len(kinds) == len(parts):
                return tuple(parse(t, part.strip("'\""), path) for t, part in zip(kinds, parts, strict=True))
        if hasattr(option, "parse"):
            return option.parse(text)
        if option is str:
            return text
    raise UserError(f"{path}: {text!r} is not {say(annotation)}")


def write(value: Any) -> str:
    """The inverse of `parse`."""
    if isinstance(value, tuple):
        return f"({', '.join(map(write, value))}{',' * (len(value) == 1)})"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _parts(text: str) -> list[str]:
    """The items of "(a, b)" or "a, b"; items may be tuples themselves."""
    text = text.strip()
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and _depths(text)[:-1].count(0) == 0:
        text = text[1:-1]
    depths, parts, start = _depths(text), [], 0
    for place in [i for i, sign in enumerate(text) if sign == "," and depths[i] == 0] + [len(text)]:
        parts.append(text[start:place].strip())
        start = place + 1
    return [part for part in parts if part]


def _depths(text: str) -> list[int]:
    """How many brackets are open after each character."""
    return list(itertools.accumulate((sign in "([") - (sign in ")]") for sign in text))


def number(text: str) -> float | int | None:
    """A Python number such as 12, 3e-3 or 1_000; infinities are written inf."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = float(text) if text.lower().lstrip("+-") in ("inf", "infinity") else None
    return value if type(value) in (int, float) else None
