"""A million rows go through score and pairs in less than 1 GiB; a tenth of them take as much."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
JOB = """
import resource, sys
from pathlib import Path
from fastpo.selfplay.pairs import PairsConfig, make_pairs
from fastpo.selfplay.rows import write_rows
from fastpo.selfplay.score import ScoreConfig, score

count, folder = int(sys.argv[1]), Path(sys.argv[2])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
def row(k):
    return {"prompt": f"question {k} " + "word " * 20, "responses": [f"good {k}" * 8, f"bad {k}" * 8]}
write_rows(folder / "rows.jsonl", map(row, range(count)))
before = peak()
score(ScoreConfig(str(folder / "rows.jsonl"), str(folder / "scored.jsonl"),
                  {"kind": "callable", "function": "scale_rules:score"}))
make_pairs(PairsConfig(str(folder / "scored.jsonl"), str(folder / "pairs.jsonl"), "ordered", threshold=0.5,
                       max_repetition=0.9, max_pairs=count // 10))
print("MiB", before, peak(), sum(1 for _ in open(folder / "pairs.jsonl")))
"""


def peaks(count: int, folder: Path) -> tuple[int, int]:
    """Resident MiB before and after, at most."""
    folder.mkdir()
    (folder / "scale_rules.py").write_text(
        "def score(prompt, response, row):\n    return float(response.startswith('good'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", JOB, str(count), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("MiB")]
    before, after, pairs = map(int, line.split()[1:])
    assert pairs == count // 10
    print(f"{count} rows: {before} MiB before, {after} MiB at most")
    return before, after


def test_memory_grows_with_a_few_bytes_a_row(tmp_path: Path) -> None:
    (_, small), (_, large) = (peaks(n, tmp_path / str(n)) for n in (2000, 40_000))
    assert large - small <= 24  # MiB; the rows themselves are 12 MiB as text and 40 as objects


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_million_rows_in_less_than_a_gibibyte(tmp_path: Path) -> None:
    _, after = peaks(1_000_000, tmp_path / "million")
    assert after < 1024
