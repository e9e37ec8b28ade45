"""Rows of a JSON or JSONL file, one at a time, with the place of each and of each mistake."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEAD = 4096  # bytes that tell lines from one array


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, value) of every row: of one array, or of one line each. Blank lines are no rows.

    Raises:
        ValueError: a line that is not JSON, or not UTF-8; it is named.
    """
    with path.open("rb") as file:
        head = file.read(HEAD).removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(0)
        if head.startswith(b"[") and not _is_line_of_others(path, head):
            rows = _parse(file.read(), str(path), 1)
            yield from ((f"{path}, row {k} (from 0)", row) for k, row in enumerate(rows))
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", _parse(line.rstrip(), str(path), number)


def _is_line_of_others(path: Path, head: bytes) -> bool:
    """Whether a file of lines begins with one that holds an array of something else than objects."""
    line, end, _ = head.partition(b"\n")
    if path.suffix not in (".jsonl", ".ndjson") or not (end or len(head) < HEAD):
        return False
    try:
        values = json.loads(line)
    except ValueError:
        return False
    return not all(isinstance(value, dict) for value in values)


def _parse(text: bytes, path: str, line: int) -> Any:
    try:
        value = json.loads(text.decode("utf-8-sig"), object_hook=_call_with_text_arguments)
        if b"\\ud" in text.lower():  # an escaped half of a surrogate pair is valid JSON but no text
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise ValueError(
            f"{path}, line {line}: not valid JSON: {error.msg} at column {error.colno}"
        ) from error
    except UnicodeError as error:
        raise ValueError(f"{path}, line {line}: not valid UTF-8 text: {error}") from error


def _call_with_text_arguments(value: dict[str, Any]) -> dict[str, Any]:
    """As JSON text a call's arguments keep their own nulls, which read_columns takes for Arrow's."""
    if isinstance(value.get("name"), str) and isinstance(value.get("arguments"), dict):
        value["arguments"] = json.dumps(value["arguments"])
    return value
