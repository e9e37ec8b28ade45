"""The study of training with the certified backward: its command, its tables, and what the page claims."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from fastpo.benchmarks import training_equivalence as study

TINY = {
    "vocab": 1024,
    "layers": 1,
    "pretraining_steps": 80,
    "pretraining_texts": 32,
    "pretraining_rate": 2e-2,
    "pairs": 48,
    "held_out": 16,
    "batch": 8,
    "learning_rate": 1e-3,  # large, so that a few steps move the loss
}


def test_the_command_compares_runs_that_drop_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One fixed seed: no bound says how far a tolerance per token carries through Adam's normalisation."""
    monkeypatch.setattr(study, "Sizes", functools.partial(study.Sizes, **TINY))
    out = tmp_path / "study.json"
    study.main(["--steps", "6", "--seeds", "0", "--out", str(out)])
    document = json.loads(out.read_text("utf-8"))
    runs = {run["run"]: run for run in document["runs"]}
    assert list(runs) == list(study.RUNS)
    loss = {name: run["curves"]["loss"] for name, run in runs.items()}
    active = {name: run["curves"]["active_fraction"] for name, run in runs.items()}
    assert all(len(values) == 6 for run in runs.values() for values in run["curves"].values())

    assert active["exact"] == active["another order"] == [1.0] * 6
    assert max(active["coarse"]) < max(active["certified"]) < 0.9
    dropped = runs["certified"]["curves"]["dropped_mass_max"]
    assert 0 < max(dropped) <= 2**-10 * (1 + 1e-3)

    moved = [abs(value - loss["exact"][0]) for value in loss["exact"]]
    assert max(moved) > 0.02  # they learn, or agreement means nothing
    assert loss["certified"] == pytest.approx(loss["exact"], rel=1e-3)
    held_out = [runs[name]["end"]["held-out loss"] for name in ("certified", "exact")]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-3)
    apart = [abs(c - e) for c, e in zip(loss["coarse"], loss["exact"], strict=True)]
    assert max(apart) > 1e-5  # what is dropped does reach the loss
    assert loss["another order"] != pytest.approx(loss["exact"], rel=1e-3)

    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {n} -->\n<!-- end {n} -->\n" for n in study.tables(document)))
    study.report(out, page, tmp_path / "plot.png")
    for table in study.tables(document).values():
        assert table in page.read_text("utf-8")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def made_up(**ends: list[float]) -> dict[str, Any]:
    """A document of three seeds with one number at the end of each run, and curves of two steps."""
    curves = {
        "loss": [1.0, 0.5],
        "active_fraction": [0.25, 0.75],
        "dense_share": [0.0, 0.5],
        "dropped_mass_max": [0.001, 0.002],
    }
    return {
        "variants": study.RUNS,
        "runs": [
            {
                "seed": seed,
                "run": name,
                "end": {"loss": ends[name.split()[0]][seed]},
                "curves": curves
                if name == "exact"
                else {**curves, "loss": [1.0, 0.5 - 0.01 * seed]},
            }
            for seed in (2, 0, 1)
            for name in study.RUNS
        ],
    }


def test_tables_compare_seed_by_seed() -> None:
    document = made_up(
        exact=[1.0, 2.0, 3.0],
        certified=[1.0, 2.001, 2.98],
        coarse=[1.5, 2.5, 3.5],
        another=[0.9, 2.0, 3.0],
    )
    differences = study.differences_table(document).splitlines()
    assert differences[2] == (
        "| loss | +0, +0.001, −0.02 | +0.5, +0.5, +0.5 | −0.1, +0, +0 | 1.0000 |"
    )
    certified, coarse = study.sparsity_table(document).splitlines()[2:]
    assert certified == (
        "| certified | 0.0009766 | 0.500 (0.250 – 0.750) | 25.0% | 0.002 | 0.020000 |"
    )
    assert coarse.startswith("| coarse | 0.0625 | ")
    assert "| 1 | certified | 2.00100 |" in study.ends_table(document).splitlines()


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return json.loads(study.RESULTS.read_text("utf-8"))


def test_the_page_shows_the_committed_results(committed: dict[str, Any]) -> None:
    page = study.PAGE.read_text("utf-8")
    for name, table in study.tables(committed).items():
        assert f"<!-- {name} -->\n{table}\n<!-- end {name} -->" in page
    assert study.PLOT.name in page
    assert study.PLOT.is_file()


def test_the_committed_results_are_of_the_present_settings(committed: dict[str, Any]) -> None:
    assert committed["steps"] == 300
    assert committed["sizes"] == dataclasses.asdict(study.Sizes())
    assert committed["variants"] == study.RUNS
    assert committed["settings"] == study.settings(study.Sizes(), 300)
    runs = study.by_run(committed)
    for name in study.RUNS:
        assert [run["seed"] for run in runs[name]] == [0, 1, 2]
    assert all(len(run["curves"]["loss"]) == 300 for run in committed["runs"])


def test_certified_ends_within_the_noise_of_seeds_and_order(committed: dict[str, Any]) -> None:
    runs = study.by_run(committed)
    assert mean(mean(run["curves"]["active_fraction"]) for run in runs["certified"]) < 0.5
    for end in ("training loss", "held-out loss", "held-out accuracy", "held-out margin"):
        exact = [run["end"][end] for run in runs["exact"]]

        def apart(name: str, end: str = end, exact: list[float] = exact) -> float:
            return mean(abs(run["end"][end] - e) for run, e in zip(runs[name], exact, strict=True))

        assert apart("certified") < 0.25 * stdev(exact), end
        assert apart("certified") < apart("another order"), end


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_study_on_a_seed_of_its_own(tmp_path: Path, seed: int) -> None:
    """Full sizes, fewer steps, in a process of its own as a reader would run it."""
    out = tmp_path / "study.json"
    command = [sys.executable, "-m", "fastpo.benchmarks.training_equivalence", "--steps", "100"]
    subprocess.run([*command, "--seeds", str(seed), "--out", str(out)], check=True)
    runs = study.by_run(json.loads(out.read_text("utf-8")))
    (exact,), (certified,) = runs["exact"], runs["certified"]
    assert mean(certified["curves"]["active_fraction"]) < 0.6
    assert certified["curves"]["loss"] == pytest.approx(exact["curves"]["loss"], abs=5e-3)
    assert certified["end"]["held-out loss"] == pytest.approx(
        exact["end"]["held-out loss"], abs=5e-3
    )
