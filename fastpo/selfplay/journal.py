"""The journal of an unfinished stage: its finished rows, one line each, in ``X.jsonl.partial/``.

Beside it lies the stage's identity: what was begun with other settings is refused, unless nothing was finished.
A line that was cut short by a kill is cut off; all others stay done. Of a row that is done twice (its batch was
made again as a whole) the last line counts, with what was counted on the way to it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from fastpo.atomic_write import write_atomically

from .manifest import differences
from .rows import Row, json_line

SYNC_SECONDS = 5.0  # between two flushes of the journal to the disk


class Journal:
    """Results on disk; in memory 8 bytes a row, where its line is. A context, which holds the output's lock.

    Args:
        output: of the stage.
        identity: of the stage.
        inputs: files by name, for messages.

    Raises:
        ValueError: on entering: another process is at work on the output, or it was begun with other inputs or
            settings and rows are finished.
    """

    def __init__(
        self, output: Path, identity: dict[str, Any], inputs: Mapping[str, Path] | None = None
    ) -> None:
        self.directory = partial_of(output)
        self.output, self.identity, self.inputs = output, identity, inputs or {}
        self.done = 0
        self._places = array("q")
        self._synced = 0.0

    def __enter__(self) -> Journal:
        self._lock = lock(self.directory / "lock", self.output)
        try:
            self._file = (self.directory / "journal.jsonl").open("a+b")
            self._claim()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._lock.close()

    def _claim(self) -> None:
        file = self.directory / "identity.json"
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else self.identity
        self._file.seek(0)
        if _entry(self._file.readline()) is not None:
            remedy = f"another output (or delete the directory {self.directory} to begin anew)"
            refuse_other(self.directory, before, self.identity, self.inputs, remedy)
        if before != self.identity or not file.is_file():
            write_atomically(file, json_line(self.identity))

    def load(self, total: int) -> None:
        """Read what is done of ``total`` rows; cut off what a kill left of a line."""
        self._places = array("q", [-1]) * total
        self._file.seek(0)
        place = 0
        for line in self._file:
            entry = _entry(line)
            if entry is None or entry["i"] >= total:
                break
            self._note(entry["i"], place)
            place += len(line)
        self._file.truncate(place)
        self._file.seek(0, os.SEEK_END)

    def has(self, number: int) -> bool:
        """Whether the row of that number is done."""
        return self._places[number] >= 0

    def add(
        self, number: int, columns: Row | None, dropped: str | None, counts: Mapping[str, int]
    ) -> None:
        """Append a row's result: new columns, or why it is left out; and what was counted on the way."""
        entry = {"i": number, **({"r": columns} if dropped is None else {"d": dropped})}
        if counts:
            entry["c"] = dict(counts)
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(json_line(entry))
        self._file.flush()  # a kill of the process loses nothing from here on
        now = time.monotonic()
        if now - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = now
        self._note(number, place)

    def entry(self, number: int) -> tuple[Row | None, str | None, dict[str, int]]:
        """What was added last of a row that is done: columns, reason, counts."""
        self._file.seek(self._places[number])
        entry = json.loads(self._file.readline())
        return entry.get("r"), entry.get("d"), entry.get("c", {})

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def _note(self, number: int, place: int) -> None:
        self.done += self._places[number] < 0
        self._places[number] = place


def partial_of(output: Path) -> Path:
    """The directory of an output that is being made."""
    return output.with_name(output.name + ".partial")


def refuse_other(
    output: Path,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    inputs: Mapping[str, Path],
    remedy: str,
) -> None:
    """Raise where two identities differ.

    Args:
        output: what was made, or begun.
        before, now: its identity and the one that is wanted.
        inputs: the stage's files by name.
        remedy: what the user may do, but for coming with the same.

    Raises:
        ValueError: the differences are listed.
    """
    changed = differences(before, now, files=inputs)
    if changed:
        raise ValueError(
            f"output: {output} was made with other inputs or settings ({'; '.join(changed)}); expected the "
            f"same, or {remedy}"
        )


def lock(path: Path, output: Path, field: str = "output") -> IO[str]:
    """An open file that no other process has locked; closing it, or the end of the process, lets go.

    A child that inherits the file holds the lock too, also after the end of this process. The holder may remove
    the file before it closes it.

    Args:
        path: the file, made with its directory where it is not there.
        output: what is worked on, for messages.
        field: the setting that names it, for messages.

    Raises:
        ValueError: another process is at work on ``output``.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise ValueError(f"{field}: another process is at work on {output}") from error
        try:
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass
        file.close()  # the holder removed it between opening and locking: that lock excludes nobody


def _entry(line: bytes) -> dict[str, Any] | None:
    """A whole line of a journal; None for one that was cut short, or is none."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("i"), int) else None
