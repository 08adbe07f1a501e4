"""Typed configs: frozen dataclasses, tagged unions, overrides, JSON round trip, identity.

A config is a frozen dataclass whose fields are int, float, bool, str, Literal, Optional, tuple, another
config, or a tagged union. A union's root derives from `Tagged`; its members are registered where they
are written, so a new model or optimizer is one file:

    class Model(Tagged): ...

    @dataclasses.dataclass(frozen=True)
    class Transformer(Model, kind="transformer"):
        layers: int = 4

How the command line names one, and changes it, is in command_line.py.
"""

import dataclasses
import hashlib
import json
import shlex
import typing
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from llm_jax import values
from llm_jax.values import UserError, nearest


class Tagged:
    """Root of a tagged union: a value's class is chosen by its `kind`."""

    kind: ClassVar[str]
    root: ClassVar[type["Tagged"]]
    members: ClassVar[dict[str, type]]

    def __init_subclass__(cls, kind: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Tagged in cls.__bases__:
            cls.root, cls.members = cls, {}
        if kind is not None:
            known = cls.members.get(kind)
            if known is not None and (known.__module__, known.__qualname__) != (
                cls.__module__,
                cls.__qualname__,
            ):
                raise TypeError(f"{cls.root.__name__} has a member {kind!r} already: {known.__qualname__}")
            cls.kind = kind
            cls.members[kind] = cls

    @classmethod
    def parse(cls, text: str) -> "Tagged":
        """What `--config.field=text` stands for; a root may also accept paths or short forms."""
        return member(cls, text)()

    @classmethod
    def choices(cls) -> list[str]:
        """What `parse` accepts, in words."""
        return list(cls.members)


def member(root: type[Tagged], kind: str) -> type:
    """The member of the union `root` that `kind` names; raises UserError with the nearest name."""
    if kind not in root.members:
        what = root.root.__name__.lower().removesuffix("config")
        raise UserError(f"no {what} {kind!r}; {nearest(kind, root.members)}")
    return root.members[kind]


def outside_identity(default: Any, **kwargs: Any) -> Any:
    """A field that is recorded but says nothing about the result: places, labels, how it is executed."""
    if dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: default, metadata={"identity": False}, **kwargs)
    return dataclasses.field(default=default, metadata={"identity": False}, **kwargs)


def replace(config: Any, path: str, value: Any) -> Any:
    """A copy of `config` with the field at the dotted `path` set to `value`."""
    head, _, rest = path.partition(".")
    if isinstance(config, tuple):
        index = _index(config, head, path)
        item = replace(config[index], rest, value) if rest else value
        return (*config[:index], item, *config[index + 1 :])
    _field_type(config, head)
    item = replace(getattr(config, head), rest, value) if rest else value
    return dataclasses.replace(config, **{head: item})


def override(config: Any, path: str, text: str) -> Any:
    """`--config.path=text` applied: `text` is read as the type of the field it sets.

    Raises UserError for an unknown field (with the nearest name) and for a value of the wrong type.
    """
    parent_path, _, name = path.rpartition(".")
    parent, typed = config, f"config.{path}"
    for part in parent_path.split(".") if parent_path else ():
        if isinstance(parent, tuple):
            parent = parent[_index(parent, part, path)]
        else:
            _field_type(parent, part)
            parent = getattr(parent, part)
        if not (dataclasses.is_dataclass(parent) or isinstance(parent, tuple)):
            raise UserError(f"{typed}: {part} is {parent!r} and has no fields")
    if name == "kind" and isinstance(parent, Tagged):
        return replace(config, parent_path, _change_kind(parent, text))
    if isinstance(parent, tuple):
        return replace(config, path, values.parse(type(parent[_index(parent, name, path)]), text, typed))
    annotation, value = _field_type(parent, name), getattr(parent, name)
    if isinstance(value, Tagged) and text in value.members:
        return replace(config, path, _change_kind(value, text))
    return replace(config, path, values.parse(annotation, text, typed))


def listing(config: Any, path: str = "config") -> Iterator[tuple[str, str]]:
    """("--config.field=value", what else it may be) for every field of `config` and of the configs in it."""
    for name, annotation in values.hints(type(config)).items():
        value, place = getattr(config, name), f"{path}.{name}"
        parts = value if isinstance(value, tuple) else ()
        if isinstance(value, Tagged):
            yield f"--{place}={value.kind}", f"one of {', '.join(value.root.choices())}"
        elif not dataclasses.is_dataclass(value) and not any(map(dataclasses.is_dataclass, parts)):
            yield f"--{place}={shlex.quote(values.write(value))}", values.say(annotation)
        if dataclasses.is_dataclass(value):
            yield from listing(value, place)
        for index, part in enumerate(parts):
            if dataclasses.is_dataclass(part):
                yield from listing(part, f"{place}.{index}")


def to_json(config: Any) -> Any:
    """Plain JSON values; members of a union carry their `kind`."""
    if dataclasses.is_dataclass(config):
        tag = {"kind": config.kind} if isinstance(config, Tagged) else {}
        return tag | {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return [to_json(item) for item in config] if isinstance(config, tuple) else config


def from_json(annotation: Any, value: Any, path: str = "config") -> Any:
    """The config of type `annotation` that `to_json` wrote; raises UserError where it doesn't fit."""
    options = values.options(annotation)
    if value is None and type(None) in options:
        return None
    for option in options:
        if dataclasses.is_dataclass(option) or (isinstance(option, type) and issubclass(option, Tagged)):
            value = dict(value) if isinstance(value, Mapping) else value
            if not isinstance(value, dict):
                raise UserError(f"{path}: expected fields of {option.__name__}, got {value!r}")
            if issubclass(option, Tagged):
                option = member(option, str(value.pop("kind", getattr(option, "kind", None))))
            kinds = values.hints(option)
            for name in value:
                if name not in kinds:
                    suggestion = nearest(name, kinds)
                    raise UserError(f"{path}: no field {name!r} in {option.__name__}; {suggestion}")
            return option(**{k: from_json(kinds[k], v, f"{path}.{k}") for k, v in value.items()})
        if typing.get_origin(option) is tuple:
            return tuple(
                from_json(t, v, path) for t, v in zip(values.items(option, value), value, strict=True)
            )
    return values.coerce(annotation, value, path)


def check(config: Any, path: str = "config") -> None:
    """Raises UserError at the first field of the wrong type or the first rule that is broken.

    A config states its rules across fields in `validate()`; they are checked here, once, after all
    overrides, so that fields that must change together can.
    """
    for name, annotation in values.hints(type(config)).items():
        value = getattr(config, name)
        values.coerce(annotation, value, f"{path}.{name}")
        for index, item in enumerate(value if isinstance(value, tuple) else (value,)):
            if dataclasses.is_dataclass(item):
                check(item, f"{path}.{name}.{index}" if isinstance(value, tuple) else f"{path}.{name}")
    if hasattr(config, "validate"):
        config.validate()


def scientific(config: Any, content: bool = True) -> Any:
    """What decides a result: the fields that differ from their defaults, as JSON values.

    Fields marked `outside_identity` are left out. A config whose meaning lies in files adds their hashes
    by a method `fingerprint() -> dict`; `content=False` leaves those out (to compare across machines).
    """
    if isinstance(config, tuple):
        return [scientific(item, content) for item in config]
    if not dataclasses.is_dataclass(config):
        return config
    out: dict[str, Any] = {"kind": config.kind} if isinstance(config, Tagged) else {}
    kinds = values.hints(type(config))
    for field in dataclasses.fields(config):
        value = values.coerce(kinds[field.name], getattr(config, field.name), field.name)
        if field.metadata.get("identity", True) and value != _default(field):
            out[field.name] = scientific(value, content)
    return out | (config.fingerprint() if content and hasattr(config, "fingerprint") else {})


def identity(config: Any, schema: int, content: bool = True) -> str:
    """Twelve hexadecimal digits that are equal for two configs exactly if they ask for the same result."""
    text = json.dumps({"schema": schema, "config": scientific(config, content)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# ---- fields ----


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def _field_type(config: Any, name: str) -> Any:
    kinds = values.hints(type(config))
    if name not in kinds:
        raise UserError(f"no field {name!r} in {type(config).__name__}; {nearest(name, kinds)}")
    return kinds[name]


def _index(items: tuple, text: str, path: str) -> int:
    if not text.isdigit() or int(text) >= len(items):
        raise UserError(f"config.{path}: {text!r} is no index into a tuple of {len(items)}")
    return int(text)


def _change_kind(config: Tagged, kind: str) -> Tagged:
    """The member `kind` of the union that `config` belongs to, with what was set of the fields both have.

    A field of another default means another thing (AdamW's rate isn't Lion's), and what it was set to stays
    behind.
    """
    cls = member(type(config), kind)
    theirs = {field.name: _default(field) for field in dataclasses.fields(cls)}
    ours = {field.name: _default(field) for field in dataclasses.fields(config)}
    shared = [name for name, default in theirs.items() if name in ours and ours[name] == default]
    return cls(**{name: getattr(config, name) for name in shared})
