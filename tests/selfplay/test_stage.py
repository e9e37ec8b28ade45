"""Stages: done once, continued after a kill at any byte, refused where something else is there."""

from __future__ import annotations

import json
import multiprocessing
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastpo.selfplay.manifest import load_manifest, manifest_path, model_revision
from fastpo.selfplay.rows import draw_rows, read_rows, write_rows
from fastpo.selfplay.stage import Batch, Result, Work, run_stage


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
    with pytest.raises(ValueError, match=r'inputs\.rows: "[0-9a-f]+" → "[0-9a-f]+"'):
        run(other, output, Worker())
    assert output.read_bytes() == before


def test_a_half_finished_stage_of_other_settings_is_refused(rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError, match="killed"):
        run(rows, output, Worker(3))
    with pytest.raises(ValueError, match=r"out\.jsonl\.partial was made with other .* 1 → 2"):
        run(rows, output, Worker(), settings={"a": {"b": 2}})
    run(rows, output, Worker())


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
    bad.write_text("[1]\n")
    with pytest.raises(ValueError, match="expected a JSON object, got int"):
        run(bad, tmp_path / "p.jsonl", Worker())
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
