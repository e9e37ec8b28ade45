"""A file that is there is whole: written under a temporary name beside it, flushed, then renamed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file or nothing."""
    with replaced(path) as file:
        file.write(data)


@contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of ``path`` when the block ends, and is gone if the block fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed left of their work on ``path``, temporary files beside it.

    Whoever calls this holds the lock under which ``path`` is written, or takes the file from a process at work.
    """
    temporary = re.compile(rf"\.{{1,2}}{re.escape(path.name)}\.\d+\.(tmp|jsonl|jsonl\.\d+\.tmp)")
    if path.parent.is_dir():
        for file in path.parent.iterdir():
            if temporary.fullmatch(file.name):
                file.unlink(missing_ok=True)
