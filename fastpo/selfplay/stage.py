"""``run_stage``: rows in, rows out; done once, and continued where a killed process left it.

While a stage runs, ``X.jsonl.partial/`` holds its journal of finished rows (``journal``). When no row is left,
the journal's results are put in the order of the rows and written as ``X.jsonl``, then its manifest, both whole
or not at all; then the directory goes.

Rows come in batches that depend on the input and the settings alone, and each batch has a seed of its own:
where an engine's output depends on what is generated together, a batch that was not finished is made again as a
whole, with the same result as without the kill.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastpo.atomic_write import remove_leftovers

from .journal import Journal, partial_of, refuse_other
from .journal import lock as lock
from .manifest import Identity, Manifest, load_manifest, manifest_path, sha256
from .progress import Progress
from .rows import Row, check_readable, check_writable, read_rows, row_line, write_rows

WINDOW = 16  # batches whose rows are sorted by length together
NOTES = {"response_chosen": "won by the model"}  # counts of rows that stay, in words


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
    leave_out: Collection[str] = (),
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
        leave_out: of these columns, those that they do not keep.
        quiet: no progress and no line about the outcome.

    Returns:
        The manifest, new or as it was found.

    Raises:
        FileNotFoundError: no such input.
        ValueError: an ending that is not served; an output, or a half-finished one, of another stage or other
            settings (the differences are listed); an output that is not what its manifest says; another process
            at work on it; a column of a row that JSON cannot hold.

    Warns:
        UserWarning: no row came out.
    """
    check_writable(output)
    for path in inputs.values():
        check_readable(path)
    hashes = {name: sha256(path) for name, path in inputs.items()}
    identity = Identity(stage, hashes, {**settings, "seed": seed}).to_dict()
    found = finished(output, identity, inputs)
    if found is not None:
        if not quiet:
            print(f"{output}: up to date ({found.counts.get('out', 0)} rows)", flush=True)
        return found
    start = time.monotonic()
    with Journal(output, identity, inputs) as journal:
        _remove_leftovers(output)
        rows = inputs["rows"]
        # Told before any work is done: what a row keeps goes through JSON at the end.
        total = sum(1 for where, row in read_rows(rows) if row_line(where, row))
        journal.load(total)
        _do(stage, rows, total, work, journal, seed, quiet)
        counts, left_out = Counter({"in": total, "out": 0}), Counter[str]()
        merged = _merged(read_rows(rows), journal, counts, left_out, keep_columns, leave_out)
        write_rows(output, merged)
        manifest = _finish(output, identity, counts, left_out, inputs, start, quiet)
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
    found = finished(output, identity, inputs)
    if found is not None:
        return found
    start = time.monotonic()
    partial = partial_of(output)  # an output beside it is ours
    with lock(partial / "lock", output):
        _remove_leftovers(output)
        left_out: Counter[str] = Counter()
        written = write_rows(output, make(left_out))
        counts = (
            {"in": left_out.pop("in"), "out": written} if "in" in left_out else {"out": written}
        )
        manifest = _finish(output, identity, counts, left_out, inputs, start, quiet)
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _remove_leftovers(output: Path) -> None:
    """Temporary files of a process that was killed; the caller holds the output's lock."""
    for path in (output, manifest_path(output)):
        remove_leftovers(path)


def _finish(
    output: Path,
    identity: dict[str, Any],
    counts: Mapping[str, int],
    left_out: Mapping[str, int],
    inputs: Mapping[str, Path],
    start: float,
    quiet: bool,
) -> Manifest:
    paths = {name: str(path) for name, path in inputs.items()}
    seconds = round(time.monotonic() - start, 3)
    manifest = Manifest(identity, {**counts, **left_out}, sha256(output), seconds, paths)
    manifest.save(output)
    if not quiet:
        print(f"{output}: {summary(counts, left_out)}", flush=True)
    if not counts["out"]:
        words = summary(counts, left_out).removeprefix("0 rows")
        why = ", its input has none" if counts.get("in") == 0 else words
        warnings.warn(f"{output}: no row{why}", stacklevel=1)
    return manifest


def finished(
    output: Path, identity: Mapping[str, Any], inputs: Mapping[str, Path]
) -> Manifest | None:
    """The manifest of an output that is done, None where there is nothing.

    Raises:
        ValueError: the output is another stage's or has other settings, is not what its manifest says, or has
            none.
    """
    manifest = load_manifest(output)
    if manifest is None:
        if output.exists() and not partial_of(output).is_dir():
            raise ValueError(
                f"output: {output} exists and has no manifest, so fastpo did not make it; expected a new file"
            )
        return None
    remedy = f"another output (or delete it and {manifest_path(output).name} to make it again)"
    refuse_other(output, manifest.identity, identity, inputs, remedy)
    if not output.is_file():
        raise ValueError(
            f"output: {output} is gone, but its manifest is there; delete that to make it again"
        )
    if sha256(output) != manifest.output_sha256:
        raise ValueError(
            f"output: {output} was changed since it was made; delete it and its manifest to make it again"
        )
    shutil.rmtree(partial_of(output), ignore_errors=True)  # of a process killed at its very end
    return manifest


def summary(counts: Mapping[str, int], left_out: Mapping[str, int]) -> str:
    """Counts in words: ``120 rows of 130 (90 won by the model); left out: equal_answers 10``.

    Args:
        counts: ``out``, ``in`` where it is known, and notes on rows that stayed.
        left_out: reason → rows.
    """
    text = f"{counts['out']} rows"
    if "in" in counts:
        text += f" of {counts['in']}"
    notes = [
        f"{n} {NOTES[name]}" if name in NOTES else f"{name} {n}"
        for name, n in counts.items()
        if name not in ("in", "out") and n
    ]
    if notes:
        text += f" ({', '.join(notes)})"
    reasons = [
        f"{name} {n}" for name, n in sorted(left_out.items(), key=lambda entry: -entry[1]) if n
    ]
    return f"{text}; left out: {', '.join(reasons)}" if reasons else text


def _do(
    stage: str,
    rows: Path,
    total: int,
    work: Work,
    journal: Journal,
    seed: int,
    quiet: bool,
) -> None:
    """Give every row a result."""
    if journal.done == total:
        return
    counts: Counter[str] = Counter()
    last: tuple[Result, Counter[str]] | None = None
    pending = _pending(read_rows(rows), work, journal, seed, stage)
    with Progress(stage, total, journal.done, quiet) as progress:
        for result in work.run(pending, counts):
            # One line holds the result and what was counted on the way to it: a kill leaves both or neither.
            journal.add(result.number, result.columns, result.dropped, counts)
            last = result, counts.copy()
            counts.clear()
            progress.update(journal.done, result.tokens)
    if counts and last is not None:
        result, before = last
        journal.add(result.number, result.columns, result.dropped, before + counts)
    if journal.done < total:
        raise RuntimeError(f"{stage}: {total - journal.done} rows were given no result")


def _merged(
    rows: Iterator[tuple[str, Row]],
    journal: Journal,
    counts: Counter[str],
    left_out: Counter[str],
    keep_columns: bool,
    leave_out: Collection[str],
) -> Iterator[Row]:
    """The rows with their new columns, in order; those that are left out are counted by reason."""
    for number, (_, row) in enumerate(rows):
        columns, dropped, noted = journal.entry(number)
        counts.update(noted)
        if dropped is not None:
            left_out[dropped] += 1
            continue
        counts["out"] += 1
        kept = {k: v for k, v in row.items() if k not in leave_out} if keep_columns else {}
        yield {**kept, **(columns or {})}


def _pending(
    rows: Iterator[tuple[str, Row]], work: Work, journal: Journal, seed: int, stage: str
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
