"""``fastpo train`` on two processes of which one fails, or has other settings, rows or state than the other."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
Results = dict[str, list[tuple[int | None, float, str]]]


def write_pairs(path: Path, seed: int, wrong: str) -> None:
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for k in range(16):
            a, b = draw.randrange(50), draw.randrange(50)
            rejected = wrong if k == 11 else str(a + b + 3)
            row = {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": rejected}
            file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failures")
    for name, wrong in (("train", "12"), ("copy", "12"), ("other", "21")):
        write_pairs(folder / f"{name}.jsonl", 5, wrong)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path, checkpoint: Path) -> Results:
    """Scenario → (status, seconds, stderr) of both ranks."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "rank_watch")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "FASTPO_CACHE": str(folder / "cache"),
    }
    script = Path(__file__).with_name("failing_ranks.py")
    subprocess.run(
        [sys.executable, script, folder, checkpoint], env=environment, check=True, timeout=280
    )
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(
    ("scenario", "status", "reason"),
    [
        ("step", 1, "failed: OutOfMemoryError: Tried to allocate 2.00 GiB"),
        ("reference", -9, "is gone: it ended without a Python error"),
        ("evaluation", 3, "is gone: it ended without a Python error"),
        ("save", -9, "is gone: it ended without a Python error"),
        ("data", 1, "failed: KeyError: 'a data row without an answer'"),
    ],
)
def test_a_rank_that_fails_ends_the_job(
    scenario: str, status: int, reason: str, results: Results
) -> None:
    (survivor, seconds, stderr), (failed, moment, _) = results[scenario]
    assert (survivor, failed) == (1, status), stderr
    assert seconds - moment < 30
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("fastpo"), stderr
    assert "rank 1 (process " in last
    assert reason in last


def test_the_launcher_gets_the_root_cause(folder: Path, results: Results) -> None:
    assert results["step"][1][0] == 1
    written = json.loads((folder / "step-1.json").read_text())["message"]
    assert written["message"] == "OutOfMemoryError: Tried to allocate 2.00 GiB"
    assert "in compute_loss" in written["extraInfo"]["py_callstack"] or "failing" in str(written)


@pytest.mark.parametrize(
    ("scenario", "named"),
    [
        ("settings", ["beta: 0.2 on rank 0, 0.3 on rank 1",
                      "gradient_accumulation_steps: 1 on rank 0, 2 on rank 1"]),
        ("rows", ["train data: '16 rows ("]),
        ("checkpoint", ["resume_from_checkpoint: None on rank 0, 'checkpoint-2' on rank 1"]),
        ("state", ["state margin.queue: '"]),
    ],
)  # fmt: skip
def test_what_differs_is_named_on_all_ranks(
    scenario: str, named: list[str], results: Results
) -> None:
    for status, _, stderr in results[scenario]:
        assert status == 2, stderr  # a mistake in the configuration or the data
        last = stderr.strip().splitlines()[-1]
        for text in named:
            assert text in last
        assert last.count(" on rank 1") == len(named)


def test_paths_may_differ(results: Results) -> None:
    assert [status for status, _, _ in results["paths"]] == [0, 0], results["paths"][0][2]
