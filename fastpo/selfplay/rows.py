"""Rows of JSONL and Parquet files, read and written one at a time: memory does not grow with their number."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from fastpo.atomic_write import replaced
from fastpo.data.json_rows import json_rows

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (*JSON_SUFFIXES, ".parquet")
CHUNK = 1024  # rows of a Parquet file held at a time

Row = dict[str, Any]


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of every row of a file, in order.

    Args:
        path: ends in ``.jsonl``, ``.ndjson``, ``.json`` (one object per line, or one array, which is read as a
            whole) or ``.parquet``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending, a line that is not a JSON object or not UTF-8, an unreadable Parquet file.
    """
    check_readable(path)
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    for where, row in json_rows(path):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
        yield where, row


def check_readable(path: Path, field: str | None = None) -> None:
    """Raise where ``path`` is no file that :func:`read_rows` takes.

    Args:
        path: of the file.
        field: the setting that names it, for messages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending.
    """
    of_field = "" if field is None else f"{field}: "
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{of_field}{path}: expected a file that ends in {', '.join(SUFFIXES)}, got {path.suffix!r}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{of_field}no file {str(path)!r}")


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    row = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=CHUNK):
                for values in batch.to_pylist():
                    yield f"{path}, row {row} (from 0)", values
                    row += 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, row {row} or later: not UTF-8: {error}") from error
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """Write rows as JSONL or, if ``path`` ends in ``.parquet``, Parquet: the whole file or nothing.

    Returns:
        How many rows that were.

    Raises:
        ValueError: another ending, or rows whose columns change type where Parquet is to hold them.
    """
    check_writable(path)
    if path.suffix == ".parquet":
        return _write_parquet(path, rows)
    count = 0
    with replaced(path) as file:
        for row in rows:
            file.write(row_line(f"{path}, row {count} (from 0)", row))
            count += 1
    return count


def check_writable(path: Path) -> None:
    """Raise ValueError where :func:`write_rows` does not write such a file."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(
            f"output: got {str(path)!r}, expected a file that ends in .jsonl or .parquet"
        )


def json_line(value: Any) -> bytes:
    """``value`` as one line of UTF-8 JSON. A number that is not finite is a ValueError: JSON has none."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def row_line(where: str, row: Row) -> bytes:
    """A row as one line of UTF-8 JSON.

    Args:
        where: names the row.
        row: its columns.

    Raises:
        ValueError: a column that JSON cannot hold (times, bytes, NaN, …); row and column are named.
    """
    try:
        return json_line(row)
    except (TypeError, ValueError):
        for name, value in row.items():
            try:
                json_line(value)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{where}: column {name!r} holds {value!r:.60} ({type(value).__name__}), expected text, a "
                    "finite number, true, false, null, or lists and mappings of them; convert or drop it"
                ) from error
        raise


def _write_parquet(path: Path, rows: Iterable[Row]) -> int:
    """In two passes, the first over JSONL beside the file: columns may be null or lacking in first rows."""
    lines = path.with_name(f".{path.name}.{os.getpid()}.jsonl")
    try:
        count = write_rows(lines, rows)
        schema = pa.schema([])
        try:
            for chunk in _chunks(lines):
                found = _table(chunk).schema
                schema = pa.unify_schemas([schema, found], promote_options="permissive")
            with replaced(path) as file, pq.ParquetWriter(file, schema) as writer:
                for chunk in _chunks(lines):
                    writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
        except pa.ArrowException as error:
            raise ValueError(
                f"{path}: a column changes its type from row to row: {error}"
            ) from error
        return count
    finally:
        lines.unlink(missing_ok=True)


def _table(rows: list[Row]) -> Any:
    """With the columns of all rows, where ``Table.from_pylist`` takes those of the first."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def _chunks(path: Path) -> Iterator[list[Row]]:
    rows = (row for _, row in read_rows(path))
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def draw_rows(
    rows: Callable[[], Iterator[Row]], count: int, seed: int
) -> tuple[Iterator[Row], int]:
    """``count`` rows drawn at random, in their order, and how many there are in all.

    ``rows`` is walked twice: once to draw (reservoir sampling, which holds ``count`` numbers), once to read.
    """
    draw = random.Random(seed)
    chosen: list[int] = []
    total = 0
    for _ in rows():
        if total < count:
            chosen.append(total)
        else:
            place = draw.randrange(total + 1)
            if place < count:
                chosen[place] = total
        total += 1
    kept = set(chosen)
    return (row for k, row in enumerate(rows()) if k in kept), total
