"""The study of stagnation: its command, its tables, and the committed page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastpo.benchmarks import stagnation_study as study


def test_the_command_runs_every_method_from_one_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "ITERATIONS", 2)
    for name, value in (("num_train_epochs", 1), ("per_device_train_batch_size", 4)):
        monkeypatch.setitem(study.SETTINGS, name, value)
    out = tmp_path / "study.json"
    study.main(["--seeds", "0", "--scale", "0.02", "--out", str(out)])
    document = json.loads(out.read_text("utf-8"))
    runs = {run["method"]: run for run in document["runs"]}
    assert list(runs) == list(study.METHODS)
    assert len({run["before"] for run in runs.values()}) == 1
    for method, run in runs.items():
        assert len(run["iterations"]) == 2
        for iteration in run["iterations"]:
            curves = iteration["curves"]
            assert len({len(curve) for curve in curves.values()}) == 1
            assert ("noise/sigma_mean" in curves) == (method != "SPIN")
    first = [run["iterations"][0] for run in runs.values()]
    assert len({iteration["pairs"] for iteration in first}) == 1  # the start's own answers
    strong, weak = (first[k]["curves"]["noise/sigma_mean"][-1] for k in (2, 1))
    assert strong > weak > 0
    assert first[0]["curves"]["grad_norm"] != first[2]["curves"]["grad_norm"]

    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {n} -->\n<!-- end {n} -->\n" for n in study.tables(document)))
    study.report(out, page, tmp_path / "plot.png")
    for table in study.tables(document).values():
        assert table in page.read_text("utf-8")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_committed_page_is_made_from_the_committed_results() -> None:
    document = json.loads(study.RESULTS.read_text("utf-8"))
    assert document["methods"] == study.METHODS
    assert document["settings"] == study.SETTINGS
    assert {run["seed"] for run in document["runs"]} >= {0, 1, 2}
    for method in study.METHODS:
        assert all(len(run["iterations"]) == 3 for run in study.runs_of(document, method))
    page = study.PAGE.read_text("utf-8")
    for table in study.tables(document).values():
        assert table in page
