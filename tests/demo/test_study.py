"""The committed study: its arithmetic, and that the page says what the data say."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from types import ModuleType

import pytest

from fastpo.demo.run import METHODS, TRAINING, SeedResult

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_study", ROOT / "benchmarks/demo_study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_interval_is_students(study: ModuleType) -> None:
    """Five values with standard deviation √2.5: half width 2.776·√(2.5/5)."""
    assert study._interval([1.0, 2.0, 3.0, 4.0, 5.0]) == f"3.0 ± {2.776 * math.sqrt(0.5):.1f}"
    assert study._interval([-1.0] * 5, sign="+") == "−1.0 ± 0.0"
    assert study._interval([-0.01] * 5, sign="+") == "+0.0 ± 0.0"


def test_the_table_compares_seed_by_seed(study: ModuleType) -> None:
    results = [
        SeedResult(
            s,
            10,
            0.3,
            {"DPO": 0.5 + s / 100, "γ-DPO": 0.52 + s / 100, "SimPO": 0.4, "γ-SimPO": 0.3},
        )
        for s in range(5)
    ]
    lines = study.study_table(results).splitlines()
    assert "| γ-DPO − DPO | +2.0 ± 0.0 | 5 of 5 |" in lines
    assert "| γ-SimPO − SimPO | −10.0 ± 0.0 | 0 of 5 |" in lines
    assert lines[2] == "| before | 30.0 ± 0.0 | |"


def test_the_page_shows_the_committed_results(study: ModuleType) -> None:
    page = (ROOT / "docs/demo.md").read_text(encoding="utf-8")
    document = json.loads(study.STUDY_FILE.read_text(encoding="utf-8"))
    results = sorted((SeedResult(**r) for r in document["results"]), key=lambda r: r.seed)
    searched = json.loads(study.SEARCH_FILE.read_text(encoding="utf-8"))["results"]
    for name, table in (
        ("study", study.study_table(results)),
        ("search", study.search_table(searched)),
    ):
        (shown,) = re.findall(rf"<!-- {name} -->\n(.*?)\n<!-- end {name} -->", page, re.S)
        assert shown == table
    assert (ROOT / "docs/demo_study.png").read_bytes().startswith(b"\x89PNG")


def test_the_study_is_of_the_present_settings_on_seeds_of_its_own(study: ModuleType) -> None:
    document = json.loads(study.STUDY_FILE.read_text(encoding="utf-8"))
    searched = json.loads(study.SEARCH_FILE.read_text(encoding="utf-8"))["results"]
    assert document["methods"] == METHODS
    assert document["training"] == TRAINING
    seeds = [r["seed"] for r in document["results"]]
    assert len(seeds) == len(set(seeds)) >= 5
    assert not set(seeds) & {r["seed"] for r in searched}
