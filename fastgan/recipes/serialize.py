"""Configs to JSON and back: frozen dataclasses of plain values, checked when read."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

ConfigT = TypeVar("ConfigT")


def to_json(config: Any) -> Any:
    """`config`, a dataclass of plain values, as JSON values."""
    if dataclasses.is_dataclass(config):
        return {
            field.name: to_json(getattr(config, field.name)) for field in dataclasses.fields(config)
        }
    if isinstance(config, tuple):
        return [to_json(item) for item in config]
    return str(config) if isinstance(config, Path) else config


def from_json(config_class: type[ConfigT], values: Any, where: str = "config") -> ConfigT:
    """The `config_class` that `to_json` turned into `values`; a missing field takes its default.

    Raises:
        ValueError: a field is unknown, required and missing, or of another type; names it.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected an object, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, config_class))}
    for name in values:
        if name not in fields:
            raise ValueError(
                f"{where}.{name}: unknown to this version of fastgan; a newer one wrote it"
            )
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in values:
            raise ValueError(f"{where}.{name}: missing")
    kinds = typing.get_type_hints(config_class)
    return config_class(
        **{name: _value(kinds[name], value, f"{where}.{name}") for name, value in values.items()}
    )


def _value(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `kind`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return from_json(typing.cast(type, kind), value, where)
    if origin in (Union, types.UnionType):  # X | None
        return None if value is None else _value(args[0], value, where)
    if origin is Literal:
        if value in args:
            return value
        raise ValueError(f"{where}: expected one of {', '.join(map(repr, args))}, got {value!r}")
    if origin is tuple and isinstance(value, list):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) == len(value):
            return tuple(
                _value(item_kind, item, f"{where}[{i}]")
                for i, (item_kind, item) in enumerate(zip(kinds, value, strict=True))
            )
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (int, bool, str) and type(value) is kind:
        return value
    raise ValueError(f"{where}: expected {getattr(kind, '__name__', kind)}, got {value!r}")
