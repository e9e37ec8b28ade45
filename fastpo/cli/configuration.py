"""YAML file and command line → ``PreferenceConfig``; a mistake is a ValueError that names the field.

Both go through the same parser, transformers' ``HfArgumentParser``: values of the YAML file first, then the
command line over them. Relative paths are relative to the current directory, wherever the file is.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import textwrap
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from fastpo.trainer import PreferenceConfig

LIKELY_TYPO = 0.65  # similarity from which a field is taken to be the one that was meant

_HEADER = """\
usage: fastpo train --config FILE.yaml [--FIELD VALUE ...]

Train a checkpoint on preference pairs. Every field below may stand in the YAML file and on the
command line, which wins; null unsets a field. Relative paths are relative to the current directory.
On several devices: accelerate launch -m fastpo.cli train --config FILE.yaml ...

  --config FILE.yaml  settings, one `field: value` per line

fields:"""


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> PreferenceConfig:
    """The settings of a run.

    Args:
        path: YAML file, a flat mapping of fields; None: the command line says it all.
        overrides: ``["--field", "value", …]``, stronger than the file; ``null`` unsets a field.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a YAML mapping; an unknown field (one of a like name is told); a value of the wrong
            type or out of range.
    """
    parser = _field_parser()
    settings = argparse.Namespace()
    if path is not None:
        _take_values(parser, _read_yaml(Path(path)), settings, str(path))
    _take_arguments(parser, _take_nulls(overrides, settings), settings, "command line")
    try:
        return PreferenceConfig(**vars(settings))
    except (TypeError, ValueError, ImportError) as error:
        raise ValueError(str(error)) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"--config: no file {str(path)!r}")
    try:
        values = _UniqueKeys(path.read_text(encoding="utf-8")).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got {_kind(values)}, expected a mapping of fields to values")
    return values


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error, where PyYAML takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ValueError(f"{key.value}: got twice, in lines {lines[key.value]} and {line}")
            lines[key.value] = line
        return super().construct_mapping(node, deep)


def _field_parser() -> HfArgumentParser:
    """Every field as an option without a default, so that parsing sets what was given and nothing else."""
    parser = HfArgumentParser(
        PreferenceConfig, add_help=False, allow_abbrev=False, exit_on_error=False
    )
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return parser


def _take_values(
    parser: HfArgumentParser, values: dict[str, Any], settings: argparse.Namespace, where: str
) -> None:
    """Put YAML values into `settings`. Scalars are parsed as text: PyYAML takes 1e-6 for a string."""
    choices = {action.dest: action.choices or () for action in parser._actions}
    scalars = []
    for name, value in values.items():
        if name not in _field_names():
            raise ValueError(f"{where}: {_unknown(str(name))}")
        if value is None or isinstance(value, dict | list):
            if not _allows(_hints()[name], type(value)):
                raise ValueError(
                    f"{where}: {name}: got {_kind(value)}, expected {_type_name(_hints()[name])}"
                )
            setattr(settings, name, value)
        else:
            # PyYAML takes an unquoted no, as in save_strategy: no, for false.
            text = "no" if value is False and "no" in choices[name] else value
            scalars.append(f"--{name}={text}")
    _take_arguments(parser, scalars, settings, where)


def _take_nulls(arguments: Sequence[str], settings: argparse.Namespace) -> list[str]:
    """Unset every field that may be None and is given as ``null``; return the other arguments."""
    others: list[str] = []
    for argument in arguments:
        if argument == "null" and others:
            argument = f"{others.pop()}=null"
        name = argument.removeprefix("--").removesuffix("=null").replace("-", "_")
        may_be_none = name in _field_names() and _allows(_hints()[name], type(None))
        if argument.endswith("=null") and may_be_none:
            setattr(settings, name, None)
        else:
            others.append(argument)
    return others


def _take_arguments(
    parser: HfArgumentParser, arguments: Sequence[str], settings: argparse.Namespace, where: str
) -> None:
    try:
        _, unknown = parser.parse_known_args(list(arguments), settings)
    except argparse.ArgumentError as error:
        field = (error.argument_name or "").split("/")[0].lstrip("-")
        raise ValueError(f"{where}: {field}: {error.message}") from error
    for name, value in vars(settings).items():
        if isinstance(value, str) and value.startswith("{") and _allows(_hints()[name], dict):
            try:
                setattr(settings, name, json.loads(value))
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: {name}: not JSON: {error}") from error
    if unknown and unknown[0].startswith("--"):
        raise ValueError(f"{where}: {_unknown(unknown[0][2:].split('=')[0].replace('-', '_'))}")
    if unknown:
        raise ValueError(f"{where}: unexpected argument {unknown[0]!r}; fields are --FIELD VALUE")


def _field_names() -> list[str]:
    return [f.name for f in dataclasses.fields(PreferenceConfig) if f.init]


@functools.cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(PreferenceConfig)


def _unknown(name: str) -> str:
    (nearest,) = difflib.get_close_matches(name, _field_names(), n=1, cutoff=0.0)
    if difflib.SequenceMatcher(None, nearest, name).ratio() < LIKELY_TYPO:
        return f"unknown field {name!r}, the nearest known one is {nearest!r} (all: fastpo train --help)"
    return f"unknown field {name!r}, did you mean {nearest!r}?"


def _allows(hint: Any, kind: type) -> bool:
    choices = typing.get_args(hint) or (hint,)
    return any((typing.get_origin(c) or c) is kind for c in (hint, *choices))


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {"dict": "a mapping", "list": "a list"}.get(type(value).__name__, repr(value))


def help_text() -> str:
    """Usage, fastpo's own fields with default and meaning, and the names of TrainingArguments' fields."""
    own, inherited = [], []
    for f in dataclasses.fields(PreferenceConfig):
        if f.name in PreferenceConfig.__annotations__:
            own.append(
                textwrap.fill(
                    f"{f.metadata['help']} [{f.default}]",
                    width=100,
                    initial_indent=f"  {f.name:<28} ",
                    subsequent_indent=" " * 31,
                )
            )
        elif f.init:
            inherited.append(f.name)
    rest = textwrap.fill(
        ", ".join(inherited), width=100, initial_indent="  ", subsequent_indent="  "
    )
    return "\n".join([_HEADER, *own, "\nfields of transformers.TrainingArguments:", rest])
