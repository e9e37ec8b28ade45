"""YAML file and command line → a dataclass of settings; a mistake is a ValueError that names the field.

Both go through the same parser, transformers' ``HfArgumentParser``: values of the YAML file first, then the
command line over them. A field that holds a mapping takes JSON, or single entries as ``--field.entry value``.
Relative paths are relative to the current directory, wherever the file is.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import inspect
import json
import textwrap
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser, TrainingArguments

LIKELY_TYPO = 0.65  # similarity from which a field is taken to be the one that was meant

Config = TypeVar("Config")

_HEADER = """\
usage: fastpo {command} --config FILE.yaml [--FIELD VALUE ...]

{about} Every field below may stand in the YAML file and on the
command line, which wins; null unsets a field. Relative paths are relative to the current directory.
{further}
  --config FILE.yaml  settings, one `field: value` per line

fields:"""


def load_config(
    config_class: type[Config],
    path: str | Path | None,
    overrides: Sequence[str] = (),
    command: str = "train",
) -> Config:
    """The settings of a command.

    Args:
        config_class: the dataclass of its settings.
        path: YAML file, a flat mapping of fields; None: the command line says it all.
        overrides: ``["--field", "value", …]``, stronger than the file; ``null`` unsets a field.
        command: whose ``--help`` an error names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a YAML mapping; an unknown field (one of a like name is told); a value of the wrong
            type or out of range.
    """
    reader = _Reader(config_class, command)
    settings = argparse.Namespace()
    if path is not None:
        reader.take_values(_read_yaml(Path(path)), settings, str(path))
    rest = reader.take_entries(overrides, settings)
    reader.take_arguments(reader.take_nulls(rest, settings), settings, "command line")
    for name in reader.required:
        if not hasattr(settings, name):
            raise ValueError(f"{name}: expected a value, in the file or as --{name}")
    try:
        return config_class(**vars(settings))
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


class _Reader:
    """Puts values into a namespace that holds what was given and nothing else."""

    def __init__(self, config_class: type, command: str) -> None:
        self.command = command
        self.names = [f.name for f in dataclasses.fields(config_class) if f.init]
        self.required = [
            f.name
            for f in dataclasses.fields(config_class)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        self.hints = typing.get_type_hints(config_class)
        self.parser = HfArgumentParser(
            config_class, add_help=False, allow_abbrev=False, exit_on_error=False
        )
        for (
            action
        ) in self.parser._actions:  # without a default, so that parsing sets what was given
            action.default, action.required = argparse.SUPPRESS, False

    def take_values(self, values: dict[str, Any], settings: argparse.Namespace, where: str) -> None:
        """YAML values. Scalars are parsed as text: PyYAML takes 1e-6 for a string."""
        choices = {action.dest: action.choices or () for action in self.parser._actions}
        scalars = []
        for name, value in values.items():
            if name not in self.names:
                raise ValueError(f"{where}: {self._unknown(str(name))}")
            if value is None or isinstance(value, dict | list):
                if not _allows(self.hints[name], type(value)):
                    raise ValueError(
                        f"{where}: {name}: got {_kind(value)}, expected {_type_name(self.hints[name])}"
                    )
                setattr(settings, name, value)
            else:
                # PyYAML takes an unquoted no, as in save_strategy: no, for false.
                text = "no" if value is False and "no" in choices[name] else value
                scalars.append(f"--{name}={text}")
        self.take_arguments(scalars, settings, where)

    def take_entries(self, arguments: Sequence[str], settings: argparse.Namespace) -> list[str]:
        """``--field.entry value`` of fields that hold a mapping; returns the other arguments."""
        others: list[str] = []
        rest = iter(arguments)
        for argument in rest:
            name, equals, text = argument.removeprefix("--").partition("=")
            field, *entries = name.replace("-", "_").split(".")
            is_entry = argument.startswith("--") and entries and field in self.names
            if not is_entry or not _allows(self.hints[field], dict):
                others.append(argument)
                continue
            if not equals:
                text = next(rest, "")
                if not text:
                    raise ValueError(f"command line: {name}: expected a value")
            mapping = copy.deepcopy(getattr(settings, field, None))
            mapping = mapping if isinstance(mapping, dict) else {}
            setattr(settings, field, mapping)
            for entry in entries[:-1]:
                key = _key(entry, mapping)
                inner = mapping.get(key)
                mapping[key] = mapping = inner if isinstance(inner, dict) else {}
            mapping[_key(entries[-1], mapping)] = _scalar(text)
        return others

    def take_nulls(self, arguments: Sequence[str], settings: argparse.Namespace) -> list[str]:
        """Unset every field that may be None and is given as ``null``; return the other arguments."""
        others: list[str] = []
        for argument in arguments:
            if argument == "null" and others:
                argument = f"{others.pop()}=null"
            name = argument.removeprefix("--").removesuffix("=null").replace("-", "_")
            may_be_none = name in self.names and _allows(self.hints[name], type(None))
            if argument.endswith("=null") and may_be_none:
                setattr(settings, name, None)
            else:
                others.append(argument)
        return others

    def take_arguments(
        self, arguments: Sequence[str], settings: argparse.Namespace, where: str
    ) -> None:
        try:
            _, unknown = self.parser.parse_known_args(list(arguments), settings)
        except argparse.ArgumentError as error:
            field = (error.argument_name or "").split("/")[0].lstrip("-")
            raise ValueError(f"{where}: {field}: {error.message}") from error
        for name, value in vars(settings).items():
            holds_json = isinstance(value, str) and value.startswith("{")
            if holds_json and _allows(self.hints[name], dict):
                try:
                    setattr(settings, name, json.loads(value))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where}: {name}: not JSON: {error}") from error
        if unknown and unknown[0].startswith("--"):
            name = unknown[0][2:].split("=")[0].replace("-", "_")
            raise ValueError(f"{where}: {self._unknown(name)}")
        if unknown:
            raise ValueError(
                f"{where}: unexpected argument {unknown[0]!r}; fields are --FIELD VALUE"
            )

    def _unknown(self, name: str) -> str:
        (nearest,) = difflib.get_close_matches(name, self.names, n=1, cutoff=0.0)
        if difflib.SequenceMatcher(None, nearest, name).ratio() < LIKELY_TYPO:
            return (
                f"unknown field {name!r}, the nearest known one is {nearest!r} "
                f"(all: fastpo {self.command} --help)"
            )
        return f"unknown field {name!r}, did you mean {nearest!r}?"


def _key(entry: str, mapping: Mapping[Any, Any]) -> Any:
    """The key that is written so: YAML's keys may be numbers."""
    return next((key for key in mapping if str(key) == entry), entry)


def _scalar(text: str) -> Any:
    """A value as YAML has it, with 1e-6 a number."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _allows(hint: Any, kind: type) -> bool:
    choices = typing.get_args(hint) or (hint,)
    return any((typing.get_origin(c) or c) is kind for c in (hint, *choices))


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {"dict": "a mapping", "list": "a list"}.get(type(value).__name__, repr(value))


def help_text(config_class: type, command: str, about: str, further: str = "") -> str:
    """Usage, fastpo's own fields with default and meaning, and the names of TrainingArguments' fields."""
    own, inherited = [], []
    is_run = issubclass(config_class, TrainingArguments)
    ours = [c for c in config_class.__mro__ if c.__module__.startswith("fastpo.")]
    redefined = {name for c in ours for name in inspect.get_annotations(c)}
    for f in dataclasses.fields(config_class):
        if f.name in redefined or not is_run:
            own.append(
                textwrap.fill(
                    f"{f.metadata['help']} [{_default_text(f)}]",
                    width=100,
                    initial_indent=f"  {f.name:<28} ",
                    subsequent_indent=" " * 31,
                )
            )
        elif f.init:
            inherited.append(f.name)
    header = _HEADER.format(command=command, about=about, further=further)
    if not is_run:
        return "\n".join([header, *own])
    rest = textwrap.fill(
        ", ".join(inherited), width=100, initial_indent="  ", subsequent_indent="  "
    )
    return "\n".join([header, *own, "\nfields of transformers.TrainingArguments:", rest])


def _default_text(f: dataclasses.Field[Any]) -> Any:
    if f.default is not dataclasses.MISSING:
        return f.default
    return "required" if f.default_factory is dataclasses.MISSING else f.default_factory()
