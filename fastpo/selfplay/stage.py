"""``run_stage``: rows in, rows out; done once, and continued where a killed process left it.

While a stage runs, ``X.jsonl.partial/`` holds its identity and a journal, to which every finished row is
appended as one line. A line that was cut short by a kill is cut off; all others stay done. When no row is left,
the journal's results are put in the order of the rows and written as ``X.jsonl``, then its manifest, both whole
or not at all; then the directory goes.

Rows come in batches that depend on the input and the settings alone, and each batch has a seed of its own:
where an engine's output depends on what is generated together, a batch that was not finished is made again as a
whole, with the same result as without the kill.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from fastpo.atomic_write import replaced

from .manifest import Identity, Manifest, differences, load_manifest, sha256
from .rows import Row, check_readable, check_writable, json_line, read_rows, write_rows

WINDOW = 16  # batches whose rows are sorted by length together
SYNC_SECONDS = 5.0  # between two flushes of the journal to the disk


class Item(NamedTuple):
    """A row that has no result yet."""

    number: int  # of the row, from 0
    where: str  # names it in messages
    row: Row


class Batch(NamedTuple):
    """Rows that are worked on together."""

    seed: int
    items: list[Item]


class Result(NamedTuple):
    """What a row became: new columns, or the reason why it is left out."""

    number: int  # of the row
    columns: Row | None
    dropped: str | None = None
    tokens: int = 0  # generated, for the progress bar


@dataclass(frozen=True)
class Work:
    """How the rows of a stage become results.

    Args:
        run: takes the batches that have rows without a result, gives the result of every row of theirs, in any
            order, and adds what it wants to have counted (requests made again, …) to the counter.
        batch_rows: rows of a batch; 1: each row by itself.
        length: of a row; the rows of a few batches are sorted by it, so that those of a batch are alike.
    """

    run: Callable[[Iterator[Batch], Counter[str]], Iterator[Result]]
    batch_rows: int = 1
    length: Callable[[Row], int] | None = None


def seed_of(*parts: object) -> int:
    """A seed in [0, 2⁶³) that depends on ``parts`` and nothing else."""
    text = json.dumps(parts, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def run_stage(
    stage: str,
    output: Path,
    inputs: Mapping[str, Path],
    settings: Mapping[str, Any],
    work: Work,
    *,
    seed: int = 0,
    keep_columns: bool = True,
    quiet: bool = False,
) -> Manifest:
    """Run a stage whose rows are those of the input ``rows``, or find it done.

    Args:
        stage: its name.
        output: the JSONL or Parquet file to write.
        inputs: files by name; the rows are those of ``rows``.
        settings: everything that decides the results, plain values; the seed is added.
        work: how rows become results.
        seed: of the run.
        keep_columns: rows keep their columns beside the new ones.
        quiet: no progress bar and no line about the outcome.

    Returns:
        The manifest, new or as it was found.

    Raises:
        FileNotFoundError: no such input.
        ValueError: an ending that is not served; an output, or a half-finished one, of another stage or other
            settings (the differences are listed); an output that is not what its manifest says; another process
            at work on it.
    """
    check_writable(output)
    for path in inputs.values():
        check_readable(path)
    hashes = {name: sha256(path) for name, path in inputs.items()}
    identity = Identity(stage, hashes, {**settings, "seed": seed}).to_dict()
    found = finished(output, identity)
    if found is not None:
        if not quiet:
            print(f"{output}: up to date ({found.counts.get('out', 0)} rows)", flush=True)
        return found
    start = time.monotonic()
    output.parent.mkdir(parents=True, exist_ok=True)
    with _Journal(output, identity) as journal:
        rows = inputs["rows"]
        total = sum(1 for _ in read_rows(rows))
        journal.load(total)
        _do(stage, rows, total, work, journal, seed, quiet)
        counts = Counter({"in": total, "out": 0, **journal.counts})
        write_rows(output, journal.merged(read_rows(rows), counts, keep_columns))
        manifest = _finish(output, identity, counts, inputs, start, quiet)
        journal.remove()
    return manifest


def write_stage(
    stage: str,
    output: Path,
    inputs: Mapping[str, Path],
    settings: Mapping[str, Any],
    make: Callable[[Counter[str]], Iterable[Row]],
    *,
    quiet: bool = False,
) -> Manifest:
    """A stage that is quickly made as a whole, or found done.

    Args:
        stage, output, inputs, settings, quiet: as for :func:`run_stage`.
        make: makes the rows, and counts what became of the others.

    Raises:
        FileNotFoundError, ValueError: as :func:`run_stage`.
    """
    check_writable(output)
    for path in inputs.values():
        if not path.is_file():
            raise FileNotFoundError(f"no file {str(path)!r}")
    identity = Identity(stage, {k: sha256(v) for k, v in inputs.items()}, settings).to_dict()
    found = finished(output, identity)
    if found is not None:
        return found
    start = time.monotonic()
    _partial(output).mkdir(parents=True, exist_ok=True)  # an output beside it is ours
    counts: Counter[str] = Counter()
    counts["out"] = write_rows(output, make(counts))
    manifest = _finish(output, identity, counts, inputs, start, quiet)
    shutil.rmtree(_partial(output))
    return manifest


def _finish(
    output: Path,
    identity: dict[str, Any],
    counts: Mapping[str, int],
    inputs: Mapping[str, Path],
    start: float,
    quiet: bool,
) -> Manifest:
    paths = {name: str(path) for name, path in inputs.items()}
    seconds = round(time.monotonic() - start, 3)
    manifest = Manifest(identity, dict(counts), sha256(output), seconds, paths)
    manifest.save(output)
    if not quiet:
        print(f"{output}: {summary(counts)}", flush=True)
    return manifest


def finished(output: Path, identity: Mapping[str, Any]) -> Manifest | None:
    """The manifest of an output that is done, None where there is nothing.

    Raises:
        ValueError: the output is another stage's or has other settings, is not what its manifest says, or has
            none.
    """
    manifest = load_manifest(output)
    if manifest is None:
        if output.exists() and not _partial(output).is_dir():
            raise ValueError(
                f"output: {output} exists and has no manifest, so fastpo did not make it; expected a new file"
            )
        return None
    refuse_other(output, manifest.identity, identity)
    if not output.is_file():
        raise ValueError(
            f"output: {output} is gone, but its manifest is there; delete that to make it again"
        )
    if sha256(output) != manifest.output_sha256:
        raise ValueError(
            f"output: {output} was changed since it was made; delete it and its manifest to make it again"
        )
    shutil.rmtree(_partial(output), ignore_errors=True)  # of a process killed at its very end
    return manifest


def refuse_other(output: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = differences(before, now)
    if changed:
        raise ValueError(
            f"output: {output} was made with other inputs or settings ({'; '.join(changed)}); expected the "
            "same, or another output (or delete it and its manifest to make it again)"
        )


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def summary(counts: Mapping[str, int]) -> str:
    """Counts in words: ``120 rows of 130; dropped: empty 10``."""
    of_all = f" of {counts['in']}" if "in" in counts else ""
    text = f"{counts['out']} rows{of_all}"
    others = {name: n for name, n in counts.items() if name not in ("in", "out") and n}
    return text + (f"; {', '.join(f'{name} {n}' for name, n in others.items())}" if others else "")


def _do(
    stage: str,
    rows: Path,
    total: int,
    work: Work,
    journal: _Journal,
    seed: int,
    quiet: bool,
) -> None:
    """Give every row a result."""
    missing = total - journal.done
    if not missing:
        return
    counts: Counter[str] = Counter()
    tokens, start = 0, time.monotonic()
    pending = _pending(read_rows(rows), work, journal, seed, stage)
    with tqdm(
        total=total,
        initial=journal.done,
        desc=stage,
        unit="row",
        disable=quiet or None,
        dynamic_ncols=True,
    ) as bar:
        results = work.run(pending, counts)
        for result in results:
            before = journal.done
            journal.add(result)
            if counts:
                journal.count(counts)
                counts.clear()
            bar.update(journal.done - before)
            tokens += result.tokens
            if tokens:
                rate = tokens / max(time.monotonic() - start, 1e-9)
                bar.set_postfix_str(f"{rate:.0f} tok/s", refresh=False)
    if counts:
        journal.count(counts)
    if journal.done < total:
        raise RuntimeError(f"{stage}: {total - journal.done} rows were given no result")


def _pending(
    rows: Iterator[tuple[str, Row]], work: Work, journal: _Journal, seed: int, stage: str
) -> Iterator[Batch]:
    """The batches that have rows without a result, whole ones. Which rows a batch holds depends on the input
    alone.
    """
    size = work.batch_rows * WINDOW
    window: list[Item] = []

    def batches() -> Iterator[Batch]:
        length = work.length
        if length is not None:
            window.sort(key=lambda item: length(item.row))  # stable
        for start in range(0, len(window), work.batch_rows):
            items = window[start : start + work.batch_rows]
            if not all(journal.has(item.number) for item in items):
                yield Batch(seed_of(seed, stage, [item.number for item in items]), items)

    for number, (where, row) in enumerate(rows):
        window.append(Item(number, where, row))
        if len(window) == size:
            yield from batches()
            window = []
    yield from batches()


class _Journal:
    """Results of an unfinished stage, on disk; in memory 8 bytes a row, where its line is."""

    def __init__(self, output: Path, identity: dict[str, Any]) -> None:
        self.directory = _partial(output)
        self.output, self.identity = output, identity
        self.counts: Counter[str] = Counter()
        self.done = 0
        self._places = array("q")
        self._synced = 0.0

    def __enter__(self) -> _Journal:
        self.directory.mkdir(exist_ok=True)
        self._lock = lock(self.directory / "lock", self.output)
        try:
            file = self.directory / "identity.json"
            if file.is_file():
                before = json.loads(file.read_text(encoding="utf-8"))
                refuse_other(self.directory, before, self.identity)
            else:
                with replaced(file) as whole:
                    whole.write(json_line(self.identity))
            self._file = (self.directory / "journal.jsonl").open("a+b")
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._lock.close()

    def load(self, total: int) -> None:
        """Read what is done of ``total`` rows; cut off what a kill left of a line."""
        self._places = array("q", [-1]) * total
        self._file.seek(0)
        place = 0
        for line in self._file:
            entry = _entry(line)
            if entry is None or entry.get("i", 0) >= total:
                break
            if "c" in entry:
                self.counts.update(entry["c"])
            else:
                self._note(entry["i"], place)
            place += len(line)
        self._file.truncate(place)
        self._file.seek(0, os.SEEK_END)

    def has(self, number: int) -> bool:
        return self._places[number] >= 0

    def add(self, result: Result) -> None:
        kept = {"d": result.dropped} if result.dropped is not None else {"r": result.columns}
        place = self._append({"i": result.number, **kept})
        self._note(result.number, place)

    def count(self, counts: Mapping[str, int]) -> None:
        self.counts.update(counts)
        self._append({"c": dict(counts)})

    def merged(
        self, rows: Iterator[tuple[str, Row]], counts: Counter[str], keep_columns: bool
    ) -> Iterator[Row]:
        """The rows with their new columns, in order; those that are left out are counted by reason."""
        self._file.flush()
        for number, (_, row) in enumerate(rows):
            self._file.seek(self._places[number])
            entry = json.loads(self._file.readline())
            if "d" in entry:
                counts[entry["d"]] += 1
            else:
                counts["out"] += 1
                yield {**row, **entry["r"]} if keep_columns else entry["r"]

    def remove(self) -> None:
        shutil.rmtree(self.directory)

    def _note(self, number: int, place: int) -> None:
        self.done += self._places[number] < 0
        self._places[number] = place

    def _append(self, entry: dict[str, Any]) -> int:
        place = self._file.tell()
        self._file.write(json_line(entry))
        self._file.flush()  # a kill of the process loses nothing from here on
        now = time.monotonic()
        if now - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = now
        return place


def lock(path: Path, output: Path) -> IO[str]:
    """An open file that no other process has locked; closing it, or the end of the process, lets go.

    Raises:
        ValueError: another process is at work on ``output``.
    """
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ValueError(f"output: another process is at work on {output}") from error
    return file


def _entry(line: bytes) -> dict[str, Any] | None:
    """A whole line of a journal; None for one that was cut short."""
    if not line.endswith(b"\n"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None
