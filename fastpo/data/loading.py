"""Rows from a file, a directory or the Hub, as a `datasets.Dataset`; bad input is named exactly."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from fastpo.data.formats import (
    COLUMNS,
    EXAMPLE_COLUMNS,
    Message,
    check_columns,
    check_example_columns,
    read_columns,
    read_example_columns,
)
from fastpo.data.json_rows import json_rows

_JSON = (".jsonl", ".ndjson", ".json")
_SUFFIXES = (*_JSON, ".parquet")
_SPLIT_FILE = re.compile(r"((train|test|validation|valid|val|eval|dev)(_[A-Za-z0-9_]+)?)(?=[-.]|$)")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class _Kind(NamedTuple):
    """What the rows of a data set are."""

    columns: tuple[str, ...]  # all that matter
    check: Callable[[list[str], str], None]  # of the columns' names
    read: Callable[[Mapping[str, Any], str], tuple[Any, ...]]  # texts of a row in their normal form
    texts: tuple[str, ...]  # their names
    required: tuple[str, ...]  # columns of which no row may have null


_PAIRS = _Kind(
    COLUMNS, check_columns, read_columns, ("prompt", "chosen", "rejected"), ("chosen", "rejected")
)
_EXAMPLES = _Kind(
    EXAMPLE_COLUMNS, check_example_columns, read_example_columns, ("prompt", "completion"), ()
)


def load_preferences(source: str | Path, *, split: str | None = None) -> datasets.Dataset:
    """Rows of a preference data set, with the columns of ``fastpo.data.formats.COLUMNS`` that it has.

    Args:
        source: one of

            - a ``.jsonl``, ``.ndjson`` or ``.json`` file: one object per line, or one array of objects;
            - a ``.parquet`` file;
            - a directory that `datasets` saved (``save_to_disk``);
            - a directory of such files, at any depth. Files named after a split (``train.jsonl``,
              ``test_prefs-00000-of-00001.parquet``) belong to it, all others to ``train``; a split's files
              are joined in the order of their paths;
            - the name of a data set on the Hugging Face Hub.
        split: which split; None takes the only one, or ``train`` where there are several. One file is the
            split ``train``.

    Returns:
        The data set. Every row of the source is in it, in order (blank lines of a JSON file are no rows).

    Raises:
        FileNotFoundError: there is no such file, directory or Hub data set; the nearest name is given.
        ValueError: a line is not JSON, or a row has no ``chosen`` or ``rejected`` or one of the wrong type (the
            file and its line or row are named); an unknown file type, an unreadable file or an unknown split.
    """
    return _load(source, split, _PAIRS)


def load_examples(source: str | Path, *, split: str | None = None) -> datasets.Dataset:
    """Examples for supervised fine-tuning: ``messages``, or ``prompt`` and ``completion``.

    Arguments, result and errors are those of :func:`load_preferences`, with the columns of
    ``fastpo.data.formats.EXAMPLE_COLUMNS``. ``messages`` of a JSON file become ``prompt`` and ``completion``,
    the last message.
    """
    return _load(source, split, _EXAMPLES)


def _load(source: str | Path, split: str | None, kind: _Kind) -> datasets.Dataset:
    path = Path(source).expanduser()
    if path.is_file():
        return _choose(str(source), {"train": lambda: _read_file(path, kind)}, split)
    if path.is_dir():
        return _read_directory(path, split, kind)
    name = str(source)
    has_parent = path.parent not in (Path("."), Path("/")) and path.parent.exists()
    looks_local = has_parent or path.suffix in _SUFFIXES
    if looks_local or not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"no file or directory {name!r}{_nearest(path)}")
    try:
        loaded = datasets.load_dataset(name, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        nearest = _nearest(path) if path.parent.is_dir() else ""
        raise FileNotFoundError(
            f"no file or directory {name!r}{nearest}; and the Hub did not give a data set of that "
            f"name: {error}"
        ) from error
    return _from_datasets(loaded, name, None, kind)


def _nearest(path: Path) -> str:
    """'; nearest: …', or which directory is missing, or nothing."""
    parent = path.parent
    if not parent.is_dir():
        return f"; there is no directory {str(parent)!r}"
    names = [entry.name for entry in parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; the nearest name there is {str(parent / close[0])!r}" if close else ""


def _choose(
    where: str, splits: dict[str, Callable[[], datasets.Dataset]], split: str | None
) -> datasets.Dataset:
    if split is None:
        split = next(iter(splits)) if len(splits) == 1 else "train"
        if split not in splits:
            raise ValueError(f"split: {where} has {sorted(splits)}; say which one")
    if split not in splits:
        raise ValueError(f"split: {where} has {sorted(splits)}, got {split!r}")
    return splits[split]()


def _read_directory(path: Path, split: str | None, kind: _Kind) -> datasets.Dataset:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _from_datasets(datasets.load_from_disk(str(path)), str(path), split, kind)
    files: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path)
        hidden = any(part.startswith(".") for part in inside.parts)
        if file.suffix not in _SUFFIXES or hidden or file.name.startswith("dataset_info"):
            continue
        named = _SPLIT_FILE.match(file.stem) or _SPLIT_FILE.fullmatch(file.parent.name)
        files.setdefault(named[1] if named else "train", []).append(file)
    if not files:
        raise FileNotFoundError(
            f"directory {str(path)!r} holds no file that ends in {', '.join(_SUFFIXES)}"
        )

    def joined(group: list[Path]) -> Callable[[], datasets.Dataset]:
        return lambda: datasets.concatenate_datasets([_read_file(file, kind) for file in group])

    return _choose(str(path), {name: joined(group) for name, group in files.items()}, split)


def _from_datasets(
    loaded: datasets.Dataset | datasets.DatasetDict, where: str, split: str | None, kind: _Kind
) -> datasets.Dataset:
    if not isinstance(loaded, datasets.DatasetDict):
        loaded = datasets.DatasetDict({str(loaded.split or "train"): loaded})

    def checked(dataset: datasets.Dataset) -> Callable[[], datasets.Dataset]:
        return lambda: _checked(dataset, where, kind)

    return _choose(where, {str(name): checked(dataset) for name, dataset in loaded.items()}, split)


def _read_file(path: Path, kind: _Kind) -> datasets.Dataset:
    if path.suffix in _JSON:
        return _read_json(path, kind)
    if path.suffix != ".parquet":
        raise ValueError(
            f"{path}: expected a file that ends in {', '.join(_SUFFIXES)}, got {path.suffix!r}"
        )
    try:  # read here: `datasets` would first copy the file, with all its columns, into its cache
        names = pq.read_schema(path).names
        table = pq.read_table(path, columns=[name for name in kind.columns if name in names])
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error
    kind.check(names, str(path))
    return _checked(datasets.Dataset(table), str(path), kind)


def _checked(dataset: datasets.Dataset, where: str, kind: _Kind) -> datasets.Dataset:
    """The columns that matter; every row has those that are required."""
    kind.check(dataset.column_names, where)
    dataset = dataset.select_columns(
        [name for name in kind.columns if name in dataset.column_names]
    )
    if not len(dataset):
        raise ValueError(f"{where}: no rows")
    table = dataset.with_format("arrow")[:]
    for name in kind.required:
        nulls = table[name].is_null().to_numpy()
        if nulls.any():
            raise ValueError(f"{where}, row {nulls.argmax()} (from 0): no {name!r}")
    return dataset


def _read_json(path: Path, kind: _Kind) -> datasets.Dataset:
    """JSON read here rather than by `datasets`: exact places in errors, and other columns cannot clash."""
    columns: dict[str, list[Any]] = {
        name: [] for name in (*kind.texts, "tools", "chat_template_kwargs")
    }
    first: tuple[str, Any] | None = None
    for where, row in json_rows(path):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
        texts = kind.read(row, where)
        kinds = (type(texts[0]), type(texts[1]))
        first = first or (where, kinds)
        if kinds != first[1]:
            raise ValueError(
                f"{where}: {' and '.join(kind.texts[:2])} are {_kinds(kinds)}, but {_kinds(first[1])} in "
                f"{first[0]}; a file holds one format"
            )
        values = {
            **dict(zip(kind.texts, texts, strict=True)),
            # schemas differ from row to row, Arrow's structs do not: tools stay JSON text
            "tools": _as_json(row.get("tools")),
            "chat_template_kwargs": row.get("chat_template_kwargs"),
        }
        for name, value in values.items():
            columns[name].append(_storable(value) if isinstance(value, list) else value)
    if first is None:
        raise ValueError(f"{path}: no rows")
    used = {name: values for name, values in columns.items() if any(v is not None for v in values)}
    try:
        return datasets.Dataset.from_dict(used)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(
            f"{path}: the messages' fields change type from row to row: {error}"
        ) from error


def _kinds(kinds: tuple[type, type]) -> str:
    names = {str: "text", list: "messages", type(None): "absent"}
    return " and ".join(names[kind] for kind in kinds)


def _storable(messages: list[Message]) -> list[Message]:
    """Tool calls' arguments as JSON text, since their fields and types differ from call to call."""
    for message in messages:
        for call in message.get("tool_calls") or ():
            function = call.get("function", call)
            if "arguments" in function:
                function["arguments"] = _as_json(function["arguments"])
    return messages


def _as_json(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)
