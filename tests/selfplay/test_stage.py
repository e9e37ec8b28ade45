"""Stages: done once, continued after a kill at any byte, refused where something else is there."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import random
import subprocess
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastpo.selfplay import progress
from fastpo.selfplay.manifest import differences, load_manifest, manifest_path, model_revision
from fastpo.selfplay.rows import draw_rows, read_rows, write_rows
from fastpo.selfplay.stage import Batch, Result, Work, lock, run_stage, summary, write_stage


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """37 rows of different lengths."""
    path = tmp_path / "rows.jsonl"
    write_rows(path, ({"n": n, "text": "x" * (n * 7 % 11)} for n in range(37)))
    return path


class Worker:
    """Marks each row with its batch, drops every fifth, and can stop after some results."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.seen: list[int] = []
        self.batches: list[tuple[int, list[int]]] = []

    def __call__(self, batches: Iterator[Batch], counts: Counter[str]) -> Iterator[Result]:
        for batch in batches:
            numbers = [item.number for item in batch.items]
            self.batches.append((batch.seed, numbers))
            for item in reversed(batch.items):  # in any order
                if self.stop_after is not None and len(self.seen) >= self.stop_after:
                    raise RuntimeError("killed")
                self.seen.append(item.number)
                counts["looked_at"] += 1
                if item.row["n"] % 5 == 4:
                    yield Result(item.number, None, "fifth")
                else:
                    yield Result(item.number, {"mark": [batch.seed, item.number]})


def work(worker: Worker, batch_rows: int = 1) -> Work:
    return Work(worker, batch_rows, lambda row: len(row["text"]))


def run(rows: Path, output: Path, worker: Worker, batch_rows: int = 1, **options: Any) -> Any:
    settings = options.pop("settings", {"a": {"b": 1}})
    return run_stage(
        "mark", output, {"rows": rows}, settings, work(worker, batch_rows), quiet=True, **options
    )


@pytest.mark.parametrize("batch_rows", [1, 4])
def test_rows_keep_their_order_and_columns(rows: Path, tmp_path: Path, batch_rows: int) -> None:
    worker = Worker()
    manifest = run(rows, tmp_path / "out.jsonl", worker, batch_rows)
    got = [row for _, row in read_rows(tmp_path / "out.jsonl")]
    assert [row["n"] for row in got] == [n for n in range(37) if n % 5 != 4]
    assert all(row["mark"][1] == row["n"] and "text" in row for row in got)
    assert manifest.counts == {"in": 37, "out": 30, "fifth": 7, "looked_at": 37}
    assert len({seed for seed, _ in worker.batches}) == len(worker.batches)
    assert not list(tmp_path.glob("*.partial"))


def test_a_finished_stage_is_not_done_again(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    first = run(rows, output, Worker())
    again = Worker()
    second = run_stage("mark", output, {"rows": rows}, {"a": {"b": 1}}, work(again))
    assert second == first
    assert not again.seen
    assert "up to date (30 rows)" in capsys.readouterr().out


@pytest.mark.parametrize("batch_rows", [1, 4])
def test_stopped_anywhere_it_ends_as_if_it_had_not_been(
    rows: Path, tmp_path: Path, batch_rows: int, seed: int
) -> None:
    whole = tmp_path / "whole.jsonl"
    run(rows, whole, Worker(), batch_rows)
    draw = random.Random(seed)
    output = tmp_path / "out.jsonl"
    seen: list[int] = []
    for stop_after in (5, 9, 4):
        worker = Worker(stop_after)
        with pytest.raises(RuntimeError, match="killed"):
            run(rows, output, worker, batch_rows)
        seen += worker.seen
        assert not output.exists()
        journal = tmp_path / "out.jsonl.partial/journal.jsonl"
        data = journal.read_bytes()
        assert data.endswith(b"\n")
        if batch_rows == 1:  # the line that a kill cut short
            last = len(data.splitlines()[-1])
            journal.write_bytes(data[: len(data) - draw.randint(1, last)])
    worker = Worker()
    run(rows, output, worker, batch_rows)
    assert output.read_bytes() == whole.read_bytes()
    if (
        batch_rows == 1
    ):  # a row is done again only where its line was lost: at most one for each kill
        assert len(seen) + len(worker.seen) - 37 <= 3
        assert load_manifest(output).counts["out"] == 30


def test_killed_between_output_and_manifest(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("fastpo.selfplay.manifest.Manifest.save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(rows, output, Worker())
    assert output.exists()
    worker = Worker()
    manifest = run(rows, output, worker)
    assert not worker.seen
    assert manifest.counts["out"] == 30
    assert not list(tmp_path.glob("*.partial"))


def test_other_settings_inputs_or_seed_are_refused_with_the_difference(
    rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    run(rows, output, Worker())
    before = output.read_bytes()
    with pytest.raises(ValueError, match=r"other inputs or settings \(settings\.a\.b: 1 → 2\)"):
        run(rows, output, Worker(), settings={"a": {"b": 2}})
    with pytest.raises(ValueError, match=r"settings\.seed: 0 → 3"):
        run(rows, output, Worker(), seed=3)
    other = tmp_path / "other.jsonl"
    write_rows(other, [{"n": 1, "text": ""}])
    with pytest.raises(
        ValueError, match=r"\(the content of rows changed: .*other\.jsonl\); expected"
    ):
        run(other, output, Worker())
    assert output.read_bytes() == before


def test_a_half_finished_stage_of_other_settings_is_refused(rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError, match="killed"):
        run(rows, output, Worker(3))
    with pytest.raises(
        ValueError,
        match=r"out\.jsonl\.partial was made with other .* 1 → 2.* delete the directory .*\.partial to",
    ):
        run(rows, output, Worker(), settings={"a": {"b": 2}})
    run(rows, output, Worker())


def test_a_stage_that_failed_before_its_first_row_may_come_with_other_settings(
    rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError, match="killed"):
        run(rows, output, Worker(0))
    with (tmp_path / "out.jsonl.partial/journal.jsonl").open("a") as journal:
        journal.write('{"i": 0, "r"')  # a first line that was cut short is no finished row
    with pytest.raises(RuntimeError, match="killed"):
        run(rows, output, Worker(2), settings={"a": {"b": 2}})
    with pytest.raises(ValueError, match=r"settings\.a\.b: 2 → 1"):  # rows are finished now
        run(rows, output, Worker())
    manifest = run(rows, output, Worker(), settings={"a": {"b": 2}})
    assert manifest.identity["settings"]["a"] == {"b": 2}
    assert manifest.counts == {"in": 37, "out": 30, "fifth": 7, "looked_at": 37}


def test_the_seed_of_a_batch_depends_on_the_run_the_stage_and_its_rows(
    rows: Path, tmp_path: Path
) -> None:
    seeds = set()
    for number, (stage, seed) in enumerate([("mark", 0), ("mark", 1), ("other", 0)]):
        worker = Worker()
        run_stage(
            stage, tmp_path / f"{number}.jsonl", {"rows": rows}, {}, work(worker, 4), seed=seed, quiet=True
        )  # fmt: skip
        seeds |= {batch_seed for batch_seed, _ in worker.batches}
    assert len(seeds) == 3 * 10


@pytest.mark.parametrize("batch_rows", [1, 4])
def test_counts_are_those_of_a_run_that_was_not_killed(
    rows: Path, tmp_path: Path, batch_rows: int
) -> None:
    """Killed after every line that a journal can end with."""
    whole = run(rows, tmp_path / "whole.jsonl", Worker(), batch_rows)
    output = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError, match="killed"):
        run(rows, output, Worker(6), batch_rows)
    lines = (tmp_path / "out.jsonl.partial/journal.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 6
    for kept in range(7):
        with pytest.raises(RuntimeError, match="killed"):
            run(rows, output, Worker(0), batch_rows)
        (tmp_path / "out.jsonl.partial/journal.jsonl").write_bytes(b"".join(lines[:kept]))
        assert run(rows, output, Worker(), batch_rows).counts == whole.counts
        output.unlink()
        manifest_path(output).unlink()


def test_what_is_counted_after_the_last_result_is_kept(rows: Path, tmp_path: Path) -> None:
    def worker(batches: Iterator[Batch], counts: Counter[str]) -> Iterator[Result]:
        yield from Worker()(batches, counts)
        counts["late"] += 3

    output = tmp_path / "out.jsonl"
    manifest = run_stage("mark", output, {"rows": rows}, {}, Work(worker), quiet=True)
    assert manifest.counts == {"in": 37, "out": 30, "fifth": 7, "looked_at": 37, "late": 3}
    assert len(output.read_bytes().splitlines()) == 30


def test_files_of_killed_processes_go(rows: Path, tmp_path: Path) -> None:
    names = ("o.jsonl", "o.parquet")
    stale = [
        tmp_path / name
        for name in (
            ".o.jsonl.12.tmp", ".o.jsonl.manifest.json.12.tmp",
            ".o.parquet.3.jsonl", "..o.parquet.3.jsonl.3.tmp",
        )
    ]  # fmt: skip
    others = [tmp_path / name for name in (".oo.jsonl.12.tmp", ".o.jsonl.tmp", ".o.jsonl.x.tmp")]
    for file in (*stale, *others):
        file.write_text("half")
    for name in names:
        run(rows, tmp_path / name, Worker())
    assert [file for file in (*stale, *others) if file.exists()] == others
    stale[0].write_text("half")
    write_stage(
        "s", tmp_path / "w.jsonl", {"rows": rows}, {}, lambda counts: iter([{"a": 1}]), quiet=True
    )
    assert stale[0].exists()  # of another output, which a process may be at work on
    assert not list(tmp_path.glob("*.partial"))


def test_the_outcome_in_words() -> None:
    counts = {"in": 1024, "out": 591, "response_chosen": 90, "retries": 2}
    left_out = {"small_gap": 30, "equal_answers": 403, "empty_answer": 0}
    assert summary(counts, left_out) == (
        "591 rows of 1024 (90 won by the model, retries 2); left out: equal_answers 403, small_gap 30"
    )
    assert summary({"out": 3}, {}) == "3 rows"


def test_an_output_without_rows_is_a_warning(rows: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.warns(UserWarning, match=r"o\.jsonl: no row, its input has none"):
        run(empty, tmp_path / "o.jsonl", Worker())

    def drops(batches: Iterator[Batch], counts: Counter[str]) -> Iterator[Result]:
        yield from (Result(item.number, None, "bad") for batch in batches for item in batch.items)

    with pytest.warns(UserWarning, match=r"no row of 37; left out: bad 37"):
        run_stage("mark", tmp_path / "p.jsonl", {"rows": rows}, {}, Work(drops), quiet=True)


def test_progress_is_told_without_a_terminal(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 10_000, 11))  # every look at the clock takes 11 seconds
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with progress.Progress("generate", 10, 4, quiet=False) as shown:
        for done in range(5, 11):
            shown.update(done, tokens=100)
    lines = capsys.readouterr().err.splitlines()
    # Told at 33 s (7 rows done, 3 of them since the start, 300 tokens) and never again before the end.
    assert lines[0] == "generate: 7 of 10 rows, 9 tok/s, about 0:00:33 left"
    assert len(lines) == 1
    with progress.Progress("generate", 10, 4, quiet=True) as shown:
        for done in range(5, 11):
            shown.update(done, tokens=100)
    assert not capsys.readouterr().err


def test_outputs_that_are_not_what_they_were_are_refused(rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("mine\n")
    with pytest.raises(ValueError, match="has no manifest, so fastpo did not make it"):
        run(rows, output, Worker())
    assert output.read_text() == "mine\n"
    output.unlink()
    run(rows, output, Worker())
    with output.open("a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match="was changed since it was made"):
        run(rows, output, Worker())
    output.unlink()
    with pytest.raises(ValueError, match="is gone, but its manifest is there"):
        run(rows, output, Worker())
    manifest_path(output).write_text("{}")
    with pytest.raises(ValueError, match="not a manifest of fastpo"):
        run(rows, output, Worker())


def _hold(rows: Path, output: Path, ready: Any, go: Any) -> None:
    def waiting(batches: Iterator[Batch], counts: Counter[str]) -> Iterator[Result]:
        ready.set()
        go.wait(30)
        yield from Worker()(batches, counts)

    run_stage("mark", output, {"rows": rows}, {"a": {"b": 1}}, Work(waiting), quiet=True)


def test_two_processes_do_not_work_on_one_output(rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    context = multiprocessing.get_context("fork")
    ready, go = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(rows, output, ready, go))
    process.start()
    assert ready.wait(30)
    with pytest.raises(ValueError, match="another process is at work"):
        run(rows, output, Worker())
    go.set()
    process.join(30)
    assert process.exitcode == 0
    assert run(rows, output, Worker()).counts["out"] == 30


def test_a_lock_holds_while_a_child_has_it_and_a_removed_one_holds_nobody(tmp_path: Path) -> None:
    path = tmp_path / "deep/lock"
    held = lock(path, tmp_path)
    child = subprocess.Popen(["sleep", "60"], stdin=held)
    held.close()
    with pytest.raises(ValueError, match="output_dir: another process is at work"):
        lock(path, tmp_path, "output_dir")
    child.kill()
    child.wait()
    held = lock(path, tmp_path)
    path.unlink()
    lock(path, tmp_path).close()  # the name is free again
    held.close()


def test_a_lock_that_its_holder_removed_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    real, calls = fcntl.flock, []

    def removed_before(file: Any, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            path.unlink()
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with lock(path, tmp_path) as held:
        assert os.path.samestat(os.fstat(held.fileno()), path.stat())
        with pytest.raises(ValueError, match="another process is at work"):
            lock(path, tmp_path)


def test_differences_in_words() -> None:
    first, second = "a" * 64, "b" * 64
    before = {
        "seeds": first,
        "settings": {"scorer": {"source_sha256": first}, "start": {"sha256": first}},
    }
    now = {
        "seeds": second,
        "settings": {"scorer": {"source_sha256": second}, "start": {"sha256": second}},
    }
    assert differences(before, now) == [
        "the content of seeds changed", "the content of scorer.source changed", "the content of start changed",
    ]  # fmt: skip
    assert differences({"a": first}, {"a": None}) != differences({"a": first}, {"a": second})


def test_a_worker_that_forgets_rows_is_found_out(rows: Path, tmp_path: Path) -> None:
    forgetful = Work(lambda batches, counts: iter(()))
    with pytest.raises(RuntimeError, match="37 rows were given no result"):
        run_stage("mark", tmp_path / "o.jsonl", {"rows": rows}, {}, forgetful, quiet=True)


def test_parquet_in_and_out(tmp_path: Path) -> None:
    """A column that is null in the first rows; more rows than are held at a time."""
    source = tmp_path / "rows.parquet"
    made = [{"n": n, "text": "", "late": None if n < 2000 else [n]} for n in range(2500)]
    assert write_rows(source, made) == 2500
    assert [row for _, row in read_rows(source)] == made
    output = tmp_path / "out.parquet"
    run(source, output, Worker())
    table = pq.read_table(output)
    assert table.num_rows == 2000
    assert table["mark"][0].as_py()[1] == 0
    with pytest.raises(ValueError, match="changes its type from row to row"):
        write_rows(tmp_path / "bad.parquet", [{"a": 1}, {"a": "x"}])
    assert not list(tmp_path.glob("*bad*"))


def test_parquet_keeps_columns_that_first_rows_lack(tmp_path: Path) -> None:
    made: list[dict[str, Any]] = [{"a": 1}, {"b": [2.5]}, {"a": 3, "c": {"d": "x"}}]
    path = tmp_path / "rows.parquet"
    write_rows(path, made)
    names = ("a", "b", "c")
    assert [row for _, row in read_rows(path)] == [{k: row.get(k) for k in names} for row in made]


def test_columns_that_json_cannot_hold_are_named_before_any_work(
    rows: Path, tmp_path: Path
) -> None:
    when = pa.array([datetime(2026, 1, 1), None], pa.timestamp("us"))
    pq.write_table(pa.table({"n": [1, 2], "when": when}), tmp_path / "rows.parquet")
    worker = Worker()
    with pytest.raises(
        ValueError, match=r"rows\.parquet, row 0 \(from 0\): column 'when' holds .*datetime"
    ):
        run(tmp_path / "rows.parquet", tmp_path / "o.jsonl", worker)
    (tmp_path / "nan.jsonl").write_text('{"n": 1, "text": ""}\n{"n": 2, "text": "", "x": [NaN]}\n')
    with pytest.raises(ValueError, match=r"nan\.jsonl, line 2: column 'x' holds \[nan\] \(list\)"):
        run(tmp_path / "nan.jsonl", tmp_path / "o.jsonl", worker)
    assert not worker.seen
    with pytest.raises(
        ValueError, match=r"p\.jsonl, row 1 \(from 0\): column 'y' holds b'1' \(bytes\)"
    ):
        write_rows(tmp_path / "p.jsonl", [{"y": 1}, {"y": b"1"}])


def test_manifest_says_what_was_done_without_credentials(rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    settings = {
        "engine": {"api_key": "s3cret", "base_url": "http://me:pw@host/v1", "kind": "openai"}
    }
    run(rows, output, Worker(), settings=settings, seed=5)
    text = manifest_path(output).read_text()
    assert "s3cret" not in text
    assert "pw@" not in text
    document = json.loads(text)
    assert document["stage"] == "mark"
    assert document["settings"] == {
        "engine": {"base_url": "http://host/v1", "kind": "openai"},
        "seed": 5,
    }
    assert document["paths"] == {"rows": str(rows)}
    assert document["versions"]["fastpo"]


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing\.jsonl"):
        run(tmp_path / "nothing.jsonl", tmp_path / "o.jsonl", Worker())
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"n": 1, "text": ""}\n{"n": "\xff"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: not valid UTF-8"):
        run(bad, tmp_path / "o.jsonl", Worker())
    for text in ("[1]\n", '[1, 2]\n{"n": 1}\n'):
        bad.write_text(text)
        with pytest.raises(
            ValueError, match=r"bad\.jsonl, line 1: expected a JSON object, got list"
        ):
            run(bad, tmp_path / "p.jsonl", Worker())
    bad.write_text('{"n": 1, "text": ""}\n3\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: expected a JSON object, got int"):
        run(bad, tmp_path / "p.jsonl", Worker())
    array = tmp_path / "array.jsonl"
    array.write_text('[{"n": 1, "text": ""}, {"n": 2, "text": ""}]')
    assert [row["n"] for _, row in read_rows(array)] == [1, 2]
    with pytest.raises(ValueError, match=r"expected a file that ends in \.jsonl or \.parquet"):
        run(bad, tmp_path / "o.csv", Worker())
    (tmp_path / "no.parquet").write_text("x")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        run(tmp_path / "no.parquet", tmp_path / "q.jsonl", Worker())
    latin = pa.array([b"good", b"\xff bad"]).view(pa.string())
    pq.write_table(pa.table({"n": [1, 2], "text": latin}), tmp_path / "latin.parquet")
    with pytest.raises(ValueError, match=r"latin\.parquet, row 0 or later: not UTF-8"):
        run(tmp_path / "latin.parquet", tmp_path / "r.jsonl", Worker())


def test_drawn_rows_are_a_fair_sample_in_order() -> None:
    def rows() -> Iterator[dict[str, Any]]:
        return ({"n": n} for n in range(30))

    taken: Counter[int] = Counter()
    for seed in range(600):
        drawn, total = draw_rows(rows, 10, seed)
        numbers = [row["n"] for row in drawn]
        assert total == 30
        assert len(numbers) == 10
        assert numbers == sorted(numbers)
        taken.update(numbers)
    assert all(130 < taken[n] < 270 for n in range(30))  # 200 ± 6 deviations
    drawn, total = draw_rows(rows, 100, 0)
    assert len(list(drawn)) == total == 30


def test_a_model_directory_is_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = model_revision(str(tmp_path))
    (tmp_path / "trainer_state.json").write_text("{}")  # what a run writes about itself
    assert model_revision(str(tmp_path)) == first
    (tmp_path / "model.safetensors").write_bytes(b"22")
    assert model_revision(str(tmp_path)) != first
    with pytest.raises(FileNotFoundError, match="model: 'nobody/nothing' is no directory"):
        model_revision("nobody/nothing")


def test_a_hub_model_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--org--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text(commit)
    (cached / f"snapshots/{commit}").mkdir(parents=True)
    (cached / f"snapshots/{commit}/config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path), raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert model_revision("org/name") == {"name": "org/name", "commit": commit}
