"""`fastpo bench`: mistakes in the command, a run from end to end, and its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastpo.benchmarks import bench
from fastpo.benchmarks.cases import SETS, Case
from fastpo.cli import main


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--set", "cpus"], "--set: got 'cpus', expected one of cpu, gpu, quick"),
        (["--only", "eager", "cce"], "--only: got 'cce', expected some of fastpo-certified"),
        (["--skip", "eagre"], "--skip: got 'eagre'"),
        (["--minutes", "0"], "--minutes: got 0.0, expected a number > 0"),
        (["--rounds", "0"], "--rounds: got 0, expected an integer ≥ 1"),
        (["--states", "none.safetensors"], "--states: no file 'none.safetensors'"),
        (["--report", "none.json"], "--report: no file 'none.json'"),
    ],
)
def test_a_mistake_is_told_in_one_line(argv, told, capsys) -> None:
    assert main(["bench", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastpo bench: error: ")
    assert told in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


def test_a_run_and_its_report(tmp_path: Path, monkeypatch, capsys) -> None:
    states = tmp_path / "states"
    states.write_bytes(b"abc")
    monkeypatch.setattr(bench, "own_states", lambda: states)
    case = Case("main", 64, 16, 97, None, length=8, rounds=4)
    lm = Case("main", 64, 16, 97, 1.6, length=8, rounds=4)  # whose states are none: it fails alone
    monkeypatch.setitem(SETS, "quick", (case, lm))
    out = tmp_path / "quick.json"
    argv = ["bench", "--set", "quick", "--out", str(out), "--rounds", "2"]
    assert main([*argv, "--only", "eager", "fastpo-certified", "fastpo-exact"]) == 0
    told = capsys.readouterr().out
    assert f"written to {out}" in told
    for name in ("eager", "fastpo-certified", "fastpo-exact"):
        assert any(line.startswith(f"{name} ") for line in told.splitlines())
    document = json.loads(out.read_text(encoding="utf-8"))
    record, failed = document["cases"]
    assert "error" in failed
    assert [len(r["step_seconds"]) for r in record["results"]] == [2, 2, 2]
    assert document["states"] == {
        "own": True,
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }
    assert document["arguments"]["only"] == ["eager", "fastpo-certified", "fastpo-exact"]

    assert main(["bench", "--report", str(out), "--out", str(tmp_path / "page")]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page == tmp_path / "page/report.md"
    assert "the project's own model, SHA-256 ba7816bf8f01cfea…." in page.read_text(encoding="utf-8")
    assert "| fastpo-certified | " in page.read_text(encoding="utf-8")
