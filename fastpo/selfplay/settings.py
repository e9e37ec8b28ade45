"""A mapping of settings → a dataclass, with mistakes named."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def from_mapping(
    settings_class: type[Settings], values: Mapping[str, Any] | None, name: str
) -> Settings:
    """A dataclass from the values of a mapping.

    Args:
        settings_class: the dataclass.
        values: by field; None: all defaults. A field that is None has its default too.
        name: of the mapping, in messages.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: an unknown field (the nearest is told), or one that the class refuses.
    """
    if not isinstance(values, Mapping | None):
        raise TypeError(f"{name}: got {values!r}, expected a mapping")
    fields = {f.name: f for f in dataclasses.fields(settings_class) if f.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(settings_class)
    taken = {}
    for key, value in (values or {}).items():
        if key not in fields:
            raise ValueError(f"{name}: {unknown_field(key, fields, ', '.join(fields))}")
        if value is None and types.NoneType not in _kinds(hints[key]):
            continue  # null unsets a field
        taken[key] = _of_type(value, hints[key], f"{name}.{key}")
    missing = [
        key
        for key, f in fields.items()
        if key not in taken
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{name}: no {missing[0]!r}")
    return settings_class(**taken)


def unknown_field(key: Any, fields: Iterable[str], expected: str) -> str:
    """What to say of a field that there is not: the one that was probably meant, or what is expected."""
    close = difflib.get_close_matches(str(key), [*fields], n=1, cutoff=0.6)
    hint = f", did you mean {close[0]!r}?" if close else f"; expected some of {expected}"
    return f"unknown field {key!r}{hint}"


def _of_type(value: Any, hint: Any, name: str) -> Any:
    """``value`` if the hint allows it; a number in text, as YAML reads 1e-6, becomes one."""
    kinds = _kinds(hint)
    if value is None and types.NoneType in kinds:
        return None
    if isinstance(value, bool):
        if bool in kinds:
            return value
    elif isinstance(value, int):
        if int in kinds or float in kinds:
            return value if int in kinds else float(value)
    elif float in kinds and isinstance(value, float | str):
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, str):
        if str in kinds:
            return value
    elif isinstance(value, list | tuple):
        if tuple in kinds:
            return tuple(value)
        if list in kinds:
            return list(value)
    elif isinstance(value, Mapping) and (dict in kinds or Mapping in kinds):
        return dict(value)
    if str in kinds and isinstance(value, str):
        return value
    expected = " or ".join("null" if k is types.NoneType else k.__name__ for k in kinds)
    raise TypeError(f"{name}: got {value!r}, expected {expected}")


def _kinds(hint: Any) -> list[Any]:
    """The classes that a hint allows."""
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return [typing.get_origin(choice) or choice for choice in choices]
