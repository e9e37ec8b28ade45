"""The whole demo at a tiny scale: what it prints, writes and leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from fastpo.cli import main
from fastpo.demo import run
from fastpo.demo.plot import plot_accuracies
from fastpo.demo.run import METHODS, SeedResult, table


def test_the_demo_from_start_to_end(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(run, "METHODS", {name: METHODS[name] for name in ("DPO", "γ-SimPO")})
    out_dir = tmp_path / "demo"
    assert main(["demo", "--output-dir", str(out_dir), "--seeds", "7", "--scale", "0.02"]) == 0
    out = capsys.readouterr().out
    (result,) = json.loads((out_dir / "results.json").read_text(encoding="utf-8"))
    assert result["seed"] == 7
    assert list(result["after"]) == ["DPO", "γ-SimPO"]
    assert len((out_dir / "seed-7/train.jsonl").read_text().splitlines()) == result["pairs"] > 0
    assert (out_dir / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert str(out_dir / "accuracy.png") in out
    assert "it/s]" not in out  # progress bars are in train.log
    for name, method in (("DPO", "DPO"), ("gamma-SimPO", "γ-SimPO")):
        run_dir = out_dir / "seed-7" / name
        AutoModelForCausalLM.from_pretrained(run_dir)
        assert "train:" in (run_dir / "train.log").read_text(encoding="utf-8")
        shown = f"{method:<8} {result['before']:.1%} → {result['after'][method]:.1%}"
        assert shown in out


def test_the_table_holds_percentages_and_their_means(monkeypatch) -> None:
    monkeypatch.setattr(run, "METHODS", {"DPO": {}, "γ-DPO": {}})
    results = [
        SeedResult(0, 10, 0.25, {"DPO": 0.5, "γ-DPO": 0.75}),
        SeedResult(1, 10, 0.35, {"DPO": 0.6, "γ-DPO": 0.70}),
    ]
    lines = [line.split() for line in table(results).splitlines()]
    assert lines[0] == ["exact", "match,", "%", "before", "DPO", "γ-DPO"]
    assert lines[1] == ["seed", "0", "25.0", "50.0", "75.0"]
    assert lines[2] == ["seed", "1", "35.0", "60.0", "70.0"]
    assert lines[3] == ["mean", "30.0", "55.0", "72.5"]


@pytest.mark.parametrize("seeds", [1, 5])
def test_the_plot_takes_any_number_of_seeds(tmp_path: Path, seeds: int) -> None:
    results = [SeedResult(s, 10, 0.3, dict.fromkeys(METHODS, 0.5 + s / 50)) for s in range(seeds)]
    path = plot_accuracies(results, tmp_path / "accuracy.png")
    assert path.stat().st_size > 5000


def test_all_methods_share_everything_but_their_loss() -> None:
    assert list(METHODS) == ["DPO", "γ-DPO", "SimPO", "γ-SimPO"]
    for fixed, dynamic in (("DPO", "γ-DPO"), ("SimPO", "γ-SimPO")):
        extra = METHODS[dynamic].keys() - METHODS[fixed].keys()
        assert extra <= {"margin", "gamma_tau", "simpo_gamma", "gamma_beta_ratio"}
        for name in ("loss_type", "beta"):
            assert METHODS[dynamic][name] == METHODS[fixed][name]
        assert METHODS[dynamic].get("learning_rate") == METHODS[fixed].get("learning_rate")
